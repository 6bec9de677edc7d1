"""Who runs what: one run per browser tab, each seen by its own tab only; knows no widget."""

import threading
from collections.abc import Mapping, Sequence

from app.engine import Engine
from app.limits import OPEN, Limits, RunRate
from app.settings import Settings
from app.turn import Run
from app.turnstile import Turnstile
from dflash_core import DFlashError


class BusyError(DFlashError):
    """This tab already has a run."""


class Desk:
    """Opens runs on the engine's pair, within the limits, one after the other, and finds a tab's run again."""

    def __init__(self, engine: Engine, limits: Limits = OPEN) -> None:
        self.engine, self.limits = engine, limits
        self._turnstile, self._rate = Turnstile(), RunRate(limits.runs_per_minute)
        self._runs: dict[str, Run] = {}
        self._paced: set[str] = set()
        self._lock = threading.Lock()

    def pace(self, session: str, paced: bool) -> None:
        """Whether the session's runs, this one and the next, wait for a click after every pass."""
        with self._lock:
            self._paced = self._paced | {session} if paced else self._paced - {session}
        run = self.run(session)
        if run is not None:
            run.pace(paced)

    def forget(self, session: str) -> None:
        """The tab is gone."""
        self.close(session)
        with self._lock:
            self._paced.discard(session)

    def stop(self, session: str) -> None:
        """End the session's run; what was decoded stays readable."""
        run = self.run(session)
        if run is not None:
            run.stop()

    def open(
        self, session: str, visitor: str, messages: Sequence[Mapping[str, str]], settings: Settings,
        *, title: str = "", owner: str = "",
    ) -> Run:  # fmt: skip
        """Start a run; the caller must `close` the session's run when it stops listening. Raises `DFlashError`.

        `visitor` is counted for the limits; `owner`, the session unless given, shares its turns among its runs.
        """
        if self.is_busy(session):
            raise BusyError("A reply is being written.", "", "Wait for it or stop it first.")
        self.limits.check_text(sum(len(message["content"]) for message in messages))
        self._rate.count(visitor)
        pair = self.engine.borrow()
        try:
            run = Run(
                pair, messages, settings.capped(self.limits.max_new_tokens),
                turnstile=self._turnstile, owner=owner or session, paced=session in self._paced, title=title, decode=self.engine.decode,
                baseline_seconds=self.engine.status.baseline_seconds, check_tokens=self.limits.check_tokens, on_end=self.engine.give_back,
            )  # fmt: skip
        except BaseException:
            self.engine.give_back()
            raise
        with self._lock:
            self._runs[session] = run
        return run.start()

    def run(self, session: str) -> Run | None:
        """The session's run, None when it has none."""
        with self._lock:
            return self._runs.get(session)

    def is_busy(self, session: str) -> bool:
        run = self.run(session)
        return run is not None and run.phase != "done"

    def close(self, session: str) -> None:
        """Stop the session's run and forget it; harmless without one."""
        with self._lock:
            run = self._runs.pop(session, None)
        if run is not None:
            run.close()
