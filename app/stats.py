"""Numbers of one run as pure folds over its events; refuses to know text, screens and clocks.

Acceptance length τ is committed tokens per verify pass; accepted/drafted is a separate rate.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import TypeAlias

from dflash_core import Finish, Prefill, Step

Event: TypeAlias = Prefill | Step | Finish


@dataclass(frozen=True, slots=True)
class RunStats:
    """Totals after some events. Counts start at 0; what is not yet known is None.

    offered, kept      per position 1..k: steps that drafted it, steps that accepted it
    accepted_lengths   index a = number of steps that accepted exactly a drafted tokens
    total_seconds      the whole run as `Finish` reports it, None before
    """

    prompt_tokens: int = 0
    prefill_seconds: float | None = None
    new_tokens: int = 0
    steps: int = 0
    committed: int = 0
    drafted: int = 0
    accepted: int = 0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    total_seconds: float | None = None
    reason: str | None = None
    offered: tuple[int, ...] = ()
    kept: tuple[int, ...] = ()
    accepted_lengths: tuple[int, ...] = ()

    @property
    def tau(self) -> float | None:
        """Acceptance length: committed tokens per verify pass, the bonus counted."""
        return self.committed / self.steps if self.steps else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted tokens, 0..1; None for the baseline, which drafts nothing."""
        return self.accepted / self.drafted if self.drafted else None

    @property
    def acceptance_by_position(self) -> tuple[float, ...]:
        """For position 1..k: the share of steps offering it that accepted it."""
        return tuple(kept / offered for kept, offered in zip(self.kept, self.offered))

    @property
    def decode_seconds(self) -> float:
        """Time after the prefill; before the end only what the steps measured."""
        if self.total_seconds is not None:
            return self.total_seconds - (self.prefill_seconds or 0.0)
        return self.draft_seconds + self.verify_seconds

    @property
    def other_seconds(self) -> float | None:
        """Time after the prefill that was neither drafting nor verifying; None before the end."""
        if self.total_seconds is None:
            return None
        return max(0.0, self.decode_seconds - self.draft_seconds - self.verify_seconds)

    @property
    def tokens_per_second(self) -> float | None:
        """Tokens after the first one, per second after the prefill."""
        return self.committed / self.decode_seconds if self.steps and self.decode_seconds > 0 else None

    @property
    def time_to_first_token_seconds(self) -> float | None:
        """The prefill, which also chooses the first token."""
        return self.prefill_seconds


def add(stats: RunStats, event: Event) -> RunStats:
    """The totals after one more event."""
    if isinstance(event, Prefill):
        return replace(stats, prompt_tokens=event.prompt_tokens, prefill_seconds=event.seconds, new_tokens=1)
    if isinstance(event, Finish):
        return replace(stats, total_seconds=event.seconds, reason=event.reason)
    return _add_step(stats, event)


def summarise(events: Iterable[Event]) -> RunStats:
    """The totals of a whole run, or of as much of it as there is."""
    return reduce(add, events, RunStats())


def _add_step(stats: RunStats, step: Step) -> RunStats:
    k = len(step.drafted)
    return replace(
        stats,
        steps=stats.steps + 1,
        new_tokens=stats.new_tokens + len(step.committed),
        committed=stats.committed + len(step.committed),
        drafted=stats.drafted + k,
        accepted=stats.accepted + step.accepted,
        draft_seconds=stats.draft_seconds + step.draft_seconds,
        verify_seconds=stats.verify_seconds + step.verify_seconds,
        offered=_bump(stats.offered, range(k)),
        kept=_bump(stats.kept, range(step.accepted), k),
        accepted_lengths=_bump(stats.accepted_lengths, (step.accepted,), k + 1),
    )


def _bump(counts: tuple[int, ...], positions: Iterable[int], at_least: int = 0) -> tuple[int, ...]:
    chosen = set(positions)
    size = max(len(counts), at_least, *(p + 1 for p in chosen)) if chosen else max(len(counts), at_least)
    return tuple((counts[i] if i < len(counts) else 0) + (i in chosen) for i in range(size))


def committed_per_step(events: Iterable[Event]) -> list[int]:
    """How many tokens each verify pass committed, in order."""
    return [len(event.committed) for event in events if isinstance(event, Step)]


def running_mean(values: Iterable[float]) -> list[float]:
    """The mean of all values so far, one per value."""
    total, means = 0.0, []
    for count, value in enumerate(values, 1):
        total += value
        means.append(total / count)
    return means


def tokens_over_time(events: Iterable[Event]) -> tuple[list[float], list[int]]:
    """Measured seconds since the start and reply tokens there by then, one point per event that commits tokens."""
    seconds, tokens, clock, count = [0.0], [0], 0.0, 0
    for event in events:
        if isinstance(event, Finish):
            continue
        clock += event.seconds if isinstance(event, Prefill) else event.draft_seconds + event.verify_seconds
        count += 1 if isinstance(event, Prefill) else len(event.committed)
        seconds.append(clock)
        tokens.append(count)
    return seconds, tokens


def modelled_speedup(tau: float, baseline_seconds: float, draft_seconds: float, verify_seconds: float) -> float:
    """τ · t_baseline / (t_draft + t_verify), each time in seconds per pass; above 1 drafting pays."""
    return tau * baseline_seconds / (draft_seconds + verify_seconds)
