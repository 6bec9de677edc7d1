"""How far a run is and what learning rate that means; knows no optimiser."""

import math
import time
from dataclasses import dataclass
from typing import Literal

Shape = Literal["constant-linear", "linear", "cosine", "constant"]


@dataclass(frozen=True)
class Schedule:
    """The factor on the learning rate as a function of the run's progress 0..1.

    warm_up   fraction of the run in which the rate rises from 0
    decay     for "constant-linear": fraction of the run, at its end, in which the rate falls to `floor`
    """

    shape: Shape
    warm_up: float
    decay: float
    floor: float = 0.0

    def factor(self, progress: float) -> float:
        progress = min(max(progress, 0.0), 1.0)
        if progress < self.warm_up:
            return progress / self.warm_up
        if self.shape == "constant":
            return 1.0
        start = 1.0 - self.decay if self.shape == "constant-linear" else self.warm_up
        left = 1.0 - max(0.0, progress - start) / max(1e-9, 1.0 - start)
        if self.shape == "cosine":
            left = 0.5 * (1.0 + math.cos(math.pi * (1.0 - left)))
        return self.floor + (1.0 - self.floor) * left


class Clock:
    """Progress of a run that may have been interrupted: the larger of its share of steps and its share of time.

    Time counts from the start of each process, loading and compiling included, so `max_seconds` bounds what a machine
    is really used for; `reserve_seconds` are kept for the last evaluation and save.
    """

    def __init__(self, started: float, spent_seconds: float, max_seconds: float | None, max_steps: int | None) -> None:
        assert max_seconds or max_steps
        self._started, self._spent = started, spent_seconds
        self._max_seconds, self._max_steps = max_seconds, max_steps
        self.reserve_seconds = 10.0

    @property
    def process_seconds(self) -> float:
        return time.monotonic() - self._started

    @property
    def seconds(self) -> float:
        return self._spent + self.process_seconds

    def progress(self, step: int) -> float:
        shares = [0.0]
        if self._max_steps:
            shares.append(step / self._max_steps)
        if self._max_seconds:
            shares.append(self.seconds / max(1.0, self._max_seconds - self.reserve_seconds))
        return max(shares)
