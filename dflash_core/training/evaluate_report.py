"""Turns decoded replies into an evaluation's numbers (JSON, version 1) and into tables; decodes nothing."""

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from dflash_core.bench_report import grid, shown
from dflash_core.tally import Tally

if TYPE_CHECKING:
    from dflash_core.training.evaluate import Reply
    from dflash_core.training.walk import Score

VERSION = 1
# Teacher forcing and the loop differ by near-ties alone; more than this is a bug in one of them.
AGREEMENT_PERCENT = 2.0


def measured(replies: Sequence["Reply"]) -> dict[str, Any]:
    """The numbers of some replies; None where there is no pass to count.

    tau                        committed tokens per verify pass; `tau_error` its standard error over prompts
    tau_opening, tau_later     the same for passes whose anchor is one of a reply's first 64 tokens, and for the rest
    accepted_by_position       how often drafted slot 1..k was accepted
    accepted_given_earlier     the same among the blocks whose earlier slots were all accepted
    """
    total = Tally().merge(reply.tally for reply in replies)
    reached = sum((reply.reached_at for reply in replies), Counter())
    return {
        "prompts": len(replies),
        "new_tokens": total.new_tokens,
        "passes": total.steps,
        "tau": total.tau,
        "tau_error": _tau_error(replies, total),
        "tau_opening": Tally().merge(reply.opening for reply in replies).tau,
        "tau_later": Tally().merge(reply.later for reply in replies).tau,
        "accepted": total.accepted,
        "drafted": total.drafted,
        "accepted_per_drafted": total.accepted_rate,
        "accepted_by_position": total.accepted_by_position,
        "accepted_given_earlier": [
            accepted / reached[slot] if reached[slot] else None for slot, accepted in enumerate(total.accepted_at)
        ],
        "tokens_per_second": total.tokens_per_second,
    }


def _tau_error(replies: Sequence["Reply"], total: Tally) -> float | None:
    """Standard error of a ratio of sums whose terms are prompts."""
    if total.tau is None or len(replies) < 2:
        return None
    squares = sum((reply.tally.committed - total.tau * reply.tally.steps) ** 2 for reply in replies)
    return math.sqrt(squares * len(replies) / (len(replies) - 1)) / total.steps


def with_teacher_forcing(result: Mapping[str, Any], walked: "Score") -> dict[str, Any]:
    """Add what teacher forcing found, and by how many percent it differs from the loop."""

    def beside(loop: float | None, tau: float | None) -> dict[str, Any]:
        return {"tau": tau, "difference_percent": 100.0 * (tau / loop - 1.0) if tau and loop else None}

    whole = beside(result["tau"], walked.overall.tau)
    whole |= {"tau_opening": walked.opening.tau, "tau_later": walked.later.tau, "match_by_slot": list(walked.match)}
    whole["agrees"] = abs(whole["difference_percent"]) <= AGREEMENT_PERCENT
    categories = {
        name: entry | {"teacher_forced": beside(entry["tau"], walked.categories[name].tau)}
        if name in walked.categories
        else entry
        for name, entry in result["by_category"].items()
    }
    return {**result, "by_category": categories, "teacher_forced": whole}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    yield f"{report['pair']} on {report['device']} in {report['dtype']}"
    yield f"{report['prompts']} prompts, at most {report['max_new_tokens']} new tokens each"
    yield "τ: committed tokens per verify pass, ± one standard error over prompts"
    for result in report["results"]:
        yield ""
        yield f"temperature {result['temperature']:g}, blocks of {result['block_size']}" + (
            f", acceptance by {report['acceptance']}" if result["temperature"] else ""
        )
        rows = [*result["by_category"].items(), ("all", result)]
        yield from grid([_HEAD, *([name, *_cells(entry)] for name, entry in rows)])
        yield from _details(result)


_HEAD = [
    "category", "prompts", "passes", "τ", "±", "first 64", "after", "accepted/drafted", "teacher forced", "differs",
    "tokens/s",
]  # fmt: skip


def _cells(entry: Mapping[str, Any]) -> list[str]:
    walked = entry.get("teacher_forced", {})
    return [
        str(entry["prompts"]),
        str(entry["passes"]),
        shown(entry["tau"], ".3f"),
        shown(entry["tau_error"], ".3f"),
        shown(entry["tau_opening"], ".2f"),
        shown(entry["tau_later"], ".2f"),
        shown(entry["accepted_per_drafted"], ".1%"),
        shown(walked.get("tau"), ".3f"),
        shown(walked.get("difference_percent"), "+.2f", " %"),
        shown(entry["tokens_per_second"], ".1f"),
    ]


def _details(result: Mapping[str, Any]) -> Iterator[str]:
    if result["accepted_by_position"]:
        yield "accepted by position   " + " ".join(f"{rate:4.0%}" for rate in result["accepted_by_position"])
        given = (shown(rate, ".0%") for rate in result["accepted_given_earlier"])
        yield "given all before it    " + " ".join(f"{rate:>4}" for rate in given)
    if "not_teacher_forced" in result:
        yield f"Not teacher forced: {result['not_teacher_forced']}"
    elif not result.get("teacher_forced", {"agrees": True})["agrees"]:
        yield f"The loop and teacher forcing differ by more than {AGREEMENT_PERCENT:g} %: one of them is wrong."
