"""What the race's part of the page is told, as plain JSON values; knows no widget and no markup."""

from typing import Any

from app.race import Lane, LaneResult, Result
from app.race_runs import Progress
from app.race_words import identity, verdict
from app.suites import ALL, SuiteProgress

EMPTY: dict[str, Any] = {"lanes": []}
SHORT = {"same": "same output", "rounding": "rounding tie", "differs": "other output", "unknown": "not compared"}


def race_view(result: Result) -> dict[str, Any]:
    """The verdict, and per lane the trace to replay and its numbers with their spread."""
    words, facts = verdict(result), result.facts
    sampling = (
        "temperature 0" if not facts["temperature"] else f"temperature {facts['temperature']:g}, seed {facts['seed']}"
    )
    return {
        "verdict": {
            "tone": words.tone,
            "factor": words.factor,
            "headline": words.headline,
            "basis": words.basis,
            "tau": words.tau,
            "identity": words.identity,
            "identityTone": words.identity_tone,
        },
        "prompt": facts["prompt"],
        "facts": " · ".join(
            (facts["pair"], facts["device"], facts["dtype"], sampling, f"at most {facts['max_new_tokens']} tokens")
        ),
        "repeats": result.repeats,
        "lanes": [_lane(entry, result) for entry in result.lanes],
    }


def _lane(entry: LaneResult, result: Result) -> dict[str, Any]:
    rate, speedup, lap = entry.tokens_per_second, entry.speedup, entry.shown
    plain = entry is result.plain
    sentence, tone = ("", "") if plain else identity(entry, result)
    return {
        "key": entry.lane.key,
        "label": entry.lane.label,
        "kind": entry.lane.kind,
        "ndjson": lap.ndjson,
        "tokens": len(lap.ids),
        "seconds": lap.seconds,
        "seconds_all": [one.seconds for one in entry.laps],
        "rate": f"{rate.median:.1f}",
        "rateSpread": f"{rate.low:.1f}–{rate.high:.1f}",
        "speedup": "" if plain else f"{speedup.median:.2f}×",
        "speedupSpread": "" if plain else f"{speedup.low:.2f}–{speedup.high:.2f}",
        "tau": None if entry.tau is None else f"{entry.tau:.2f}",
        "accepted": None if entry.acceptance_rate is None else f"{entry.acceptance_rate:.0%}",
        "firstToken": f"{lap.first_token_seconds * 1000:.0f} ms",
        "same": "" if plain else SHORT[tone],
        "sameTone": tone,
        "sentence": sentence,
        "steady": entry.steady,
        "differsAt": None if entry.difference is None else entry.difference.position,
    }


def progress_view(told: Progress, lanes: tuple[Lane, ...], repeats: int, before: str = "") -> dict[str, Any]:
    """Which laps are run, and the one being run in words."""
    if told.lane is None:
        words = "Warming up: a few tokens in every lane." if told.done == 0 else "Comparing the replies."
    elif told.ahead:
        words = f"Waiting: {told.ahead} {'run' if told.ahead == 1 else 'runs'} of others first."
    else:
        words = f"{told.lane.label}, repeat {told.repeat + 1} of {repeats}: {told.tokens} tokens"
    return {
        "text": before + words,
        "done": told.done,
        "laps": told.laps,
        "lanes": [lane.label for lane in lanes],
        "running": None if told.lane is None else told.lane.label,
        "repeats": repeats,
    }


def suite_progress_view(told: SuiteProgress, lanes: tuple[Lane, ...], repeats: int) -> dict[str, Any]:
    view = progress_view(
        told.race, lanes, repeats, f"Prompt {told.done + 1} of {told.prompts} ({told.prompt.category}). "
    )
    return view | {"done": told.done * view["laps"] + view["done"], "laps": told.prompts * view["laps"]}


TABLE_HEAD = ("Prompts", "Lane", "Tokens/s", "Spread", "Speed-up", "Spread", "τ", "Accepted", "Same output")


def table_rows(rows: list[dict[str, Any]]) -> list[list[str]]:
    """A suite's table for people."""
    return [
        [
            "all" if row["category"] == ALL else row["category"],
            row["lane"],
            f"{row['tokens_per_second']:.1f}",
            f"{row['low']:.1f}–{row['high']:.1f}",
            f"{row['speedup']:.2f}×",
            f"{row['speedup_low']:.2f}–{row['speedup_high']:.2f}",
            "–" if row["tau"] is None else f"{row['tau']:.2f}",
            "–" if row["accepted_per_drafted"] is None else f"{row['accepted_per_drafted']:.0%}",
            _same(row),
        ]
        for row in rows
    ]


def _same(row: dict[str, Any]) -> str:
    if row["compared"] is None:
        return "–"
    ties = row["rounding_ties"]
    return f"{row['identical']}/{row['compared']}" + (
        f" (+{ties} rounding {'tie' if ties == 1 else 'ties'})" if ties else ""
    )
