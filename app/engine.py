"""The one pair in memory: loads it in the background, lends it to runs, swaps it while idle; knows no chat and no widget."""

import gc
import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal, TypeAlias

from app.turn import Decode, prompt_ids
from dflash_core import DFlashError, Pair, SamplingParams, Step, decode, load_pair, pair_names

log = logging.getLogger(__name__)

Phase: TypeAlias = Literal["empty", "loading", "ready", "failed"]

WARM_UP_TOKENS = 12
WARM_UP_SECONDS = 3.0


class EngineError(DFlashError):
    """The pair is not there, or cannot be changed now."""


@dataclass(frozen=True, slots=True)
class Choice:
    """Which pair to load: a name, or a target with its own draft (ids or folders)."""

    name: str = pair_names()[0]
    target: str | None = None
    draft: str | None = None

    @property
    def label(self) -> str:
        return self.name if self.target is None else f"{self.target} + {self.draft or 'no draft'}"


@dataclass(frozen=True, slots=True)
class Status:
    """What the page shows of the engine. `fraction` 0..1 or None, `version` grows with every change."""

    phase: Phase = "empty"
    choice: Choice | None = None
    stage: str = ""
    fraction: float | None = None
    error: DFlashError | None = None
    pair_name: str = ""
    device: str = ""
    dtype: str = ""
    block_size: int | None = None
    draft_kind: str | None = None
    fits_transformers: bool | None = None
    context_length: int | None = None
    baseline_seconds: float | None = None
    version: int = 0


class Engine:
    """Holds at most one pair. `load` returns at once; `borrow` and `give_back` frame every run."""

    def __init__(self, load: Callable[..., Pair] = load_pair, decode: Decode = decode, **load_options: Any) -> None:
        self._load, self.decode, self._options = load, decode, load_options
        self._lock = threading.Condition()
        self._pair: Pair | None = None
        self._borrowed = 0
        self._status = Status()
        self._thread: threading.Thread | None = None

    @property
    def status(self) -> Status:
        return self._status

    def load(self, choice: Choice) -> None:
        """Start to load; the old pair's memory is freed first. Raises `EngineError` while busy."""
        with self._lock:
            if self._status.phase == "loading":
                raise EngineError("A pair is already being loaded.", f"It is {self._name()}.", "Wait until it is ready.")
            if self._borrowed:
                raise EngineError("The pair is in use.", "A reply is being written.", "Wait for it or stop it, then switch.")
            previous = self._status.choice if self._status.phase == "ready" else None
            self._set(Status(phase="loading", choice=choice, stage="starting", version=self._status.version))
            self._pair = None
        self._thread = threading.Thread(target=self._work, args=(choice, previous), name="load-pair", daemon=True)
        self._thread.start()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait while a pair is being loaded; True when none is."""
        with self._lock:
            return self._lock.wait_for(lambda: self._status.phase != "loading", timeout_seconds)

    def borrow(self) -> Pair:
        """The pair, for one run. Raises `EngineError` when there is none."""
        with self._lock:
            if self._pair is None or self._status.phase != "ready":
                raise self._status.error or EngineError(
                    "No pair is ready.", f"The model is {self._status.phase}.", "Choose a pair in the sidebar and load it."
                )
            self._borrowed += 1
            return self._pair

    def give_back(self) -> None:
        with self._lock:
            self._borrowed -= 1
            assert self._borrowed >= 0
            self._lock.notify_all()

    def _work(self, choice: Choice, previous: Choice | None) -> None:
        # Collect first: a pair's modules refer to each other, and two pairs rarely fit at once.
        gc.collect()
        error = self._try(choice)
        if error is not None and previous is not None:
            log.info("returning to %s", previous.label)
            self._try(previous)
        if error is not None:
            self._set(replace(self._status, error=error, phase="ready" if self._pair is not None else "failed"))

    def _try(self, choice: Choice) -> DFlashError | None:
        """Load one choice; what went wrong, or None."""
        try:
            pair = self._load(
                choice.name, target=choice.target, draft=choice.draft, progress=self._progress, **self._options
            )
            self._set(replace(self._status, stage="warming up", fraction=None))
            baseline = warm_up(pair, self.decode)
        except DFlashError as error:
            log.warning("%s was not loaded: %s", choice.label, error)
            return error
        except Exception as error:
            log.exception("loading %s broke", choice.label)
            return EngineError("The pair was not loaded.", f"{type(error).__name__}: {error}.", "The log has the details.")
        self._pair = pair
        self._set(_ready(pair, choice, baseline, self._status.version))
        log.info("%s is ready on %s", pair.name, pair.place)
        return None

    def _progress(self, stage: str, fraction: float | None = None) -> None:
        self._set(replace(self._status, stage=stage, fraction=fraction))

    def _set(self, status: Status) -> None:
        with self._lock:
            self._status = replace(status, version=self._status.version + 1)
            self._lock.notify_all()

    def _name(self) -> str:
        return f"'{self._status.choice.label}'" if self._status.choice else "unknown"


def _ready(pair: Pair, choice: Choice, baseline_seconds: float | None, version: int) -> Status:
    return Status(
        phase="ready",
        choice=choice,
        pair_name=pair.name,
        device=pair.place,
        dtype=pair.dtype,
        block_size=pair.block_size,
        draft_kind=pair.draft_kind,
        fits_transformers=pair.fits_transformers,
        context_length=pair.context_length,
        baseline_seconds=baseline_seconds,
        version=version,
    )


def warm_up(pair: Pair, decode: Decode = decode) -> float | None:
    """Run a few passes with and without drafting; the median seconds of a plain pass, None when none was made."""
    ids = prompt_ids(pair, [{"role": "user", "content": "Count to ten."}])
    params = SamplingParams(max_new_tokens=WARM_UP_TOKENS, stop_token_ids=())
    seconds = sorted(step.verify_seconds for step in _steps(decode(pair, ids, params, drafting=False)))
    if pair.draft is not None:
        _steps(decode(pair, ids, params, drafting=True))
    return seconds[len(seconds) // 2] if seconds else None


def _steps(events: Any) -> list[Step]:
    """The steps of a run, cut off when they take too long for a warm-up."""
    steps, total = [], 0.0
    for event in events:
        if isinstance(event, Step):
            steps.append(event)
            total += event.draft_seconds + event.verify_seconds
        if total > WARM_UP_SECONDS:
            break
    events.close()
    return steps
