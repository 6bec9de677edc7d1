"""Adds up the events of one run or of many; knows no clock, no text and no table."""

from collections.abc import Iterable
from dataclasses import dataclass, field

from dflash_core.events import Event, Finish, Prefill, Step


@dataclass(slots=True)
class Tally:
    """Sums over events. A quotient that has no value yet is None, never 0."""

    new_tokens: int = 0
    steps: int = 0
    committed: int = 0
    accepted: int = 0
    drafted: int = 0
    first_token_seconds: float | None = None
    prefill_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    seconds: float = 0.0
    drafted_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def add(self, event: Event) -> None:
        match event:
            case Prefill():
                self.new_tokens += 1
                self.first_token_seconds = event.seconds
                self.prefill_seconds += event.seconds
                self.seconds += event.seconds
            case Step():
                self._add_step(event)
            case Finish():
                pass

    def merge(self, others: Iterable["Tally"]) -> "Tally":
        """Add other runs to this one; first-token times do not add up and stay this one's."""
        for other in others:
            for name in ("new_tokens", "steps", "committed", "accepted", "drafted"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
            for name in ("prefill_seconds", "draft_seconds", "verify_seconds", "seconds"):
                setattr(self, name, getattr(self, name) + getattr(other, name))
            self.drafted_at = _added(self.drafted_at, other.drafted_at)
            self.accepted_at = _added(self.accepted_at, other.accepted_at)
        return self

    @property
    def tau(self) -> float | None:
        """Acceptance length: committed tokens per verify pass, corrections and bonuses counted."""
        return _quotient(self.committed, self.steps)

    @property
    def accepted_rate(self) -> float | None:
        """Accepted per drafted token."""
        return _quotient(self.accepted, self.drafted)

    @property
    def tokens_per_second(self) -> float | None:
        """New tokens per second of the whole run, prefill included."""
        return _quotient(self.new_tokens, self.seconds)

    @property
    def accepted_by_position(self) -> list[float]:
        """For each drafted slot 1..k, how often it was accepted when it was drafted."""
        return [a / d for a, d in zip(self.accepted_at, self.drafted_at, strict=True)]

    def _add_step(self, step: Step) -> None:
        k = len(step.drafted)
        self.steps += 1
        self.new_tokens += len(step.committed)
        self.committed += len(step.committed)
        self.accepted += step.accepted
        self.drafted += k
        self.draft_seconds += step.draft_seconds
        self.verify_seconds += step.verify_seconds
        self.seconds += step.draft_seconds + step.verify_seconds
        self.drafted_at = _added(self.drafted_at, [1] * k)
        self.accepted_at = _added(self.accepted_at, [int(slot < step.accepted) for slot in range(k)])


def _added(left: list[int], right: list[int]) -> list[int]:
    size = max(len(left), len(right))
    left, right = left + [0] * (size - len(left)), right + [0] * (size - len(right))
    return [a + b for a, b in zip(left, right, strict=True)]


def _quotient(amount: float, per: float) -> float | None:
    return amount / per if per else None
