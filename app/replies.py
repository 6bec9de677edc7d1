"""Drains a run into frames for the screen at the pace a browser keeps up with; knows no widget."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from app.turn import Run

# Every frame takes time from a decode that shares the machine: ten a second look live and cost it little.
FIRST_SECONDS, FAST_SECONDS, SLOW_SECONDS = 0.02, 0.1, 0.2
LONG_TOKENS = 6000
# A bubble renders its whole Markdown anew, so no more than so many characters a second.
BUBBLE_CHARACTERS_PER_SECOND = 15_000


@dataclass(frozen=True, slots=True)
class Frame:
    """What the screen shows of a run: the trace, which grows, the reply so far, why nothing moves."""

    trace: str = ""
    text: str = ""
    note: str = ""


def frames(run: Run, clock: Callable[[], float] = time.monotonic) -> Iterator[Frame]:
    """Frames until the run ends, each different; the last one has the whole trace, the whole text is then `run.text`.

    Closing the generator stops the run.
    """
    seen, bubble_due = Frame(), 0.0
    try:
        while not run.wait(_pause(run.stats.new_tokens)):
            now, trace, text = clock(), run.ndjson, seen.text
            if now >= bubble_due and text != run.text:
                text = run.text
                bubble_due = now + len(text) / BUBBLE_CHARACTERS_PER_SECOND
            frame = Frame(trace, text, _note(run))
            if frame != seen:
                seen = frame
                yield frame
        yield Frame(run.ndjson, seen.text)
    finally:
        run.close()


def _pause(tokens: int) -> float:
    """Seconds until the next look: the first token is shown at once."""
    return FIRST_SECONDS if not tokens else FAST_SECONDS if tokens <= LONG_TOKENS else SLOW_SECONDS


def _note(run: Run) -> str:
    if run.phase == "waiting" and (ahead := run.ahead):
        return f"Waiting: {ahead} {'reply' if ahead == 1 else 'replies'} of others first."
    return "Paused: press Next step in the X-ray." if run.phase == "paused" else ""
