"""`DFlashPipeline`: prompts, chats or ids in, texts out, a callback per step; it knows no loop, only `decode`."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor
from tqdm.auto import tqdm

from dflash_core.config import SamplingParams
from dflash_core.decode import decode, default_drafter
from dflash_core.drafter import DFlashDrafter, Drafter
from dflash_core.errors import PromptError
from dflash_core.events import Event, Finish, Prefill, Step
from dflash_core.loading import Pair, load_pair
from dflash_core.model import DFlashDraftModel
from dflash_core.pipeline_files import DRAFT_FOLDER, TARGET_FOLDER, pair_of, read_index, save_pair
from dflash_core.prompts import Message, chat_ids, text_ids
from dflash_core.scheduler import DFlashTokenDiffusionScheduler
from dflash_core.step_callback import StepCallback, check_tensor_inputs

CallbackOnStepEnd: TypeAlias = Callable[["DFlashPipeline", int, int, dict[str, Tensor]], Mapping[str, Tensor] | None]


@dataclass(slots=True)
class DFlashPipelineOutput:
    """One entry per prompt.

    sequences   reply ids [n], without the prompt, with the stop token if one ended it
    texts       the replies as text without special tokens, None for output_type "seq"
    events      what `decode` reported: `Prefill`, `Step`s, `Finish`
    """

    sequences: list[Tensor]
    texts: list[str] | None
    events: list[list[Event]]


class DFlashPipeline:
    """A pair behind the interface of a diffusers pipeline. Prompts of a list are decoded one after the other."""

    def __init__(
        self,
        draft_model: DFlashDraftModel | None,
        target_model: Any,
        tokenizer: Any = None,
        scheduler: DFlashTokenDiffusionScheduler | None = None,
    ) -> None:
        """Take loaded models; the draft is moved to the target's device and dtype.

        Without a draft model the target decodes alone; without a tokenizer only ids go in and out.
        """
        self._set(pair_of("pipeline", target_model, draft_model, tokenizer), scheduler)

    @classmethod
    def from_pair(cls, pair: Pair, scheduler: DFlashTokenDiffusionScheduler | None = None) -> "DFlashPipeline":
        pipe = cls.__new__(cls)
        pipe._set(pair, scheduler)
        return pipe

    @classmethod
    def from_pretrained(
        cls,
        name_or_folder: str | Path | None = None,
        *,
        target: str | Path | None = None,
        draft: str | Path | None = None,
        scheduler: DFlashTokenDiffusionScheduler | None = None,
        **load_options: Any,
    ) -> "DFlashPipeline":
        """Load a folder `save_pretrained` wrote, a named pair, or a target and a draft; options as for `load_pair`."""
        folder = None if name_or_folder is None else Path(name_or_folder)
        index = None if folder is None else read_index(folder)
        if index is not None:
            target = target or folder / TARGET_FOLDER
            draft = draft or (folder / DRAFT_FOLDER if index["draft_model"] else "none")
            scheduler = scheduler or DFlashTokenDiffusionScheduler(**index["scheduler"])
        elif name_or_folder is not None:
            load_options["name"] = str(name_or_folder)
        return cls.from_pair(load_pair(target=target, draft=draft, **load_options), scheduler)

    def _set(self, pair: Pair, scheduler: DFlashTokenDiffusionScheduler | None) -> None:
        self.pair = pair
        self.scheduler = _checked_scheduler(scheduler or DFlashTokenDiffusionScheduler())
        # By default the bar shows in a terminal only.
        self._progress_bar_config: dict[str, Any] = {"disable": None}

    @property
    def draft_model(self) -> DFlashDraftModel | None:
        return self.pair.draft

    @property
    def target_model(self) -> Any:
        return self.pair.target.model

    @property
    def tokenizer(self) -> Any:
        return self.pair.tokenizer

    def set_progress_bar_config(self, **config: Any) -> None:
        """Arguments for tqdm, kept for all later calls."""
        self._progress_bar_config = config

    def progress_bar(self, total: int) -> tqdm:
        """A bar over one reply's tokens."""
        return tqdm(**{"total": total, "unit": "token", "leave": False} | self._progress_bar_config)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write target, tokenizer, draft and scheduler settings where `from_pretrained(folder)` finds them."""
        save_pair(self.pair, Path(folder), self.scheduler.config)

    def __call__(
        self,
        prompt: str | Sequence[str] | None = None,
        messages: Sequence[Message] | Sequence[Sequence[Message]] | None = None,
        input_ids: Tensor | Sequence[int] | Sequence[Sequence[int]] | None = None,
        max_new_tokens: int = 2048,
        temperature: float = 0.0,
        stop_token_ids: Sequence[int] | None = None,
        mask_token_id: int | None = None,
        use_chat_template: bool = True,
        add_generation_prompt: bool = True,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        output_type: Literal["text", "seq"] = "text",
        return_dict: bool = True,
        callback_on_step_end: CallbackOnStepEnd | None = None,
        callback_on_step_end_tensor_inputs: Sequence[str] | None = None,
        block_size: int | None = None,
    ) -> DFlashPipelineOutput | tuple[list[Tensor], list[str] | None]:
        """Reply to one of `prompt`, `messages` and `input_ids`, or to each of a list of them.

        max_new_tokens       at most so many, the stop token included
        temperature          0 is greedy; top-p, top-k, seed and the acceptance rule are the scheduler's
        stop_token_ids       None takes the target's own, () none
        mask_token_id        None takes the draft's
        block_size           slots per block, anchor included; None takes the draft's
        use_chat_template    False takes `prompt` as plain text
        callback_on_step_end called after each step as (pipe, step, timestep, tensors) with the tensors named in
                             `callback_on_step_end_tensor_inputs`: block_output_ids [1, k+1], draft_logits [1, k, V],
                             accepted_length [1], next_token [1], output_ids [1, prompt + reply]. Tensors it returns
                             replace those: a changed output_ids is the text to go on from, otherwise a changed
                             block, accepted length or next token is what this step adds to it.
        Raises `PromptError`. With return_dict=False returns (sequences, texts).
        """
        names = (
            ("block_output_ids",) if callback_on_step_end_tensor_inputs is None else callback_on_step_end_tensor_inputs
        )
        check_tensor_inputs(names)
        if output_type not in ("text", "seq"):
            raise PromptError(
                "The output type does not exist.", f"'output_type' is {output_type!r}.", "Choose 'text' or 'seq'."
            )
        if output_type == "text" and self.tokenizer is None:
            raise PromptError(
                "The reply cannot become text.", "This pipeline has no tokenizer.", "Ask for output_type='seq'."
            )
        template = {
            "add_generation_prompt": add_generation_prompt,
            **self.pair.chat_template_kwargs,
            **(chat_template_kwargs or {}),
        }
        params = SamplingParams(
            temperature=temperature,
            max_new_tokens=max_new_tokens,
            stop_token_ids=None if stop_token_ids is None else tuple(map(int, stop_token_ids)),
            block_size=block_size,
            **self.scheduler.config,
        )
        self.scheduler.set_timesteps(1, device=self.pair.target.device)
        output = DFlashPipelineOutput([], [] if output_type == "text" else None, [])
        for ids in self._prompt_ids(prompt, messages, input_ids, use_chat_template, template):
            callback = None
            if callback_on_step_end is not None:
                callback = StepCallback(self._bind(callback_on_step_end), names, ids, self.pair.target)
            reply, events = self._reply(ids, params, mask_token_id, callback)
            output.sequences.append(torch.tensor(reply, device=self.pair.target.device))
            output.events.append(events)
            if output.texts is not None:
                output.texts.append(self.tokenizer.decode(reply, skip_special_tokens=True))
        return output if return_dict else (output.sequences, output.texts)

    def _bind(self, callback: CallbackOnStepEnd) -> Callable[[int, dict[str, Tensor]], Mapping[str, Tensor] | None]:
        timestep = int(self.scheduler.timesteps[-1])
        return lambda step, tensors: callback(self, step, timestep, tensors)

    def _reply(
        self, ids: list[int], params: SamplingParams, mask_token_id: int | None, callback: StepCallback | None
    ) -> tuple[list[int], list[Event]]:
        drafter = self._drafter(params, mask_token_id)
        if callback is not None:
            drafter = callback.watch(drafter)
        reply: list[int] = []
        events: list[Event] = []
        run = decode(self.pair, ids, params, drafter=drafter)
        with closing(run), self.progress_bar(params.max_new_tokens) as bar:
            event = next(run)
            while not isinstance(event, Finish):
                events.append(event)
                reply += (event.first_token,) if isinstance(event, Prefill) else event.committed
                changed = callback.after(event, reply) if callback is not None and isinstance(event, Step) else None
                reply = reply if changed is None else changed
                bar.update(len(reply) - bar.n)
                event = run.send(changed)
        # A changed reply was cut where it ends, at a stop token or the limit.
        return reply[: event.new_tokens], [*events, event]

    def _drafter(self, params: SamplingParams, mask_token_id: int | None) -> Drafter:
        own = default_drafter(self.pair, params, drafting=self.draft_model is not None)
        if mask_token_id is None or self.draft_model is None:
            return own
        if not 0 <= mask_token_id < self.pair.target.vocab_size:
            raise PromptError(
                "The mask token does not exist in the target.",
                f"'mask_token_id' is {mask_token_id}, the target's embedding has {self.pair.target.vocab_size} rows.",
                "Leave it out to use the draft's own.",
            )
        return DFlashDrafter(self.pair.target, self.draft_model, params.block_size, mask_token_id)

    def _prompt_ids(
        self, prompt: Any, messages: Any, input_ids: Any, use_chat_template: bool, template: Mapping[str, Any]
    ) -> list[list[int]]:
        given = [
            name
            for name, value in (("prompt", prompt), ("messages", messages), ("input_ids", input_ids))
            if value is not None
        ]
        if len(given) != 1:
            raise PromptError(
                "The pipeline needs exactly one input.",
                f"It was given {' and '.join(given) or 'none'}.",
                "Pass one of 'prompt', 'messages' or 'input_ids'.",
            )
        if input_ids is not None:
            return _rows(input_ids)
        if self.tokenizer is None:
            raise PromptError("The text cannot become ids.", "This pipeline has no tokenizer.", "Pass 'input_ids'.")
        if messages is not None:
            chats = [messages] if not messages or isinstance(messages[0], Mapping) else messages
            return [chat_ids(self.tokenizer, chat, **template) for chat in chats]
        texts = [prompt] if isinstance(prompt, str) else prompt
        if not use_chat_template or not getattr(self.tokenizer, "chat_template", None):
            return [text_ids(self.tokenizer, text) for text in texts]
        return [chat_ids(self.tokenizer, [{"role": "user", "content": text}], **template) for text in texts]


def _rows(input_ids: Any) -> list[list[int]]:
    """Ids [n] or [B, n], as a tensor or as lists, one row per prompt."""
    if isinstance(input_ids, Tensor):
        if input_ids.dim() not in (1, 2) or input_ids.is_floating_point():
            raise PromptError(
                "'input_ids' has the wrong shape.",
                f"It is {input_ids.dtype} {list(input_ids.shape)}.",
                "Pass whole numbers [n] or [B, n].",
            )
        input_ids = input_ids.tolist()
    rows = list(input_ids)
    return [list(row) for row in rows] if rows and not isinstance(rows[0], int) else [rows]


def _checked_scheduler(scheduler: DFlashTokenDiffusionScheduler) -> DFlashTokenDiffusionScheduler:
    if getattr(type(scheduler), "step", None) is not DFlashTokenDiffusionScheduler.step:
        raise PromptError(
            "This scheduler cannot be used.",
            f"{type(scheduler).__name__} has a verdict of its own, which the decoding loop would not ask for.",
            "Use DFlashTokenDiffusionScheduler.",
        )
    return scheduler
