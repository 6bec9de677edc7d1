"""The few numbers kept with a reply and the footer they make; refuses to know events, widgets and markup."""

from collections.abc import Mapping
from typing import Any

from app.stats import RunStats, modelled_speedup

# Fewer passes say too little about a draft to judge it.
JUDGED_STEPS = 8
PAYS_FROM = 1.02

_REASONS = {"length": "length limit reached", "context": "context full", "stopped": "stopped", "failed": "broken off"}


def summary(stats: RunStats, *, pair: str, drafting: bool, ended: str, baseline_seconds: float | None) -> dict[str, Any]:
    """What a message keeps of its run: plain JSON values, None where a number is not known.

    `ended` is stop, length, context, stopped or failed; `baseline_seconds` one plain pass takes on this machine.
    """
    return {
        "pair": pair,
        "drafting": drafting,
        "ended": ended,
        "new_tokens": stats.new_tokens,
        "tokens_per_second": stats.tokens_per_second,
        "first_token_seconds": stats.time_to_first_token_seconds,
        "tau": stats.tau if drafting else None,
        "accepted": stats.accepted,
        "drafted": stats.drafted,
        "steps": stats.steps,
        "speedup": _speedup(stats, baseline_seconds) if drafting else None,
    }


def footer(summary: Mapping[str, Any] | None) -> dict[str, str]:
    """`text` and, when drafting did not pay, `warning`; both plain text. Tolerates a summary from an imported file."""
    if not summary:
        return {"text": "", "warning": ""}
    number = _reader(summary)
    parts = [
        _part(number("tokens_per_second"), "{:.1f} tok/s"),
        _part(number("first_token_seconds"), "first token {:.2f} s"),
        _part(number("tau"), "τ {:.2f}"),
        _accepted(number("accepted"), number("drafted")) if summary.get("drafting") else "plain decoding",
        _REASONS.get(str(summary.get("ended")), ""),
    ]
    return {"text": " · ".join(part for part in parts if part), "warning": _warning(summary, number)}


def _speedup(stats: RunStats, baseline_seconds: float | None) -> float | None:
    if baseline_seconds is None or stats.tau is None or not stats.drafted:
        return None
    return modelled_speedup(
        stats.tau, baseline_seconds, stats.draft_seconds / stats.steps, stats.verify_seconds / stats.steps
    )


def _warning(summary: Mapping[str, Any], number: Any) -> str:
    speedup, steps = number("speedup"), number("steps")
    if speedup is None or steps is None or steps < JUDGED_STEPS or speedup >= PAYS_FROM:
        return ""
    return (
        f"Drafting did not pay here: about {speedup:.2f}× the speed of plain decoding. "
        "Turn drafting off, or try a smaller block size."
    )


def _reader(summary: Mapping[str, Any]) -> Any:
    def number(key: str) -> float | None:
        value = summary.get(key)
        return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None

    return number


def _part(value: float | None, form: str) -> str:
    return "" if value is None else form.format(value)


def _accepted(accepted: float | None, drafted: float | None) -> str:
    if not drafted or accepted is None:
        return ""
    return f"{accepted:.0f}/{drafted:.0f} drafted tokens accepted ({accepted / drafted:.0%})"
