"""Scripted stand-ins at the core's seams: drafters that know the future; knows no real model."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from dflash_core import Finish, Prefill, SamplingParams, Step, decode


class OracleDrafter:
    """Drafts the true continuation, wrong from slot `right_of(step)` on: acceptance is scripted, 0..k.

    It taps real layers and checks that every committed token's features arrive exactly once.
    """

    def __init__(self, truth: Sequence[int], vocab_size: int, k: int, right_of: Callable[[int], int], taps: tuple[int, ...] = ()):
        self.taps, self.max_drafted = taps, k
        self.truth, self.vocab_size, self.right_of = list(truth), vocab_size, right_of
        self.steps = 0
        self.fed = 0
        self.prompt_tokens: int | None = None
        self.device: torch.device | None = None

    def commit(self, features: Tensor | None) -> None:
        if features is None:
            return
        self.device = features.device
        if self.prompt_tokens is None:
            self.prompt_tokens = features.shape[1]
        else:
            self.fed += features.shape[1]

    def propose(self, anchor: int, k: int) -> Tensor:
        # Everything fed after the prompt is committed and run; the anchor comes right after it.
        position = self.fed if self.taps else self.truth.index(anchor)
        assert self.truth[position] == anchor
        future = self.truth[position + 1 : position + 1 + k]
        future += [0] * (k - len(future))
        right = self.right_of(self.steps)
        self.steps += 1
        tokens = [t if i < right else (t + 1) % self.vocab_size for i, t in enumerate(future)]
        logits = torch.full((k, self.vocab_size), -20.0, device=self.device)
        logits[torch.arange(k), torch.tensor(tokens)] = 20.0
        return logits


def run(pair, ids: Sequence[int], params: SamplingParams, **options) -> tuple[list[int], list]:
    """Decode to the end; the reply's tokens and all events."""
    events = list(decode(pair, ids, params, **options))
    return reply_of(events), events


def reply_of(events: Sequence) -> list[int]:
    """The reply as its events tell it."""
    reply: list[int] = []
    for event in events:
        match event:
            case Prefill():
                reply.append(event.first_token)
            case Step():
                reply.extend(event.committed)
            case Finish():
                pass
    return reply
