"""Drains a run into frames for the screen at the pace a browser keeps up with; knows no widget."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.turn import Run

# Measured: the X-ray takes 20 updates a second, 10 when its trace is long; a bubble re-renders its whole Markdown.
FAST_SECONDS, SLOW_SECONDS = 0.05, 0.1
LONG_TOKENS = 6000
# A bubble's cost grows with its text: ten a second at first, then no more than so many characters a second.
BUBBLE_SECONDS, BUBBLE_CHARACTERS_PER_SECOND = 0.1, 15_000


@dataclass(frozen=True, slots=True)
class Frame:
    """What changed since the frame before; None means unchanged. `trace` grows, `text` is the whole reply so far."""

    trace: str | None = None
    text: str | None = None
    note: str | None = None
    last: bool = False


def frames(run: Run, clock: Callable[[], float] = time.monotonic) -> Iterator[Frame]:
    """Frames until the run ends; the last one has the whole trace, the whole text is then `run.text`.

    Closing the generator stops the run.
    """
    seen = Frame("", "", "")
    bubble_due = 0.0
    try:
        while not run.wait(SLOW_SECONDS if run.stats.new_tokens > LONG_TOKENS else FAST_SECONDS):
            now, trace, note = clock(), run.ndjson, _note(run)
            text = run.text if now >= bubble_due else seen.text
            frame = Frame(_changed(trace, seen.trace), _changed(text, seen.text), _changed(note, seen.note))
            if frame.text is not None:
                bubble_due = now + max(BUBBLE_SECONDS, len(text) / BUBBLE_CHARACTERS_PER_SECOND)
            if frame != Frame():
                seen = Frame(trace, text, note)
                yield frame
        yield Frame(run.ndjson, None, "", last=True)
    finally:
        run.close()


def _changed(new: str, old: str | None) -> str | None:
    return None if new == old else new


def _note(run: Run) -> str:
    if run.phase == "waiting" and (ahead := run.ahead):
        return f"Waiting: {ahead} {'reply' if ahead == 1 else 'replies'} of others first."
    return "Paused: press Next step in the X-ray." if run.phase == "paused" else ""
