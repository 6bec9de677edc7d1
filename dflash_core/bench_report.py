"""Turns measured runs into the bench's numbers (JSON, version 1) and into a table; runs and measures nothing."""

import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any, TypeAlias

from dflash_core.bench_methods import Method, Run
from dflash_core.tally import Tally

VERSION = 1
# Below the first a difference is rounding, from the second on it is a bug (bfloat16 logits of one and of many tokens).
ROUNDING_LOGITS, SUSPECT_LOGITS = 0.25, 0.6

# runs[repeat][prompt]
Runs: TypeAlias = Sequence[Sequence[Run]]


@dataclass(frozen=True, slots=True)
class Difference:
    """Where one reply first leaves the baseline's: reply position, the two tokens (None where a reply had ended)."""

    prompt: int
    position: int
    ar_token: int | None
    token: int | None
    logit_gap: float | None = None

    @property
    def verdict(self) -> str:
        if self.logit_gap is None:
            return "length differs"
        if self.logit_gap <= ROUNDING_LOGITS:
            return "rounding"
        return "suspect" if self.logit_gap >= SUSPECT_LOGITS else "unclear"


def first_difference(prompt: int, reference: Sequence[int], other: Sequence[int]) -> Difference | None:
    """Compare two replies; None when they are the same."""
    if tuple(reference) == tuple(other):
        return None
    same = zip(reference, other, strict=False)
    position = next((i for i, (a, b) in enumerate(same) if a != b), min(len(reference), len(other)))
    one, two = (reply[position] if position < len(reply) else None for reply in (reference, other))
    return Difference(prompt, position, one, two)


def method_report(
    method: Method,
    runs: Mapping[str, Runs],
    categories: Sequence[str | None],
    differences: Sequence[Difference] | None,
) -> dict[str, Any]:
    """One method's entry in the JSON. `differences` is None where replies cannot be compared with the baseline's."""
    own = runs[method.name]
    report = _speed(method.name, runs) | _memory(own)
    if method.kind not in ("ar", "hf-generate"):
        report |= _acceptance(own)
    if method.kind == "dflash":
        report |= _split(own)
    prompts = len(own[0])
    report["identical"] = None if differences is None else prompts - len(differences)
    report["compared"] = None if differences is None else prompts
    report["differences"] = [asdict(d) | {"verdict": d.verdict} for d in differences or ()]
    report["by_category"] = {
        name: _category(method, runs, [i for i, c in enumerate(categories) if c == name], differences)
        for name in sorted({c for c in categories if c is not None})
    }
    return report


def _category(
    method: Method, runs: Mapping[str, Runs], indices: Sequence[int], differences: Sequence[Difference] | None
) -> dict[str, Any]:
    picked = {name: [[repeat[i] for i in indices] for repeat in own] for name, own in runs.items()}
    report = {"prompts": len(indices)} | _speed(method.name, picked)
    if method.kind not in ("ar", "hf-generate"):
        report["tau"] = _tau(picked[method.name])
    report["identical"] = None if differences is None else len(indices) - sum(d.prompt in indices for d in differences)
    return report


def _speed(name: str, runs: Mapping[str, Runs]) -> dict[str, Any]:
    rates = _rates(runs[name])
    speedups = {f"speedup_vs_{other.replace('-', '_')}": None for other in ("ar", "hf-generate")}
    for other in ("ar", "hf-generate"):
        if other in runs:
            # Methods alternate, so the ratio within a repeat is freer of the machine's moods than the ratio of medians.
            ratios = [mine / theirs for mine, theirs in zip(rates, _rates(runs[other]), strict=True)]
            speedups[f"speedup_vs_{other.replace('-', '_')}"] = statistics.median(ratios)
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_low": min(rates),
        "tokens_per_second_high": max(rates),
        "ms_per_token": 1000.0 / statistics.median(rates),
        "first_token_seconds": statistics.median(run.first_token_seconds for repeat in runs[name] for run in repeat),
        "new_tokens": sum(len(run.ids) for run in runs[name][0]),
        **speedups,
    }


def _rates(runs: Runs) -> list[float]:
    """Tokens per second of each repeat."""
    return [sum(len(run.ids) for run in repeat) / sum(run.seconds for run in repeat) for repeat in runs]


def _tau(runs: Runs) -> float | None:
    """Tokens per verify pass; the prefill is none."""
    commits = [count for repeat in runs for run in repeat for count in run.commits[1:]]
    return statistics.mean(commits) if commits else None


def _acceptance(runs: Runs) -> dict[str, Any]:
    report: dict[str, Any] = {"tau": _tau(runs), "passes": sum(len(run.commits) - 1 for run in runs[0])}
    tallies = [run.tally for run in runs[0] if run.tally is not None]
    total = Tally().merge(tallies)
    known = bool(tallies)
    return report | {
        "accepted": total.accepted if known else None,
        "drafted": total.drafted if known else None,
        "accepted_per_drafted": total.accepted_rate if known else None,
        "acceptance_by_position": total.accepted_by_position if known else None,
    }


def _split(runs: Runs) -> dict[str, Any]:
    """Where the seconds of one pass over all prompts went; medians over the repeats."""
    totals = [Tally().merge(run.tally for run in repeat if run.tally) for repeat in runs]
    walls = [sum(run.seconds for run in repeat) for repeat in runs]
    parts = {
        name: [getattr(total, name) for total in totals]
        for name in ("prefill_seconds", "draft_seconds", "verify_seconds")
    }
    parts["other_seconds"] = [
        w - t.prefill_seconds - t.draft_seconds - t.verify_seconds for w, t in zip(walls, totals, strict=True)
    ]
    return {name: statistics.median(values) for name, values in parts.items()}


def _memory(runs: Runs) -> dict[str, Any]:
    peaks = [run.peak_bytes for repeat in runs for run in repeat if run.peak_bytes is not None]
    return {"peak_memory_bytes": max(peaks, default=None)}


def table(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people, line by line."""
    methods = report["methods"]
    yield f"{report['pair']} on {report['device']} in {report['dtype']}, temperature {report['temperature']:g}"
    yield f"{report['prompts']} prompts x {report['repeats']} repeats, at most {report['max_new_tokens']} new tokens"
    yield "tokens/s: median (lowest-highest) of the repeats"
    yield ""
    yield from grid([_HEAD, *([name, *_cells(entry)] for name, entry in methods.items())])
    yield from _categories(methods)
    yield from _details(methods)
    if report["peak_memory_bytes"]:
        yield f"peak memory {report['peak_memory_bytes'] / 2**20:,.0f} MiB"


_HEAD = ["method", "tokens/s", "ms/token", "first ms", "τ", "accepted/drafted", "vs ar", "vs hf-generate", "same as ar"]


def _cells(entry: Mapping[str, Any]) -> list[str]:
    low, high = entry["tokens_per_second_low"], entry["tokens_per_second_high"]
    compared = entry["compared"]
    return [
        f"{entry['tokens_per_second']:.1f} ({low:.1f}-{high:.1f})",
        f"{entry['ms_per_token']:.1f}",
        f"{entry['first_token_seconds'] * 1000:.0f}",
        shown(entry.get("tau"), ".2f"),
        shown(entry.get("accepted_per_drafted"), ".1%"),
        shown(entry["speedup_vs_ar"], ".2f", "x"),
        shown(entry["speedup_vs_hf_generate"], ".2f", "x"),
        "-" if compared is None else f"{entry['identical']}/{compared}",
    ]


def _categories(methods: Mapping[str, Any]) -> Iterator[str]:
    names = list(next(iter(methods.values()))["by_category"])
    if not names:
        return
    yield ""
    rows = [["category", *methods]]
    for name in names:
        entries = [entry["by_category"][name] for entry in methods.values()]
        rows.append([name, *(f"{e['tokens_per_second']:.1f}{_note(e)}" for e in entries)])
    yield from grid(rows)


def _note(entry: Mapping[str, Any]) -> str:
    """Speedup and τ behind a category's tokens/s."""
    parts = [shown(entry["speedup_vs_ar"], ".2f", "x")] if entry["speedup_vs_ar"] is not None else []
    parts += [f"τ {entry['tau']:.2f}"] if entry.get("tau") is not None else []
    return f" ({', '.join(parts)})" if parts else ""


def _details(methods: Mapping[str, Any]) -> Iterator[str]:
    yield ""
    for name, entry in methods.items():
        if entry.get("acceptance_by_position"):
            yield f"{name}: accepted by position " + " ".join(f"{rate:.0%}" for rate in entry["acceptance_by_position"])
        if "draft_seconds" in entry:
            parts = ("prefill", "draft", "verify", "other")
            yield f"{name}: seconds " + ", ".join(f"{part} {entry[f'{part}_seconds']:.2f}" for part in parts)
        for d in entry["differences"]:
            yield f"{name}: prompt {d['prompt']} leaves ar at token {d['position']}: {d['verdict']}" + (
                "" if d["logit_gap"] is None else f", logit gap {d['logit_gap']:.3f}"
            )


def shown(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def grid(rows: Sequence[Sequence[str]]) -> Iterator[str]:
    """Left-aligned first column, right-aligned numbers."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    for row in rows:
        numbers = (cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True))
        yield "  ".join([row[0].ljust(widths[0]), *numbers]).rstrip()
