"""One reply on the screen: opens a run, turns its frames into updates, keeps what was there when it fails; builds nothing."""

import threading
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import gradio as gr

from app.chat_state import footers
from app.conversations import Conversation, answered, bubbles, cut, last_question, new_id, prompt_messages
from app.desk import Desk
from app.replies import Frame, frames
from app.settings import Settings
from app.summary import summary
from app.turn import Run
from app.widgets import packed, warn
from dflash_core import DFlashError

LOAD_POLL_SECONDS = 0.25


@dataclass(frozen=True, slots=True)
class Screen:
    """The widgets a reply changes. `locked` rests while it is written; keeping the chat frees it."""

    composer: gr.Textbox
    chatbot: gr.Chatbot
    conversation: gr.JSON
    keep: gr.HTML
    footers: gr.HTML
    note: gr.HTML
    xray: gr.HTML
    selected: gr.Textbox
    locked: tuple[Any, ...]

    @property
    def outputs(self) -> list[Any]:
        return [
            self.composer, self.chatbot, self.conversation, self.keep, self.footers, self.note, self.xray, self.selected,
            *self.locked,
        ]  # fmt: skip

    @property
    def streamed(self) -> list[Any]:
        """What changes while a reply is written."""
        return [self.xray, self.chatbot, self.note]


@dataclass(frozen=True, slots=True)
class Request:
    """A question waiting for its reply. `before` is the chat to return to, `text` what to give back, when none comes."""

    conversation: Conversation
    before: Conversation
    text: str
    settings: Settings
    session: str
    visitor: str


@dataclass(slots=True)
class _Answer:
    request: Request
    run: Run | None = None
    stopped: bool = False


class Answers:
    """Replies being made, at most one per browser tab, each by three events: `ask`, then `stream`, then `close`.

    One event would do, but at every update Gradio builds all of an event's outputs anew, changed or not, in the process
    that decodes: with three outputs instead of twelve a reply is written a fifth faster on two cores.
    """

    def __init__(self, desk: Desk, screen: Screen) -> None:
        self.desk, self.screen = desk, screen
        self._answers: dict[str, _Answer] = {}
        self._lock = threading.Lock()

    def is_busy(self, session: str) -> bool:
        """Whether the tab waits for a reply."""
        return self._of(session) is not None or self.desk.is_busy(session)

    def ask(self, request: Request) -> dict[Any, Any]:
        """The question on the screen, the reply on its way."""
        with self._lock:
            self._answers[request.session] = _Answer(request)
        return _opening(self.screen, request)

    def stream(self, session: str) -> Iterator[dict[Any, Any]]:
        """Updates of `Screen.streamed` until the reply is whole, stopped or refused; none when nothing was asked."""
        answer = self._of(session)
        if answer is None:
            yield {self.screen.note: gr.skip()}
            return
        desk, screen, request = self.desk, self.screen, answer.request
        try:
            yield from self._until_loaded(answer)
            if answer.stopped:
                raise DFlashError("Stopped before the reply began.", "", "Your message is back in the box.")
            answer.run = desk.open(
                session, request.visitor, prompt_messages(request.conversation), _fitted(desk, request.settings),
                title=request.conversation["title"],
            )  # fmt: skip
            for frame in frames(answer.run):
                yield _framed(screen, request, frame)
        except DFlashError as error:
            warn(error)
        except GeneratorExit:
            self.forget(session)
            raise
        finally:
            desk.close(session)

    def stop(self, session: str) -> None:
        """End the tab's reply wherever it is; what was decoded stays."""
        answer = self._of(session)
        if answer is not None:
            answer.stopped = True
        self.desk.stop(session)

    def close(self, session: str) -> dict[Any, Any]:
        """The whole reply on the screen, or the chat as it was when there is none."""
        answer = self._of(session)
        if answer is None:
            return {self.screen.note: gr.skip()}
        self.forget(session)
        return _closing(self.desk, self.screen, answer.request, answer.run)

    def forget(self, session: str) -> None:
        """The tab is gone, or its reply is whole."""
        with self._lock:
            answer = self._answers.pop(session, None)
        if answer is not None:
            answer.stopped = True

    def _until_loaded(self, answer: _Answer) -> Iterator[dict[Any, Any]]:
        """A question asked while the model loads is kept and answered when it is ready, unless it is stopped."""
        engine, note = self.desk.engine, self.screen.note
        if not engine.wait(0):
            yield {note: packed({"text": "The model is still loading: your message is sent as soon as it is ready."})}
            while not engine.wait(LOAD_POLL_SECONDS):
                if answer.stopped:
                    raise DFlashError("Stopped before the model was ready.", "", "Your message is back in the box.")
                yield {note: gr.skip()}
            yield {note: packed({"text": ""})}

    def _of(self, session: str) -> _Answer | None:
        with self._lock:
            return self._answers.get(session)


def _opening(screen: Screen, request: Request) -> dict[Any, Any]:
    return {
        screen.composer: gr.Textbox(value="", submit_btn=False, stop_btn=True),
        screen.chatbot: bubbles(request.conversation, writing=""),
        screen.conversation: request.conversation,
        screen.keep: packed(request.conversation),
        screen.footers: packed(footers(request.conversation, writing=True)),
        screen.note: packed({"text": ""}),
        screen.xray: "",
        screen.selected: "",
        **{widget: type(widget)(interactive=False) for widget in screen.locked},
    }


def _fitted(desk: Desk, settings: Settings) -> Settings:
    """The page may still show the range of the draft before: a block is never longer than this draft's."""
    longest = desk.engine.status.block_size
    if longest is None:
        return replace(settings, drafting=False, block_size=None)
    return replace(settings, block_size=settings.block_size and min(settings.block_size, longest))


def _framed(screen: Screen, request: Request, frame: Frame) -> dict[Any, Any]:
    """Plain values for all of `Screen.streamed`: an output left out is an update, for which Gradio builds it anew."""
    return {
        screen.xray: frame.trace,
        screen.chatbot: bubbles(request.conversation, writing=frame.text),
        screen.note: packed({"text": frame.note}),
    }


def _closing(desk: Desk, screen: Screen, request: Request, run: Run | None) -> dict[Any, Any]:
    if run is not None and run.error is not None:
        warn(run.error)
    nothing = run is None or not run.stats.new_tokens
    conversation, selected = (request.before, "") if nothing else _with_reply(desk, request.conversation, run)
    return {
        screen.composer: gr.Textbox(submit_btn=True, stop_btn=False, **({"value": request.text} if nothing else {})),
        screen.chatbot: bubbles(conversation),
        screen.conversation: conversation,
        screen.footers: packed(footers(conversation, selected)),
        screen.note: packed({"text": ""}),
        screen.selected: selected,
        **({screen.xray: ""} if nothing else {}),
    }


def _with_reply(desk: Desk, conversation: Conversation, run: Run) -> tuple[Conversation, str]:
    reply_id = new_id()
    numbers = summary(
        run.stats, pair=run.pair_name, drafting=run.drafting, ended=run.ended,
        baseline_seconds=desk.engine.status.baseline_seconds,
    )  # fmt: skip
    return answered(conversation, reply_id, run.text, numbers), reply_id


def request_of(conversation: Conversation, before: Conversation, settings: Settings, client: gr.Request) -> Request:
    """A request for the chat's last question."""
    question = last_question(conversation)
    assert question is not None and question == len(conversation["messages"]) - 1
    text = conversation["messages"][question]["content"]
    # A retry that fails leaves the old reply in place, and the composer empty.
    restored = "" if before["messages"][: question + 1] == cut(conversation, question + 1)["messages"] else text
    return Request(conversation, before, restored, settings, client.session_hash, visitor_of(client))


def visitor_of(client: gr.Request) -> str:
    """Who is counted for the limits: the address, which a new tab does not change."""
    return client.client.host if client.client else client.session_hash
