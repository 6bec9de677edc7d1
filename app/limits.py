"""What one visitor may ask of a shared host; refuses to know of models and screens."""

import threading
import time
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

from dflash_core import DFlashError


class LimitError(DFlashError):
    """A request is larger or more frequent than this host allows."""


@dataclass(frozen=True, slots=True)
class Limits:
    """Caps on one run and on the host. None means no cap; `pairs` is the allow-list of pairs to load."""

    max_new_tokens: int = 4096
    prompt_characters: int | None = None
    prompt_tokens: int | None = None
    runs_per_minute: int | None = None
    pairs: tuple[str, ...] | None = None
    queue_size: int = 32

    def check_text(self, characters: int) -> None:
        if self.prompt_characters is not None and characters > self.prompt_characters:
            raise LimitError(
                "The chat is too long for this host.",
                f"It has {characters:,} characters, {self.prompt_characters:,} are allowed.",
                "Shorten the message or start a new chat.",
            )

    def check_tokens(self, tokens: int) -> None:
        if self.prompt_tokens is not None and tokens > self.prompt_tokens:
            raise LimitError(
                "The chat is too long for this host.",
                f"It has {tokens:,} tokens, {self.prompt_tokens:,} are allowed.",
                "Shorten the message or start a new chat.",
            )

    def check_pair(self, name: str) -> None:
        if self.pairs is not None and name not in self.pairs:
            raise LimitError(
                "This host does not offer that pair.",
                f"'{name[:80]}' is not on its list.",
                f"Choose one of {', '.join(self.pairs)}.",
            )


OPEN = Limits()


def public(pairs: tuple[str, ...]) -> Limits:
    """The caps of a shared host that offers `pairs` and nothing else."""
    return Limits(512, prompt_characters=8000, prompt_tokens=2048, runs_per_minute=10, pairs=pairs, queue_size=24)


class RunRate:
    """Counts each visitor's runs over the last minute."""

    def __init__(self, per_minute: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._per_minute, self._clock = per_minute, clock
        self._starts: dict[str, deque[float]] = {}
        self._lock = threading.Lock()

    def count(self, visitor: str) -> None:
        """Count one run. Raises `LimitError` when it is one too many."""
        if self._per_minute is None:
            return
        with self._lock:
            now = self._clock()
            self._forget(now)
            starts = self._starts.setdefault(visitor, deque())
            if len(starts) >= self._per_minute:
                raise LimitError(
                    "That is a lot of runs.",
                    f"This host allows {self._per_minute} a minute.",
                    f"Try again in {max(1, round(60 - (now - starts[0])))} seconds.",
                )
            starts.append(now)

    def _forget(self, now: float) -> None:
        for visitor in list(self._starts):
            starts = self._starts[visitor]
            while starts and now - starts[0] >= 60:
                starts.popleft()
            if not starts:
                del self._starts[visitor]
