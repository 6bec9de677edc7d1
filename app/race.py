"""One prompt through several ways of decoding: the order of measuring, and what may be said of the numbers.

It refuses to know widgets, threads and models; a lane's laps come in as traces.
"""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from app.trace import Trace
from dflash_core import DFlashError, Prefill, Step

Kind: TypeAlias = Literal["plain", "dflash", "prompt-lookup", "hf-dflash"]

# Up to the first a difference is rounding, from the second on it is a bug: logits of one token against a block's.
ROUNDING_LOGITS, SUSPECT_LOGITS = 0.25, 0.6
PLAIN = "plain"


class RaceError(DFlashError):
    """A race cannot be run or was not finished."""


@dataclass(frozen=True, slots=True)
class Lane:
    """One way of decoding. `block_size` None takes the draft's own or has no meaning."""

    key: str
    label: str
    kind: Kind
    block_size: int | None = None

    @property
    def own_loop(self) -> bool:
        """Whether the app's own loop decodes it, so that the same seed draws the same random numbers."""
        return self.kind in ("plain", "dflash")


def catalogue(trained: int | None) -> dict[str, Lane]:
    """Every lane that a pair with this trained block size (None: no draft) can run, by key, plain decoding first."""
    lanes = [Lane(PLAIN, "Plain decoding", "plain")]
    if trained is not None:
        lanes.append(Lane("dflash", f"DFlash, block {trained}", "dflash", trained))
        lanes += [Lane(f"block-{k}", f"DFlash, block {k}", "dflash", k) for k in (4, 8, 16) if k < trained]
    lanes.append(Lane("prompt-lookup", "Prompt lookup (transformers)", "prompt-lookup"))
    if trained is not None:
        lanes.append(Lane("hf-dflash", "DFlash in transformers", "hf-dflash", trained))
    return {lane.key: lane for lane in lanes}


def chosen(trained: int | None, keys: Iterable[str]) -> tuple[Lane, ...]:
    """Plain decoding and the lanes asked for, in the catalogue's order. Raises `RaceError`."""
    wanted, known = {PLAIN, *keys}, catalogue(trained)
    lanes = tuple(lane for key, lane in known.items() if key in wanted)
    if len(lanes) < 2:
        raise RaceError(
            "There is nothing to race against.",
            "Only plain decoding is left." if trained else "This pair has no draft model.",
            "Choose another lane, or load a pair with a draft.",
        )
    return lanes


def schedule(lanes: Sequence[Lane], repeats: int) -> list[tuple[int, Lane]]:
    """(repeat, lane) in the order of measuring: each repeat starts one lane later, so that a machine that warms up or
    slows down treats all alike."""
    turns = [repeat % len(lanes) for repeat in range(repeats)]
    return [(repeat, lane) for repeat, turn in enumerate(turns) for lane in (*lanes[turn:], *lanes[:turn])]


@dataclass(frozen=True, slots=True)
class Spread:
    """Repeated measurements: never shown without how many there were and how far they lay apart."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def low(self) -> float:
        return min(self.values)

    @property
    def high(self) -> float:
        return max(self.values)

    def text(self, digits: int = 2, unit: str = "") -> str:
        """`2.41× (2.35–2.47)`."""
        return f"{self.median:.{digits}f}{unit} ({self.low:.{digits}f}–{self.high:.{digits}f})"


@dataclass(frozen=True, slots=True)
class Lap:
    """One measured reply. `seconds` is the whole run, prefill included, without the time a reader took."""

    ids: tuple[int, ...]
    seconds: float
    first_token_seconds: float
    steps: int
    drafted: int
    accepted: int
    ndjson: str

    @property
    def tokens_per_second(self) -> float:
        return len(self.ids) / self.seconds

    @property
    def tau(self) -> float | None:
        """Committed tokens per verify pass; the prefill is none."""
        return (len(self.ids) - 1) / self.steps if self.steps else None


def lap_of(trace: Trace) -> Lap:
    """A finished run as a lap. Raises `RaceError` for one that was cut short."""
    stats = trace.stats
    if not trace.complete or stats.total_seconds is None or stats.prefill_seconds is None:
        raise RaceError("The race was stopped.", "A lap was not finished.", "Start it again.")
    return Lap(
        ids=reply_ids(trace), seconds=stats.total_seconds, first_token_seconds=stats.prefill_seconds,
        steps=stats.steps, drafted=stats.drafted, accepted=stats.accepted, ndjson=trace.ndjson,
    )  # fmt: skip


def reply_ids(trace: Trace) -> tuple[int, ...]:
    ids: list[int] = []
    for event in trace.events:
        if isinstance(event, Prefill):
            ids.append(event.first_token)
        elif isinstance(event, Step):
            ids.extend(event.committed)
    return tuple(ids)


@dataclass(frozen=True, slots=True)
class Difference:
    """Where a reply first leaves plain decoding's: its position and both tokens, None where a reply had ended.

    `logit_gap` is how far apart the target's logits for the two tokens are there, None when it was not measured.
    """

    position: int
    plain_token: int | None
    token: int | None
    logit_gap: float | None = None

    @property
    def kind(self) -> Literal["rounding", "unclear", "suspect", "unmeasured"]:
        if self.logit_gap is None:
            return "unmeasured"
        if self.logit_gap <= ROUNDING_LOGITS:
            return "rounding"
        return "suspect" if self.logit_gap >= SUSPECT_LOGITS else "unclear"


def first_difference(plain: Sequence[int], other: Sequence[int]) -> Difference | None:
    """None when both replies are the same."""
    if tuple(plain) == tuple(other):
        return None
    shared = min(len(plain), len(other))
    position = next((i for i in range(shared) if plain[i] != other[i]), shared)
    one, two = (ids[position] if position < len(ids) else None for ids in (plain, other))
    return Difference(position, one, two)


@dataclass(frozen=True, slots=True)
class LaneResult:
    """All laps of one lane. `compared` says whether its reply must equal plain decoding's at all."""

    lane: Lane
    laps: tuple[Lap, ...]
    speedups: tuple[float, ...]
    compared: bool
    difference: Difference | None = None

    @property
    def tokens_per_second(self) -> Spread:
        return Spread(tuple(lap.tokens_per_second for lap in self.laps))

    @property
    def speedup(self) -> Spread:
        """Against plain decoding of the same repeat, which a machine's moods touch less than the ratio of medians."""
        return Spread(self.speedups)

    @property
    def shown(self) -> Lap:
        """The lap with the median time, the one to replay."""
        return sorted(self.laps, key=lambda lap: lap.seconds)[(len(self.laps) - 1) // 2]

    @property
    def tau(self) -> float | None:
        taus = [lap.tau for lap in self.laps if lap.tau is not None]
        return statistics.mean(taus) if taus and self.lane.kind != "plain" else None

    @property
    def acceptance_rate(self) -> float | None:
        """Accepted / drafted; None where it is not known, as transformers does not tell what it rejected."""
        drafted = sum(lap.drafted for lap in self.laps)
        known = self.lane.kind == "dflash" and drafted
        return sum(lap.accepted for lap in self.laps) / drafted if known else None

    @property
    def steady(self) -> bool:
        """Whether every repeat wrote the same reply."""
        return len({lap.ids for lap in self.laps}) == 1


@dataclass(frozen=True, slots=True)
class Result:
    """A finished race. `facts`: pair, device, dtype, prompt, temperature, max_new_tokens, seed; plain JSON values."""

    lanes: tuple[LaneResult, ...]
    facts: Mapping[str, Any]

    @property
    def repeats(self) -> int:
        return len(self.lanes[0].laps)

    @property
    def plain(self) -> LaneResult:
        return self.lanes[0]

    @property
    def leader(self) -> LaneResult:
        """The lane the verdict speaks of: DFlash with the trained block where it ran, else the first challenger."""
        return next((entry for entry in self.lanes if entry.lane.key == "dflash"), self.lanes[1])


def conclude(
    lanes: Sequence[Lane], laps: Mapping[str, Sequence[Lap]], facts: Mapping[str, Any],
    gaps: Mapping[str, float] | None = None,
) -> Result:  # fmt: skip
    """Put the measured laps together; `laps` and the measured logit `gaps` by lane key, repeats in order."""
    plain, exact = laps[PLAIN], not facts.get("temperature")
    results = []
    for lane in lanes:
        own = tuple(laps[lane.key])
        compared = lane.key != PLAIN and (exact or (lane.own_loop and facts.get("acceptance") != "rejection"))
        found = first_difference(plain[0].ids, own[0].ids) if compared else None
        if found is not None:
            gap = (gaps or {}).get(lane.key)
            found = Difference(found.position, found.plain_token, found.token, gap)
        speedups = tuple(
            mine.tokens_per_second / theirs.tokens_per_second for mine, theirs in zip(own, plain, strict=True)
        )
        results.append(LaneResult(lane, own, speedups, compared, found))
    return Result(tuple(results), dict(facts))
