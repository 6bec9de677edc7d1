"""Shows one step of a run to a pipeline's callback as tensors and reads back what it changed; runs no model itself."""

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from dflash_core.drafter import Chain, Drafter, Proposal
from dflash_core.errors import PromptError
from dflash_core.events import Step

if TYPE_CHECKING:
    from dflash_core.target import Target

TENSOR_INPUTS = ("block_output_ids", "draft_logits", "accepted_length", "next_token", "output_ids")


class WatchedDrafter:
    """A drafter that keeps its last proposal at hand."""

    def __init__(self, drafter: Drafter) -> None:
        self.taps, self.max_drafted = drafter.taps, drafter.max_drafted
        self.commit, self.reset = drafter.commit, drafter.reset
        self._drafter = drafter
        self._last: Proposal | None = None

    def propose(self, anchor: int, k: int) -> Proposal:
        self._last = self._drafter.propose(anchor, k)
        return self._last

    def take(self) -> Tensor | None:
        """The logits [k, V] the last tokens were chosen from, once; None when the step drafted nothing."""
        last, self._last = self._last, None
        return last.logits if isinstance(last, Chain) else last


class StepCallback:
    """One run's bridge between steps and a callback (pipe, step, timestep, tensors) -> changed tensors or None."""

    def __init__(
        self,
        call: Callable[[int, dict[str, Tensor]], Mapping[str, Tensor] | None],
        names: Sequence[str],
        prompt: Sequence[int],
        target: "Target",
    ) -> None:
        self._call, self._names, self._prompt = call, names, list(prompt)
        self._vocab_size, self._device = target.vocab_size, target.device
        self._drafter: WatchedDrafter | None = None

    def watch(self, drafter: Drafter) -> Drafter:
        """The drafter to decode with; wrapped only when the callback wants its logits."""
        if "draft_logits" not in self._names:
            return drafter
        self._drafter = WatchedDrafter(drafter)
        return self._drafter

    def after(self, step: Step, reply: list[int]) -> list[int] | None:
        """Show a step whose tokens are part of `reply`; returns the reply to go on from, None for this one."""
        before = {
            "block_output_ids": [step.anchor, *step.drafted],
            "accepted_length": [step.accepted],
            "next_token": [step.correction],
            "output_ids": [*self._prompt, *reply],
        }
        returned = self._call(step.index, {name: self._tensor(name, before) for name in self._names}) or {}
        _check_names(returned)
        after = before | {name: _ids(name, value) for name, value in returned.items() if name != "draft_logits"}
        if after["output_ids"] != before["output_ids"]:
            return self._without_prompt(after["output_ids"])
        if after == before:
            return None
        accepted = after["accepted_length"][0]
        added = [*after["block_output_ids"][1 : 1 + accepted], after["next_token"][0]]
        return reply[: step.position] + added

    def _tensor(self, name: str, values: Mapping[str, list[int]]) -> Tensor:
        if name == "draft_logits":
            assert self._drafter is not None
            logits = self._drafter.take()
            return torch.empty(1, 0, self._vocab_size, device=self._device) if logits is None else logits[None].clone()
        ids = torch.tensor(values[name], device=self._device)
        return ids[None] if name in ("block_output_ids", "output_ids") else ids

    def _without_prompt(self, ids: list[int]) -> list[int]:
        if ids[: len(self._prompt)] != self._prompt:
            raise PromptError(
                "The callback changed the prompt.",
                f"The first {len(self._prompt)} ids of 'output_ids' are the prompt's.",
                "Change the reply after them only.",
            )
        return ids[len(self._prompt) :]


def check_tensor_inputs(names: Sequence[str]) -> None:
    unknown = [name for name in names if name not in TENSOR_INPUTS]
    if unknown:
        raise PromptError(
            "'callback_on_step_end_tensor_inputs' names a tensor that does not exist.",
            f"Found '{unknown[0]}'.",
            f"Choose from {', '.join(TENSOR_INPUTS)}.",
        )


def _check_names(returned: Any) -> None:
    unknown = [name for name in returned if name not in TENSOR_INPUTS] if isinstance(returned, Mapping) else [returned]
    if unknown:
        raise PromptError(
            "The callback returned something that cannot be used.",
            f"Found {unknown[0]!r}.",
            f"Return None or a dict with any of {', '.join(TENSOR_INPUTS)}.",
        )


def _ids(name: str, value: Any) -> list[int]:
    if not isinstance(value, Tensor) or value.is_floating_point() or not value.numel():
        raise PromptError(
            "The callback returned a wrong tensor.", f"'{name}' is {value!r}.", "Return token ids of whole numbers."
        )
    return value.flatten().tolist()
