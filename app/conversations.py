"""A conversation as plain data: made, cut, checked, imported, turned into chat bubbles; refuses to know of models.

A conversation is a JSON object the browser keeps: `{version, id, title, created, updated, system, messages}`. A message is
`{id, role, content}`, an assistant's also `summary`, the numbers of its run. Contents are the plain text itself.
"""

import json
import re
import secrets
from datetime import UTC, datetime
from typing import Any, TypeAlias

from dflash_core import DFlashError

Conversation: TypeAlias = dict[str, Any]
Message: TypeAlias = dict[str, Any]

FORMAT, VERSION = "dflash-chat", 1
NEW_TITLE = "New chat"
TITLE_CHARACTERS = 48

# Joined after a character that would open HTML, an image or a diagram; the page takes it out again when text is copied.
GUARD = "\u2060"
_OPENS_MARKUP = re.compile(r"<(?=[A-Za-z/!?])|!(?=\[)|(?:`{3,}|~{3,})[ \t]*(?=mermaid)")
_GUARDED = re.compile(rf"(<|!|(?:`{{3,}}|~{{3,}})[ \t]*){GUARD}")


class ConversationError(DFlashError):
    """A conversation file cannot be used."""


def new(system: str = "") -> Conversation:
    now = _now()
    return {
        "version": VERSION, "id": new_id(), "title": NEW_TITLE, "created": now, "updated": now,
        "system": system, "messages": [],
    }  # fmt: skip


def new_id() -> str:
    return secrets.token_hex(8)


def asked(conversation: Conversation, text: str) -> Conversation:
    """The conversation with one more user message."""
    title = conversation["title"] if conversation["messages"] else _title(text)
    return _with(conversation, [*conversation["messages"], {"id": new_id(), "role": "user", "content": text}], title)


def answered(conversation: Conversation, reply_id: str, text: str, summary: dict[str, Any] | None) -> Conversation:
    """The conversation with the reply to its last user message."""
    reply = {"id": reply_id, "role": "assistant", "content": text, "summary": summary}
    return _with(conversation, [*conversation["messages"], reply])


def cut(conversation: Conversation, index: int) -> Conversation:
    """The conversation before message `index`."""
    return _with(conversation, conversation["messages"][:index])


def last_question(conversation: Conversation) -> int | None:
    """Index of the last user message, None when there is none."""
    roles = [message["role"] for message in conversation["messages"]]
    return max((i for i, role in enumerate(roles) if role == "user"), default=None)


def renamed(conversation: Conversation, title: str) -> Conversation:
    return conversation | {"title": _title(title)}


def prompt_messages(conversation: Conversation) -> list[dict[str, str]]:
    """What the chat template gets: the system prompt if there is one, then the turns."""
    system = [{"role": "system", "content": conversation["system"]}] if conversation["system"].strip() else []
    return system + [{"role": m["role"], "content": m["content"]} for m in conversation["messages"]]


def guard(text: str) -> str:
    """Text whose `<`, `![` and diagram fences cannot become markup; looks the same, `unguard` restores it."""
    return _OPENS_MARKUP.sub(lambda found: found[0] + GUARD, text)


def unguard(text: str) -> str:
    return _GUARDED.sub(r"\1", text)


def bubbles(conversation: Conversation, writing: str | None = None) -> list[dict[str, Any]]:
    """The chatbot's value; `writing` is the reply in progress."""
    turns = [(message["role"], message["content"]) for message in conversation["messages"]]
    if writing is not None:
        turns.append(("assistant", writing))
    return [{"role": role, "content": [{"type": "text", "text": guard(text)}]} for role, text in turns]


def read_import(text: str) -> tuple[Conversation, dict[str, str]]:
    """A conversation file's conversation, under a fresh id, and its traces by message id. Raises `ConversationError`."""
    try:
        raw = json.loads(text)
    except ValueError as error:
        raise _refuse("It is not JSON.") from error
    if not isinstance(raw, dict) or raw.get("format") != FORMAT:
        raise _refuse(f"It does not say \"format\": \"{FORMAT}\".")
    if not isinstance(raw.get("version"), int) or raw["version"] > VERSION:
        raise ConversationError(
            "This chat comes from a newer version.",
            f"Its version is {raw.get('version')!r}, this app reads up to {VERSION}.",
            "Update the app, then import it again.",
        )
    traces = raw.get("traces") or {}
    if not isinstance(traces, dict) or not all(isinstance(value, str) for value in traces.values()):
        raise _refuse("Its traces are not text.")
    conversation = checked(raw.get("conversation"))
    fresh = {message["id"]: new_id() for message in conversation["messages"]}
    messages = [message | {"id": fresh[message["id"]]} for message in conversation["messages"]]
    kept = {fresh[old]: trace for old, trace in traces.items() if old in fresh}
    return conversation | {"id": new_id(), "messages": messages, "updated": _now()}, kept


def checked(raw: Any) -> Conversation:
    """A conversation from outside, with exactly the known fields. Raises `ConversationError`."""
    if not isinstance(raw, dict) or not isinstance(raw.get("messages"), list):
        raise _refuse("It holds no list of messages.")
    messages = [_checked_message(message, index) for index, message in enumerate(raw["messages"])]
    now = _now()
    texts = {key: raw.get(key, default) for key, default in (
        ("id", new_id()), ("title", NEW_TITLE), ("created", now), ("updated", now), ("system", ""),
    )}  # fmt: skip
    for key, value in texts.items():
        if not isinstance(value, str):
            raise _refuse(f"Its '{key}' is not text.")
    return {"version": VERSION, **texts, "messages": messages}


def _checked_message(raw: Any, index: int) -> Message:
    role = ("user", "assistant")[index % 2]
    if not isinstance(raw, dict) or raw.get("role") != role or not isinstance(raw.get("content"), str):
        raise _refuse(f"Message {index + 1} should be the {role}'s, with its text as 'content'.")
    message = {"id": str(raw.get("id") or new_id()), "role": role, "content": raw["content"]}
    if role == "assistant":
        summary = raw.get("summary")
        message["summary"] = summary if isinstance(summary, dict) else None
    return message


def _refuse(found: str) -> ConversationError:
    return ConversationError("This file is not a chat of this app.", found, "Choose a file made by Export.")


def _with(conversation: Conversation, messages: list[Message], title: str | None = None) -> Conversation:
    return conversation | {"messages": messages, "title": title or conversation["title"], "updated": _now()}


def _title(text: str) -> str:
    line = " ".join(text.split())
    if not line:
        return NEW_TITLE
    return line if len(line) <= TITLE_CHARACTERS else line[: TITLE_CHARACTERS - 1].rstrip() + "…"


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
