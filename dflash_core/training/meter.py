"""A progress line with tokens per second; knows a terminal from a log file and nothing of what is counted."""

import sys
import time
from types import TracebackType
from typing import TextIO

TERMINAL_SECONDS, LOG_SECONDS = 0.2, 10.0


def duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class Meter:
    """`with Meter("Replies", 100) as meter: meter.show(done, new_tokens)`: a live line, or one every ten seconds."""

    def __init__(self, title: str, total: int, out: TextIO | None = None) -> None:
        self._title, self._total, self._out = title, total, out or sys.stderr
        self._live = self._out.isatty()
        self._done = self._tokens = 0
        self._start = self._shown = time.monotonic()

    def __enter__(self) -> "Meter":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._print()
        if self._live:
            self._out.write("\n")

    def show(self, done: int, new_tokens: int) -> None:
        self._done = done
        self._tokens += new_tokens
        if time.monotonic() - self._shown >= (TERMINAL_SECONDS if self._live else LOG_SECONDS):
            self._print()

    def line(self) -> str:
        seconds = max(time.monotonic() - self._start, 1e-9)
        left = (
            f" · {duration(seconds / self._done * (self._total - self._done))} left"
            if 0 < self._done < self._total
            else ""
        )
        return (
            f"{self._title}: {self._done:,} of {self._total:,} · {self._tokens:,} tokens · "
            f"{self._tokens / seconds:,.0f} tokens/s · {duration(seconds)}{left}"
        )

    def _print(self) -> None:
        self._shown = time.monotonic()
        self._out.write(f"\r\x1b[K{self.line()}" if self._live else f"{self.line()}\n")
        self._out.flush()
