"""What a decode run reports, one frozen value per event; knows no tensor, no text and no screen.

A run yields one `Prefill`, then one `Step` per verify pass, then one `Finish`.
"""

from dataclasses import dataclass
from typing import Literal, TypeAlias

FinishReason: TypeAlias = Literal["stop", "length", "context"]


@dataclass(frozen=True, slots=True)
class Prefill:
    """The prompt went through the target, which chose the reply's first token."""

    prompt_tokens: int
    first_token: int
    seconds: float


@dataclass(frozen=True, slots=True)
class Step:
    """One draft-and-verify cycle.

    A block has k+1 slots: slot 0 is the anchor, slots 1..k the drafted tokens.

    index               0-based number of this verify pass
    position            index in the reply of `committed[0]` (the first token of the reply is 0)
    anchor              the last committed token before this step, not yet run through the target
    drafted             the k guesses of the draft model, () for the baseline
    posterior           the target's own choice after each slot, k+1 tokens; posterior[i] answers drafted[i]
    accepted            how many drafted tokens were kept by the acceptance rule, 0..k
    correction          posterior[accepted]; called the bonus when accepted == k
    committed           what joined the reply: drafted[:accepted] + (correction,), already cut at a stop
                        token, a stop string or the length limit
    draft_confidence    the draft's probability of each drafted token at temperature 1, k floats
    target_confidence   the target's probability of each posterior token at temperature 1, k+1 floats
    draft_seconds       drafting, 0.0 for the baseline
    verify_seconds      the target's forward and the verdict
    """

    index: int
    position: int
    anchor: int
    drafted: tuple[int, ...]
    posterior: tuple[int, ...]
    accepted: int
    correction: int
    committed: tuple[int, ...]
    draft_confidence: tuple[float, ...]
    target_confidence: tuple[float, ...]
    draft_seconds: float
    verify_seconds: float


@dataclass(frozen=True, slots=True)
class Finish:
    """The run ended: at a stop token or stop string, at the length limit, or with the context full.

    `new_tokens` counts the first token and a stop token; `seconds` is the whole run, prefill included,
    without the time a consumer spent between events.
    """

    reason: FinishReason
    new_tokens: int
    steps: int
    seconds: float


Event: TypeAlias = Prefill | Step | Finish
