"""What a finished race says: the verdict in sentences, its table and its files; measures and draws nothing."""

import csv
import io
import json
from dataclasses import dataclass
from typing import Any, Literal

from app.race import Difference, LaneResult, Result, Spread
from app.trace import Trace, parse

# A speed-up inside this band of 1 is no difference worth a claim.
EVEN = 0.03


@dataclass(frozen=True, slots=True)
class Verdict:
    """`factor` is the big number, `headline` the claim with it, `basis` how often and how far apart it was measured."""

    tone: Literal["faster", "slower", "even"]
    factor: str
    headline: str
    basis: str
    tau: str
    identity: str
    identity_tone: Literal["same", "rounding", "differs", "unknown"]


def verdict(result: Result) -> Verdict:
    leader = result.leader
    speedup = leader.speedup
    tone = _tone(speedup.low, speedup.median, speedup.high)
    name = leader.lane.label.split(",")[0].removesuffix(" (transformers)")
    claim = {
        "faster": f"{name} was {speedup.median:.2f} times as fast as plain decoding.",
        "slower": f"{name} was slower here: {speedup.median:.2f} times the speed of plain decoding.",
        "even": f"{name} and plain decoding were about equally fast.",
    }[tone]
    words, identity_tone = identity(leader, result)
    return Verdict(tone, f"{speedup.median:.2f}×", claim, basis(leader), _tau(leader), words, identity_tone)


def _tone(low: float, median: float, high: float) -> Literal["faster", "slower", "even"]:
    """A claim needs the whole spread on its side."""
    if median > 1 + EVEN and low > 1:
        return "faster"
    return "slower" if median < 1 - EVEN and high < 1 else "even"


def basis(entry: LaneResult) -> str:
    spread, repeats = entry.speedup, len(entry.laps)
    return f"Median of {repeats} repeats, {spread.low:.2f}× to {spread.high:.2f}×" if repeats > 1 else "One repeat only"


def _tau(entry: LaneResult) -> str:
    if entry.tau is None:
        return ""
    rate = "" if entry.acceptance_rate is None else f", {entry.acceptance_rate:.0%} of the drafted tokens accepted"
    return f"{entry.tau:.2f} tokens per verify pass (τ){rate}"


def identity(entry: LaneResult, result: Result) -> tuple[str, Literal["same", "rounding", "differs", "unknown"]]:
    """Whether a lane wrote what plain decoding wrote, in a sentence and as a tone."""
    if not entry.compared:
        return "Sampled with other random numbers: the replies are not compared.", "unknown"
    found = entry.difference
    if found is None:
        return f"Identical output: all {len(entry.laps[0].ids):,} tokens are the same.", "same"
    start = f"The replies differ from token {found.position + 1} on: {_choices(entry, result, found)}"
    return f"{start} {_reason(found)}", "rounding" if found.kind == "rounding" else "differs"


def _choices(entry: LaneResult, result: Result, found: Difference) -> str:
    plain, other = (_piece(parse(each.laps[0].ndjson), found.position) for each in (result.plain, entry))
    if found.plain_token is None:
        return f"plain decoding had ended, this lane went on with {other}."
    if found.token is None:
        return f"plain decoding went on with {plain}, this lane had ended."
    return f"plain decoding wrote {plain}, this lane {other}."


def _reason(found: Difference) -> str:
    if found.logit_gap is None:
        return "How close the two choices were was not measured."
    gap = f"The target's logits for the two are {found.logit_gap:.3f} apart"
    if found.kind == "rounding":
        return f"{gap}: a tie that rounding decides, not a different model."
    tail = (
        "more than rounding explains, so please report it"
        if found.kind == "suspect"
        else "larger than the usual rounding tie"
    )
    return f"{gap}: {tail}."


def _piece(trace: Trace, position: int) -> str:
    """The text of the reply's token at a position, in quotation marks."""
    pieces: list[str] = []
    for row in trace.rows:
        pieces += row["pieces"]["committed"] if "pieces" in row else [row["piece"]] if "piece" in row else []
    piece = pieces[position] if position < len(pieces) else ""
    shown = piece if piece.strip() else piece.replace("\n", "↵").replace("\t", "⇥").replace(" ", "␣")
    return f"‘{shown}’" if shown else "the end"


SPEEDS = ("tokens_per_second", "low", "high", "speedup", "speedup_low", "speedup_high")
HEAD = (
    "lane",
    *SPEEDS,
    "seconds",
    "first_token_seconds",
    "tokens",
    "tau",
    "accepted_per_drafted",
    "repeats",
    "identical",
    "first_difference",
    "logit_gap",
)


def speeds(rate: Spread, speedup: Spread) -> dict[str, float]:
    """The columns `SPEEDS`."""
    values = (each for spread in (rate, speedup) for each in (spread.median, spread.low, spread.high))
    return dict(zip(SPEEDS, values, strict=True))


def record(entry: LaneResult) -> dict[str, Any]:
    """One lane's numbers; None where one has no meaning or is not known."""
    lap, found = entry.shown, entry.difference
    return {
        "lane": entry.lane.label,
        **speeds(entry.tokens_per_second, entry.speedup),
        "seconds": lap.seconds,
        "first_token_seconds": lap.first_token_seconds,
        "tokens": len(lap.ids),
        "tau": entry.tau,
        "accepted_per_drafted": entry.acceptance_rate,
        "repeats": len(entry.laps),
        "identical": found is None if entry.compared else None,
        "first_difference": None if found is None else found.position,
        "logit_gap": None if found is None else found.logit_gap,
    }


def as_json(result: Result) -> str:
    """Every lap's numbers; the replies' ids, so that anyone can compare them again."""
    lanes = [
        record(entry)
        | {
            "laps": [
                {
                    "seconds": lap.seconds,
                    "first_token_seconds": lap.first_token_seconds,
                    "steps": lap.steps,
                    "ids": list(lap.ids),
                }
                for lap in entry.laps
            ]
        }
        for entry in result.lanes
    ]
    return (
        json.dumps(
            {"format": "dflash-race", "version": 1, **result.facts, "lanes": lanes}, indent=2, ensure_ascii=False
        )
        + "\n"
    )


def as_csv(rows: list[dict[str, Any]], head: tuple[str, ...] = HEAD) -> str:
    """One line per row; an empty cell where a number is not known."""
    out = io.StringIO()
    writer = csv.DictWriter(out, head, lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _cell(row[key]) for key in head} for row in rows)
    return out.getvalue()


def _cell(value: Any) -> Any:
    if isinstance(value, str) and value[:1] in ("=", "+", "-", "@"):
        return f"'{value}"
    return "" if value is None else round(value, 6) if isinstance(value, float) else value
