"""Many built-in prompts through the same lanes: which ones, the race of each, sums by category; draws nothing."""

import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from app.desk import Desk
from app.race import Lane, LaneResult, Lap, Result, Spread
from app.race_runs import Progress, Request, race
from app.race_words import SPEEDS, record, speeds

FILE = Path(__file__).resolve().parent.parent / "assets" / "prompts.jsonl"
CATEGORIES = ("chat", "maths", "code", "summary", "translation")
HEAD = (
    "category",
    "lane",
    "prompts",
    *SPEEDS,
    "tau",
    "accepted_per_drafted",
    "identical",
    "rounding_ties",
    "compared",
    "repeats",
)
ALL = "all"


@dataclass(frozen=True, slots=True)
class Prompt:
    category: str
    text: str


@cache
def built_in() -> tuple[Prompt, ...]:
    """The prompts that ship with the app, in their file's order."""
    rows = map(json.loads, FILE.read_text(encoding="utf-8").splitlines())
    return tuple(Prompt(row["category"], row["messages"][-1]["content"]) for row in rows)


def pick(categories: Sequence[str], each: int) -> tuple[Prompt, ...]:
    """The first `each` prompts of every category asked for."""
    return tuple(
        prompt
        for name in CATEGORIES
        if name in categories
        for prompt in [p for p in built_in() if p.category == name][:each]
    )


@dataclass(frozen=True, slots=True)
class SuiteProgress:
    """The race being run: its prompt, how many came before, and where it stands itself."""

    done: int
    prompts: int
    prompt: Prompt
    race: Progress


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """The race of every prompt, in order."""

    prompts: tuple[Prompt, ...]
    races: tuple[Result, ...]

    @property
    def facts(self) -> Mapping[str, Any]:
        return {key: value for key, value in self.races[0].facts.items() if key != "prompt"}

    @property
    def lanes(self) -> tuple[Lane, ...]:
        return tuple(entry.lane for entry in self.races[0].lanes)

    def of(self, category: str) -> tuple[Result, ...]:
        pairs = zip(self.prompts, self.races, strict=True)
        return tuple(result for prompt, result in pairs if category in (ALL, prompt.category))


def suite(
    desk: Desk, request: Request, lanes: Sequence[Lane], prompts: Sequence[Prompt], repeats: int
) -> Iterator[SuiteProgress | SuiteResult]:
    """Race every prompt; the last value is the `SuiteResult`. `request` brings the system message, if any."""
    races: list[Result] = []
    for done, prompt in enumerate(prompts):
        own = replace(request, messages=(*request.messages, {"role": "user", "content": prompt.text}))
        for told in race(desk, own, lanes, repeats):
            if isinstance(told, Result):
                races.append(told)
            else:
                yield SuiteProgress(done, len(prompts), prompt, told)
    yield SuiteResult(tuple(prompts), tuple(races))


def table(result: SuiteResult) -> list[dict[str, Any]]:
    """One row per category and lane, and one per lane over all prompts when there are several categories."""
    names = [name for name in CATEGORIES if result.of(name)]
    names += [ALL] if len(names) > 1 else []
    return [_row(name, result.of(name), index) for name in names for index in range(len(result.lanes))]


def _row(category: str, races: Sequence[Result], index: int) -> dict[str, Any]:
    entries = [result.lanes[index] for result in races]
    differences = [entry.difference for entry in entries if entry.difference is not None]
    compared = sum(entry.compared for entry in entries)
    drafted = sum(lap.drafted for entry in entries for lap in entry.laps)
    known = entries[0].lane.kind == "dflash" and drafted
    return {
        "category": category,
        "lane": entries[0].lane.label,
        "prompts": len(entries),
        **speeds(Spread(tuple(_rates(entries))), _speedup(races, index)),
        "tau": _tau(entries),
        "accepted_per_drafted": sum(lap.accepted for e in entries for lap in e.laps) / drafted if known else None,
        "identical": compared - len(differences) if compared else None,
        "rounding_ties": sum(found.kind == "rounding" for found in differences) if compared else None,
        "compared": compared or None,
        "repeats": len(entries[0].laps),
    }


def _rates(entries: Sequence[LaneResult]) -> list[float]:
    """Tokens per second over all prompts, one number per repeat."""
    repeats: list[Sequence[Lap]] = list(zip(*(entry.laps for entry in entries), strict=True))
    return [sum(len(lap.ids) for lap in laps) / sum(lap.seconds for lap in laps) for laps in repeats]


def _speedup(races: Sequence[Result], index: int) -> Spread:
    plain, own = (_rates([result.lanes[i] for result in races]) for i in (0, index))
    return Spread(tuple(mine / theirs for mine, theirs in zip(own, plain, strict=True)))


def _tau(entries: Sequence[LaneResult]) -> float | None:
    if entries[0].lane.kind == "plain":
        return None
    committed = [len(lap.ids) - 1 for entry in entries for lap in entry.laps]
    steps = [lap.steps for entry in entries for lap in entry.laps]
    return statistics.fsum(committed) / sum(steps) if sum(steps) else None


def as_json(result: SuiteResult) -> str:
    """The table and every prompt's own numbers."""
    prompts = [
        {"category": prompt.category, "prompt": prompt.text, "lanes": [record(entry) for entry in one.lanes]}
        for prompt, one in zip(result.prompts, result.races, strict=True)
    ]
    told = {"format": "dflash-suite", "version": 1, **result.facts, "table": table(result), "prompts": prompts}
    return json.dumps(told, indent=2, ensure_ascii=False) + "\n"
