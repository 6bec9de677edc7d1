"""Runs a race: lap after lap through the desk's queue, then the closeness of every difference; draws nothing."""

import copy
import secrets
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from app.desk import Desk
from app.race import PLAIN, Difference, Lane, Lap, Result, conclude, first_difference, lap_of, schedule
from app.settings import Settings
from app.trace import parse
from app.turn import Run
from dflash_core import SamplingParams, transformers_decode

# Telling the page takes time from the lap being measured, so it is told twice a second.
POLL_SECONDS = 0.5
WARM_UP_TOKENS = 8


@dataclass(frozen=True, slots=True)
class Request:
    """Who races what: `session` names the browser tab's race, `visitor` is counted, `owner` shares its turns."""

    session: str
    visitor: str
    owner: str
    messages: tuple[Mapping[str, str], ...]
    settings: Settings


@dataclass(frozen=True, slots=True)
class Progress:
    """Where a race stands: laps done of all, and the one being run (`tokens` so far, `ahead` runs of other people)."""

    done: int
    laps: int
    lane: Lane | None
    repeat: int
    tokens: int = 0
    ahead: int = 0


def race(desk: Desk, request: Request, lanes: Sequence[Lane], repeats: int) -> Iterator[Progress | Result]:
    """Warm every lane up, measure all laps in turns, compare the replies; the last value is the `Result`.

    Closing the generator ends the lap being run. Raises `DFlashError`.
    """
    request = replace(request, settings=_seeded(request.settings))
    plan = schedule(lanes, repeats)
    yield Progress(0, len(plan), None, 0)
    short = replace(request, settings=request.settings.capped(WARM_UP_TOKENS))
    for lane in lanes:
        for _ in _lap(desk, short, lane):
            yield Progress(0, len(plan), None, 0)
    laps: dict[str, list[Lap]] = {lane.key: [] for lane in lanes}
    for done, (repeat, lane) in enumerate(plan):
        for tokens, ahead, run in _lap(desk, request, lane):
            yield Progress(done, len(plan), lane, repeat, tokens, ahead)
        laps[lane.key].append(lap_of(parse(run.ndjson)))
    yield Progress(len(plan), len(plan), None, repeats - 1)
    yield conclude(lanes, laps, _facts(desk, request, run), _gaps(desk, request, lanes, laps))


def _seeded(settings: Settings) -> Settings:
    """All lanes draw the same random numbers."""
    needs = settings.temperature > 0 and settings.seed is None
    return replace(settings, seed=secrets.randbelow(2**31)) if needs else settings


def _lap(desk: Desk, request: Request, lane: Lane) -> Iterator[tuple[int, int, Run]]:
    """One reply of one lane: tokens so far, runs ahead, the run; ends when it is whole."""
    settings = replace(request.settings, drafting=lane.kind != "plain", block_size=lane.block_size)
    run = _open(desk, request, settings, _decode_of(lane))
    try:
        while not run.wait(POLL_SECONDS):
            yield run.stats.new_tokens, run.ahead, run
        if run.error is not None:
            raise run.error
        yield run.stats.new_tokens, 0, run
    finally:
        desk.close(request.session)


def _open(desk: Desk, request: Request, settings: Settings, decode: Callable[..., Any] | None) -> Run:
    own = desk if decode is None else _with_loop(desk, decode)
    return own.open(
        request.session, request.visitor, list(request.messages), settings, owner=request.owner, title="Race"
    )


@dataclass(frozen=True, slots=True)
class _OtherLoop:
    """An engine's pair and status under another loop."""

    engine: Any
    decode: Callable[..., Any]

    def __getattr__(self, name: str) -> Any:
        return getattr(self.engine, name)


def _with_loop(desk: Desk, decode: Callable[..., Any]) -> Desk:
    """The same desk, with its queue, limits and runs, whose next run decodes with another loop."""
    other = copy.copy(desk)
    other.engine = _OtherLoop(desk.engine, decode)
    return other


def _decode_of(lane: Lane) -> Callable[..., Any] | None:
    """The loop to use, None for the app's own."""
    if lane.own_loop:
        return None

    def decode(pair: Any, ids: Sequence[int], params: SamplingParams, *, drafting: bool) -> Iterator[Any]:
        return transformers_decode(pair, ids, params, method=lane.kind)

    return decode


def _facts(desk: Desk, request: Request, run: Run) -> dict[str, Any]:
    status, header = desk.engine.status, run.recorder.header
    settings = request.settings
    return {
        "pair": header["pair"], "device": header["device"], "dtype": header["dtype"], "created": header["created"],
        "trained_block_size": status.block_size, "prompt": request.messages[-1]["content"],
        "temperature": settings.temperature, "top_p": settings.top_p, "top_k": settings.top_k, "seed": settings.seed,
        "acceptance": settings.acceptance, "max_new_tokens": settings.max_new_tokens,
    }  # fmt: skip


def _gaps(desk: Desk, request: Request, lanes: Sequence[Lane], laps: Mapping[str, Sequence[Lap]]) -> dict[str, float]:
    """How close the target's choices were where a lane left plain decoding; only greedy replies have such a number."""
    if request.settings.temperature > 0:
        return {}
    plain, gaps = laps[PLAIN][0].ids, {}
    for lane in lanes:
        found = first_difference(plain, laps[lane.key][0].ids)
        gap = None if found is None else logit_gap(desk, request, plain[: found.position], found)
        if gap is not None:
            gaps[lane.key] = gap
    return gaps


def logit_gap(desk: Desk, request: Request, prefix: Sequence[int], found: Difference) -> float | None:
    """How far apart the target's logits for the two tokens are after the reply's shared `prefix`; None if unknown."""
    if found.plain_token is None or found.token is None:
        return None
    seen: list[float] = []

    def look(_: Sequence[int], logits: Any) -> Any:
        seen.append(abs(float(logits[found.plain_token]) - float(logits[found.token])))
        return logits

    def decode(pair: Any, ids: Sequence[int], params: SamplingParams, *, drafting: bool) -> Iterator[Any]:
        return desk.engine.decode(pair, [*ids, *prefix], replace(params, processors=(look,)), drafting=False)

    one_token = replace(request.settings, max_new_tokens=1, drafting=False, block_size=None)
    run = _open(desk, request, one_token, decode)
    try:
        while not run.wait(POLL_SECONDS):
            pass
    finally:
        desk.close(request.session)
    return seen[0] if seen else None
