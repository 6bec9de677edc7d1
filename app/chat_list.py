"""The sidebar's list of chats and what can be done with one: open, new, rename, delete, export, import; knows no models."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app.answering import Screen
from app.chat_state import choices, footers, last_reply_id
from app.conversations import Conversation, ConversationError, bubbles, new, read_import, renamed
from app.widgets import QUIET, packed
from dflash_core import DFlashError

MAX_IMPORT_BYTES = 64 * 1024 * 1024
# Only an event that just made the X-ray's trace may store it: after others the X-ray may show another reply.
SHELVE = "async (_, chat) => [await dflashApp.saveTurn(chat, '', ''), null]"
SHELVE_REPLY = "async (_, chat, id, trace) => [await dflashApp.saveTurn(chat, id, trace), null, null, null]"
BOOT_FIRST = "async (_, system) => [await dflashApp.boot(), system]"


@dataclass(frozen=True, slots=True)
class ChatList:
    chats: gr.Radio
    new: gr.Button
    title: gr.Textbox
    delete: gr.Button
    export: gr.Button
    load: gr.UploadButton
    shelf: gr.JSON
    imported: gr.JSON

    @property
    def locked(self) -> tuple[Any, ...]:
        """What must rest from the moment a question is sent until its reply is kept; the list comes first."""
        return self.chats, self.new, self.delete, self.load


def build() -> ChatList:
    """Inside the sidebar."""
    fresh = gr.Button("New chat", variant="primary", elem_id="dfc-new")
    chats = gr.Radio([], show_label=False, container=False, elem_id="dfc-chats", elem_classes="dfc-chats")
    with gr.Accordion("This chat", open=False):
        title = gr.Textbox(label="Title", max_lines=1, elem_id="dfc-title")
        with gr.Row(elem_classes="dfc-buttons"):
            export = gr.Button("Export", size="sm", elem_id="dfc-export")
            load = gr.UploadButton("Import", size="sm", file_types=[".json"], elem_id="dfc-import")
            delete = gr.Button("Delete", size="sm", variant="stop", elem_id="dfc-delete")
    return ChatList(chats, fresh, title, delete, export, load, gr.JSON(visible=False), gr.JSON(visible=False))


@dataclass(frozen=True, slots=True)
class Shelf:
    """Wires the list to the screen; `shelve` follows every event that changed the chat."""

    screen: Screen
    list: ChatList
    system: gr.Textbox

    @property
    def shown(self) -> list[Any]:
        screen = self.screen
        return [
            screen.conversation, screen.chatbot, screen.footers, screen.selected, screen.xray, self.system,
            self.list.title, self.list.chats,
        ]  # fmt: skip

    def show(self, conversation: Conversation, index: list[dict[str, str]]) -> tuple:
        """Updates that put a chat on the screen; its newest reply goes to the X-ray next."""
        selected = last_reply_id(conversation)
        lines = choices(index, conversation)
        return (
            conversation, bubbles(conversation), packed(footers(conversation, selected)), selected, "",
            conversation["system"], conversation["title"], gr.Radio(lines, value=conversation["id"]),
        )  # fmt: skip

    def shelve(self, event: Any, *, reply: bool = False) -> Any:
        """After `event`: keep the chat in the browser, with the trace of the reply it made, and refresh the list."""
        screen = self.screen
        extra = [screen.selected, screen.xray] if reply else []
        return event.then(
            self._shelved, [self.list.shelf, screen.conversation, *extra],
            [screen.conversation, self.list.title, *self.list.locked], js=SHELVE_REPLY if reply else SHELVE, **QUIET,
        )  # fmt: skip

    def show_trace(self, event: Any) -> Any:
        """After `event`: the selected reply's own trace goes to the X-ray, from the browser."""
        return event.then(
            None, self.screen.selected, self.screen.xray, js="async id => await dflashApp.traceOf(id)", **QUIET
        )

    def wire(self, page: gr.Blocks) -> None:
        screen, chats, shelf = self.screen, self.list, self.list.shelf
        started = page.load(self._booted, shelf, self.shown, js="async () => await dflashApp.boot()", **QUIET)
        self.show_trace(started).then(None, None, None, js="() => dflashApp.closeSidebarWhenNarrow()", **QUIET)
        opened = chats.chats.input(
            self._opened, [shelf, chats.chats], self.shown, js="async (_, id) => [await dflashApp.turnTo(id), id]", **QUIET
        )
        self.show_trace(opened)
        fresh = chats.new.click(self._fresh, [shelf, self.system], self.shown, js=BOOT_FIRST, **QUIET)
        fresh.then(None, None, None, js="() => dflashApp.afterNew()", **QUIET)
        gone = chats.delete.click(
            self._removed, [shelf, screen.conversation], self.shown,
            js="async (_, chat) => [await dflashApp.removeChat(chat), null]", **QUIET,
        )
        self.show_trace(gone)
        named = chats.title.submit(self._renamed, [screen.conversation, chats.title], screen.conversation, **QUIET)
        self.shelve(named)
        self.system.blur(self._with_system, [screen.conversation, self.system], screen.conversation, **QUIET)
        chats.export.click(None, screen.conversation, None, js="async chat => { await dflashApp.exportChat(chat) }", **QUIET)
        self._wire_import()

    def _wire_import(self) -> None:
        chats = self.list
        read = chats.load.upload(_read_upload, chats.load, chats.imported, **QUIET)
        brought = read.success(
            self._booted, chats.imported, self.shown, js="async file => await dflashApp.importChat(file)", **QUIET
        )
        self.show_trace(brought)

    def _booted(self, shelf: dict[str, Any] | None) -> tuple:
        shelf = shelf or {}
        return self.show(shelf.get("current") or new(), shelf.get("index") or [])

    def _opened(self, shelf: dict[str, Any] | None, chosen: str) -> tuple:
        if not shelf or not shelf.get("current"):
            return (gr.skip(),) * len(self.shown)
        return self._booted(shelf)

    def _fresh(self, shelf: dict[str, Any], system: str) -> tuple:
        return self.show(new(system), (shelf or {}).get("index") or [])

    def _renamed(self, conversation: Conversation, title: str) -> Conversation:
        return renamed(conversation, title)

    def _with_system(self, conversation: Conversation, system: str) -> Conversation:
        return conversation | {"system": system}

    def _removed(self, shelf: dict[str, Any] | None, *_: None) -> tuple:
        return self._booted(shelf)

    def _shelved(self, shelf: dict[str, Any] | None, *_: None) -> tuple:
        _, *others = self.list.locked
        free = [type(widget)(interactive=True) for widget in others]
        # The browser could not keep the chat: it stays on screen, and the list as it was.
        if not shelf:
            return gr.skip(), gr.skip(), gr.Radio(interactive=True), *free
        current = shelf["current"]
        chats = gr.Radio(choices(shelf["index"], current), value=current["id"], interactive=True)
        return current if shelf.get("forked") else gr.skip(), current["title"], chats, *free


def _read_upload(path: str) -> dict[str, Any]:
    """The chat of a file for the page to keep; a bad file is a toast and nothing more."""
    try:
        if Path(path).stat().st_size > MAX_IMPORT_BYTES:
            raise ConversationError("This file is too large for a chat.", "", "Choose a file under 64 MiB.")
        conversation, traces = read_import(Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise _toast(ConversationError("This file is not a chat of this app.", "It is not text.", "Choose an export.")) from error
    except DFlashError as error:
        raise _toast(error) from error
    return {"conversation": conversation, "traces": traces}


def _toast(error: DFlashError) -> gr.Error:
    return gr.Error(str(error), print_exception=False)
