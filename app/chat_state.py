"""What the chat tab's widgets hold, as values: makes updates for them from conversations and runs; starts nothing."""

from collections.abc import Mapping, Sequence
from typing import Any

from app.conversations import Conversation, asked, cut, last_question
from app.summary import footer

WRITING = {"text": "writing…", "warning": "", "id": ""}


def footers(conversation: Conversation, selected: str = "", writing: bool = False) -> dict[str, Any]:
    """One footer per reply, in order, and which reply the X-ray shows."""
    items = [
        footer(message.get("summary")) | {"id": message["id"]}
        for message in conversation["messages"]
        if message["role"] == "assistant"
    ]
    return {"items": [*items, WRITING] if writing else items, "selected": selected}


def last_reply_id(conversation: Conversation | None) -> str:
    """The id of the newest reply, "" without one."""
    messages = conversation["messages"] if conversation else []
    return next((message["id"] for message in reversed(messages) if message["role"] == "assistant"), "")


def choices(index: Sequence[Mapping[str, str]], conversation: Conversation) -> list[tuple[str, str]]:
    """Lines of the list of chats; one that is not saved yet stands first."""
    lines = [(line["title"], line["id"]) for line in index]
    if any(line["id"] == conversation["id"] for line in index):
        return lines
    return [(conversation["title"], conversation["id"]), *lines]


def to_retry(conversation: Conversation) -> Conversation | None:
    """The chat up to its last question, None when there is nothing to answer."""
    question = last_question(conversation)
    return None if question is None else cut(conversation, question + 1)


def undone(conversation: Conversation) -> tuple[Conversation, str]:
    """The chat without its last question and all after it, and the question's text."""
    question = last_question(conversation)
    if question is None:
        return conversation, ""
    return cut(conversation, question), conversation["messages"][question]["content"]


def edited(conversation: Conversation, index: int, text: str) -> Conversation:
    """The chat up to message `index`, asked anew."""
    return asked(cut(conversation, index), text)
