"""The chat and, beside it, the X-ray of the same run: lays them out and wires what a reader can do; decodes nothing."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.answering import Answers, Screen, request_of
from app.chat_list import ChatList, Shelf
from app.chat_state import edited, footers, to_retry, undone
from app.conversations import Conversation, asked, bubbles, new, unguard
from app.desk import Desk
from app.render import xray_kwargs
from app.settings_panel import SettingsPanel
from app.widgets import QUIET, channel, packed, warn
from dflash_core import DFlashError

LATEX = [
    {"left": "$$", "right": "$$", "display": True},
    {"left": "\\[", "right": "\\]", "display": True},
    {"left": "\\(", "right": "\\)", "display": False},
]
EXAMPLES = (
    "Explain photosynthesis in three sentences.",
    "Write a Python function that reverses a list.",
    "List five facts about the Moon.",
    "Write a short poem about the sea.",
)
WELCOME = "### Ask something\nThe reply appears here; how it was drafted, checked and kept appears in the X-ray."


@dataclass(frozen=True, slots=True)
class ChatTab:
    screen: Screen

    @property
    def xray(self) -> gr.HTML:
        return self.screen.xray


def build(chats: ChatList) -> ChatTab:
    """Inside its tab; the sidebar is built before."""
    with gr.Row(elem_classes="dfc-panes", equal_height=True):
        with gr.Column(scale=5, min_width=320, elem_classes="dfc-pane"):
            chatbot = gr.Chatbot(
                [], show_label=False, elem_classes="dfc-chat", elem_id="dfc-chat", buttons=["copy"], editable="user",
                sanitize_html=True, allow_tags=False, latex_delimiters=LATEX, feedback_options=None, layout="bubble",
                placeholder=WELCOME, examples=[{"text": text} for text in EXAMPLES], height="100%", min_height=0,
            )  # fmt: skip
            note = channel("setNote", {"text": ""}, elem_classes="dfc-note-host")
            composer = gr.Textbox(
                show_label=False, label="Message", placeholder="Write a message…",
                lines=1, max_lines=8, submit_btn=True, container=False, autofocus=True, elem_classes="dfc-composer",
                elem_id="dfc-composer",
            )  # fmt: skip
        with gr.Column(scale=7, min_width=320, elem_classes="dfc-pane dfc-xray-pane", elem_id="dfc-xray-pane"):
            xray = gr.HTML(**xray_kwargs(step_mode=True, elem_id="dfc-xray"))
    hidden = gr.JSON(new(), visible=False), gr.Textbox(visible=False)
    keep = channel("keep", None)
    foot = channel("setFooters", {"items": [], "selected": ""})
    screen = Screen(composer, chatbot, hidden[0], keep, foot, note, xray, hidden[1], chats.locked)
    return ChatTab(screen)


class Wiring:
    """Connects the chat tab's events to the desk."""

    def __init__(self, desk: Desk, tab: ChatTab, settings: SettingsPanel, shelf: Shelf) -> None:
        self.desk, self.tab, self.screen, self.settings, self.shelf = desk, tab, tab.screen, settings, shelf
        self.answers = Answers(desk, tab.screen)
        self.inputs = {self.screen.composer, self.screen.conversation, settings.system, *settings.inputs.values()}

    def connect(self) -> None:
        """Wire everything; call once, inside the page."""
        screen = self.screen
        self._replies(screen.composer.submit, self.send)
        self._replies(screen.chatbot.example_select, self.example)
        self._replies(screen.chatbot.retry, self.retry)
        self._replies(screen.chatbot.edit, self.edit)
        undo = screen.chatbot.undo(
            self.undo, screen.conversation, [screen.conversation, screen.chatbot, screen.footers, screen.selected, screen.composer],
            **QUIET,
        )  # fmt: skip
        self.shelf.show_trace(self.shelf.shelve(undo))
        picked = screen.chatbot.select(self.select, screen.conversation, [screen.selected, screen.footers], **QUIET)
        self.shelf.show_trace(picked)
        screen.composer.stop(self.stop, None, None, queue=False, **QUIET)
        screen.xray.step_mode(self.pace, None, None, queue=False, **QUIET)
        screen.xray.next_step(self.next_step, None, None, queue=False, **QUIET)

    def _replies(self, trigger: Any, act: Any) -> None:
        # Unchecked inputs: `Settings` checks them, and a message is never lost to a slider whose range just changed.
        opened = trigger(act, self.inputs, self.screen.outputs, preprocess=False, concurrency_limit=None, **QUIET)
        streamed = opened.then(
            self.stream, None, self.screen.streamed, concurrency_limit=None, concurrency_id="replies", **QUIET
        )  # fmt: skip
        closed = streamed.then(self.close, None, self.screen.outputs, concurrency_limit=None, **QUIET)
        self.shelf.shelve(closed, reply=True)

    def send(self, data: Mapping[Any, Any], client: gr.Request) -> dict[Any, Any]:
        text = data[self.screen.composer] or ""
        if not text.strip():
            return self._nothing()
        before = self._before(data)
        return self._ask(asked(before, text), before, data, client)

    def example(self, data: Mapping[Any, Any], client: gr.Request, chosen: gr.SelectData) -> dict[Any, Any]:
        before = self._before(data)
        return self._ask(asked(before, str(chosen.value["text"])), before, data, client)

    def retry(self, data: Mapping[Any, Any], client: gr.Request) -> dict[Any, Any]:
        before = self._before(data)
        conversation = to_retry(before)
        if conversation is None:
            return self._nothing()
        return self._ask(conversation, before, data, client)

    def edit(self, data: Mapping[Any, Any], client: gr.Request, change: gr.EditData) -> dict[Any, Any]:
        before = self._before(data)
        text = unguard(_text(change.value))
        if not text.strip():
            return self._nothing() | {self.screen.chatbot: bubbles(before)}
        return self._ask(edited(before, _index(change.index), text), before, data, client)

    def stream(self, client: gr.Request) -> Iterator[dict[Any, Any]]:
        yield from self.answers.stream(client.session_hash)

    def close(self, client: gr.Request) -> dict[Any, Any]:
        return self.answers.close(client.session_hash)

    def undo(self, conversation: Conversation) -> tuple:
        shorter, text = undone(conversation)
        remaining = footers(shorter)
        selected = remaining["items"][-1]["id"] if remaining["items"] else ""
        return shorter, bubbles(shorter), packed(remaining | {"selected": selected}), selected, text

    def select(self, conversation: Conversation, client: gr.Request, chosen: gr.SelectData) -> tuple:
        """The reply that was clicked, or the reply to the question that was clicked."""
        messages, index = conversation["messages"], _index(chosen.index)
        reply = next((m for m in messages[index : index + 2] if m["role"] == "assistant"), None)
        if reply is None or self.answers.is_busy(client.session_hash):
            return gr.skip(), gr.skip()
        return reply["id"], packed(footers(conversation, reply["id"]))

    def stop(self, client: gr.Request) -> None:
        self.answers.stop(client.session_hash)

    def pace(self, client: gr.Request, event: gr.EventData) -> None:
        self.desk.pace(client.session_hash, bool(event._data.get("on")))

    def next_step(self, client: gr.Request) -> None:
        run = self.desk.run(client.session_hash)
        if run is not None:
            run.next_step()

    def _ask(
        self, conversation: Conversation, before: Conversation, data: Mapping[Any, Any], client: gr.Request
    ) -> dict[Any, Any]:
        try:
            settings = self.settings.read(data).capped(self.desk.limits.max_new_tokens)
        except DFlashError as error:
            warn(error)
            return self._nothing() | {self.screen.chatbot: bubbles(before)}
        if self.answers.is_busy(client.session_hash):
            warn(DFlashError("A reply is being written.", "", "Wait for it or stop it first."))
            return self._nothing()
        return self.answers.ask(request_of(conversation, before, settings, client))

    def _before(self, data: Mapping[Any, Any]) -> Conversation:
        return (data[self.screen.conversation] or new()) | {"system": data[self.settings.system] or ""}

    def _nothing(self) -> dict[Any, Any]:
        return {self.screen.note: gr.skip()}


def _index(index: Any) -> int:
    return int(index[0] if isinstance(index, (list, tuple)) else index)


def _text(value: Any) -> str:
    """Gradio hands an edited message over as text or as a list of text parts."""
    if isinstance(value, list):
        return "".join(_text(part) for part in value)
    return str(value.get("text", "")) if isinstance(value, Mapping) else str(value)
