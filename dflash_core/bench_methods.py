"""The ways of decoding that the bench compares, behind one call; knows no prompts file and no table.

Two are this package's loop (`ar`, `dflash`), three are transformers' own `generate`.
"""

import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dflash_core.config import SamplingParams
from dflash_core.decode import decode, default_drafter
from dflash_core.errors import PromptError
from dflash_core.events import Prefill, Step
from dflash_core.loading import Pair
from dflash_core.model import DFlashDraftModel
from dflash_core.tally import Tally

METHODS = ("ar", "dflash", "hf-generate", "hf-dflash", "prompt-lookup")
DRAFTING = ("dflash", "hf-dflash")
PROMPT_LOOKUP_TOKENS = 10


@dataclass(frozen=True, slots=True)
class Run:
    """One reply of one method. Seconds are wall time from prompt ids to the last id.

    commits   how many tokens joined the reply after each forward of the target, prefill first
    tally     the loop's own account, None for transformers' methods
    times     seconds after the start at which each of `commits` was there, () for the loop, which reports its own
    """

    ids: tuple[int, ...]
    seconds: float
    first_token_seconds: float
    commits: tuple[int, ...]
    tally: Tally | None = None
    peak_bytes: int | None = None
    times: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Method:
    """`name` as in the report, `kind` one of METHODS; `run` decodes one prompt."""

    name: str
    kind: str
    run: Callable[[Sequence[int]], Run]


def possible(pair: Pair) -> list[str]:
    """The methods that this pair allows."""
    lacking = {None: DRAFTING, False: ("hf-dflash",), True: ()}[pair.fits_transformers]
    return [kind for kind in METHODS if kind not in lacking]


def make_methods(pair: Pair, kinds: Iterable[str], params: SamplingParams, block_sizes: Sequence[int]) -> list[Method]:
    """The methods to compare; a drafting method once per block size, named with it when there are several."""
    methods = []
    for kind in kinds:
        if kind in DRAFTING and len(block_sizes) > 1:
            methods += [
                Method(f"{kind}-b{k}", kind, _runner(pair, kind, replace(params, block_size=k))) for k in block_sizes
            ]
        else:
            own = replace(params, block_size=block_sizes[0] if block_sizes else None)
            methods.append(Method(kind, kind, _runner(pair, kind, own)))
    return methods


def _runner(pair: Pair, kind: str, params: SamplingParams) -> Callable[[Sequence[int]], Run]:
    if kind in ("ar", "dflash"):
        return lambda ids: _measured(pair, lambda: _run_loop(pair, ids, params, drafting=kind == "dflash"))
    options = _speculation(pair, kind, params.block_size)
    return lambda ids: _measured(pair, lambda: _run_generate(pair, ids, params, options))


def _speculation(pair: Pair, kind: str, block_size: int | None) -> dict[str, Any]:
    """What `generate` must be told to draft as this method does."""
    if kind == "hf-generate":
        return {}
    if getattr(pair.target.model, "_is_stateful", False):
        raise PromptError(
            f"The method '{kind}' cannot run on this target.",
            "transformers drafts only for targets whose cache can be cropped.",
            "Leave the method out.",
        )
    if kind == "prompt-lookup":
        return {"prompt_lookup_num_tokens": PROMPT_LOOKUP_TOKENS}
    # The loop's own checks: that there is a draft and that it can fill blocks of this size.
    default_drafter(pair, SamplingParams(block_size=block_size), drafting=True)
    assert pair.draft is not None
    return {"assistant_model": hf_draft(pair.draft, block_size), "speculation_type": "dflash"}


def hf_draft(draft: DFlashDraftModel, block_size: int | None = None) -> Any:
    """transformers' own class of the same draft model, holding the same tensors.

    Raises `PromptError` for a draft that their class has no place for: DFlash 2's parts, causal slots.
    """
    from transformers import MuseGlimmerAssistantConfig, MuseGlimmerAssistantModel

    own = draft.config
    if not own.fits_transformers:
        raise PromptError(
            "transformers cannot run this draft.",
            f"Its class knows no {'DFlash 2' if own.is_dflash2 else 'causal slots'}.",
            "Leave the method 'hf-dflash' out.",
        )
    config = MuseGlimmerAssistantConfig(
        **{name: getattr(own, name) for name in _SHARED_FIELDS},
        layer_types=list(own.layer_types),
        target_layer_ids=list(own.target_layer_ids),
        rope_parameters=dict(own.rope_parameters),
        block_size=block_size or own.block_size,
        # Their window counts both ends: |q - k| <= w there is |q - k| < w + 1 here.
        sliding_window=(own.sliding_window or own.max_position_embeddings) - 1,
        dtype=draft.fc.weight.dtype,
    )
    with torch.device("meta"):
        model = MuseGlimmerAssistantModel(config)
    # Frequencies are computed, not loaded, so they must not be left on the meta device.
    model.rotary_emb = type(model.rotary_emb)(config).to(draft.fc.weight.device)
    model.load_state_dict({_renamed(name): weight for name, weight in draft.state_dict().items()}, assign=True)
    return model.eval()


_SHARED_FIELDS = (
    "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim",
    "rms_norm_eps", "max_position_embeddings", "mask_token_id",
)  # fmt: skip


def _renamed(name: str) -> str:
    return {"fc.weight": "encoder.fc.weight", "hidden_norm.weight": "encoder.output_norm_enc.weight"}.get(name, name)


def _run_loop(pair: Pair, ids: Sequence[int], params: SamplingParams, *, drafting: bool) -> Run:
    tally, reply, commits = Tally(), [], [1]
    start, first = _now(pair), 0.0
    with closing(decode(pair, ids, params, drafting=drafting)) as events:
        for event in events:
            tally.add(event)
            match event:
                case Prefill():
                    first = time.perf_counter() - start
                    reply.append(event.first_token)
                case Step():
                    reply.extend(event.committed)
                    commits.append(len(event.committed))
    seconds = _now(pair) - start
    return Run(tuple(reply), seconds, first, tuple(commits), tally)


class _Listener:
    """A streamer that keeps times instead of text."""

    def __init__(self) -> None:
        self.times: list[float] = []
        self.commits: list[int] = []
        self._saw_prompt = False

    def put(self, value: Tensor) -> None:
        if self._saw_prompt:
            self.times.append(time.perf_counter())
            self.commits.append(value.numel())
        self._saw_prompt = True

    def end(self) -> None:
        pass


def _run_generate(pair: Pair, ids: Sequence[int], params: SamplingParams, options: dict[str, Any]) -> Run:
    prompt = torch.tensor([list(ids)], device=pair.target.device)
    stops = pair.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids
    # Everything a checkpoint's generation_config may set is set back, so that all methods decode by the same rules.
    settings: dict[str, Any] = {
        "max_new_tokens": min(params.max_new_tokens, pair.context_length - len(ids)),
        "do_sample": params.temperature > 0.0,
        "repetition_penalty": 1.0,
        "eos_token_id": list(stops) or None,
        "pad_token_id": stops[0] if stops else 0,
    }
    if params.temperature > 0.0:
        settings |= {"temperature": params.temperature, "top_p": params.top_p, "top_k": params.top_k}
        torch.manual_seed(params.seed or 0)
    listener = _Listener()
    start = _now(pair)
    output = pair.target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), streamer=listener, **settings, **options
    )
    reply = output[0, len(ids) :].tolist()
    seconds = _now(pair) - start
    times = tuple(moment - start for moment in listener.times)
    return Run(tuple(reply), seconds, times[0], tuple(listener.commits), times=times)


def _measured(pair: Pair, run: Callable[[], Run]) -> Run:
    """The run with its own peak of GPU memory; on other devices memory is not counted per run."""
    if pair.target.device.type != "cuda":
        return run()
    torch.cuda.reset_peak_memory_stats(pair.target.device)
    return replace(run(), peak_bytes=torch.cuda.max_memory_allocated(pair.target.device))


def _now(pair: Pair) -> float:
    if pair.target.device.type == "cuda":
        torch.cuda.synchronize(pair.target.device)
    return time.perf_counter()


@torch.inference_mode()
def logit_gap(pair: Pair, prefix: Sequence[int], one: int, other: int) -> float:
    """How far apart, in logits, the target holds two tokens after `prefix`; a near-tie explains a difference."""
    ids = torch.tensor([list(prefix)], device=pair.target.device)
    logits = pair.target.model(ids, use_cache=False, logits_to_keep=1).logits[0, -1].float()
    return abs(float(logits[one] - logits[other]))
