"""One turn: messages and settings in, a decode in its own thread, a growing trace out; knows no widget and no markup.

It is the only place that runs `dflash_core.decode`. A consumer polls the run; a slow or absent one never slows the decode.
"""

import logging
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Literal, TypeAlias

import jinja2

from app.settings import Settings
from app.stats import RunStats
from app.trace import Recorder, new_header
from app.turnstile import Ticket, Turnstile
from dflash_core import DFlashError, Finish, Pair, Prefill, Step, decode

log = logging.getLogger(__name__)

Phase: TypeAlias = Literal["waiting", "decoding", "paused", "done"]
Event: TypeAlias = Prefill | Step | Finish
Decode: TypeAlias = Callable[..., Iterator[Event]]

TURN_POLL_SECONDS = 0.2


class TurnError(DFlashError):
    """A turn cannot be made from this chat."""


def prompt_ids(pair: Pair, messages: Sequence[Mapping[str, str]]) -> list[int]:
    """The chat as the target's template writes it, ready to be answered. Raises `TurnError`."""
    if not getattr(pair.tokenizer, "chat_template", None):
        raise TurnError("This target cannot chat.", f"'{pair.name}' has no chat template.", "Load an instruction-tuned target.")
    try:
        ids = pair.tokenizer.apply_chat_template(
            list(messages), add_generation_prompt=True, tokenize=True, return_dict=False, **pair.chat_template_kwargs
        )
    except jinja2.TemplateError as error:
        raise TurnError(
            "The target's chat template refused this chat.", f"It says: {error}.", "Remove the system prompt or start a new chat."
        ) from error
    return list(ids)


class Run:
    """One reply being decoded. `start` it, poll `wait`, read `ndjson`, `text`, `stats`; `close` it whatever happens."""

    def __init__(
        self,
        pair: Pair,
        messages: Sequence[Mapping[str, str]],
        settings: Settings,
        *,
        turnstile: Turnstile,
        owner: str,
        paced: bool = False,
        title: str = "",
        baseline_seconds: float | None = None,
        decode: Decode = decode,
        check_tokens: Callable[[int], None] = lambda tokens: None,
        on_end: Callable[[], None] = lambda: None,
    ) -> None:
        self._prompt = prompt_ids(pair, messages)
        check_tokens(len(self._prompt))
        self._params, self._drafting = settings.params(), settings.drafting and pair.draft is not None
        self._pair: Pair | None = pair
        self.pair_name, self._decode_with, self._on_end = pair.name, decode, on_end
        self.recorder = Recorder(
            new_header(
                pair=pair.name,
                device=pair.place,
                dtype=pair.dtype,
                settings=settings.to_dict(),
                messages=messages,
                drafting=self._drafting,
                title=title,
                baseline_seconds=baseline_seconds,
            ),
            pair.tokenizer,
        )
        self.error: DFlashError | None = None
        self.ended = "stopped"
        self._turnstile, self._owner = turnstile, owner
        self._ticket = Ticket(owner, 0)
        self._phase: Phase = "waiting"
        self._stopping, self._done = threading.Event(), threading.Event()
        self._pace = threading.Condition()
        self._paced, self._permits = paced, 0
        self._thread = threading.Thread(target=self._work, name=f"decode-{owner[:8]}", daemon=True)

    def start(self) -> "Run":
        self._ticket = self._turnstile.join(self._owner)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Ask the decode to end after the pass it is in; what was decoded stays."""
        self._stopping.set()
        with self._pace:
            self._pace.notify_all()

    def close(self, timeout_seconds: float = 1.0) -> None:
        """Stop and wait for the thread, which a forward in progress may outlive."""
        self.stop()
        if self._thread.is_alive():
            self._thread.join(timeout_seconds)

    def next_step(self) -> None:
        """Let a paced decode make one more pass."""
        with self._pace:
            if self._phase == "paused":
                self._permits = 1
            self._pace.notify_all()

    def pace(self, paced: bool) -> None:
        """Pause after every pass, or no longer."""
        with self._pace:
            self._paced, self._permits = paced, 0
            self._pace.notify_all()

    def wait(self, timeout_seconds: float) -> bool:
        """Wait for the end of the run; True when it has ended."""
        return self._done.wait(timeout_seconds)

    @property
    def phase(self) -> Phase:
        return self._phase

    @property
    def ahead(self) -> int:
        """Runs of other people served before this one goes on."""
        return self._turnstile.ahead(self._ticket)

    @property
    def text(self) -> str:
        return self.recorder.text

    @property
    def ndjson(self) -> str:
        return self.recorder.ndjson

    @property
    def stats(self) -> RunStats:
        return self.recorder.stats

    @property
    def drafting(self) -> bool:
        return self._drafting

    def _work(self) -> None:
        try:
            if self._take_turn():
                self._decode()
        except DFlashError as error:
            self._fail(error)
        except Exception as error:
            log.exception("a decode thread broke")
            self._fail(DFlashError("The run broke.", f"{type(error).__name__}: {error}.", "Try again; the log has the details."))
        finally:
            if self.ended in ("stopped", "failed"):
                self.recorder.cancel(self.ended)
            self._turnstile.leave(self._ticket)
            # A run outlives its decode in the reader's session; the weights must not.
            self._pair = None
            self._on_end()
            self._phase = "done"
            self._done.set()

    def _decode(self) -> None:
        events = self._decode_with(self._pair, self._prompt, self._params, drafting=self._drafting)
        try:
            for event in events:
                self.recorder.add(event)
                if isinstance(event, Finish):
                    self.ended = event.reason
                elif self._stopping.is_set() or not self._may_go_on():
                    break
        finally:
            close = getattr(events, "close", None)
            if close is not None:
                close()

    def _may_go_on(self) -> bool:
        """Wait for the next click when paced, without holding the turn; False when the run was stopped meanwhile."""
        if not self._paced:
            return True
        self._turnstile.leave(self._ticket)
        with self._pace:
            self._phase = "paused"
            self._pace.wait_for(lambda: self._permits or not self._paced or self._stopping.is_set())
            self._permits = 0
            self._phase = "waiting"
        self._ticket = self._turnstile.join(self._owner)
        return self._take_turn()

    def _take_turn(self) -> bool:
        while not self._stopping.is_set():
            if self._turnstile.wait(self._ticket, TURN_POLL_SECONDS):
                self._phase = "decoding"
                return True
        return False

    def _fail(self, error: DFlashError) -> None:
        self.error, self.ended = error, "failed"
