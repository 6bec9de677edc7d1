"""Turns a text or a chat into the token ids a reply starts from, and reads prompt files; knows no model."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

from dflash_core.errors import PromptError

Message: TypeAlias = Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class ChatPrompt:
    """One line of a prompt file."""

    messages: tuple[Message, ...]
    category: str | None = None


def chat_ids(tokenizer: Any, messages: Sequence[Message], **template_kwargs: Any) -> list[int]:
    """Token ids of a chat through the tokenizer's own template, the reply's opening included unless told otherwise."""
    if not getattr(tokenizer, "chat_template", None):
        raise PromptError(
            "This target has no chat template.",
            "Its tokenizer takes plain text only.",
            "Give plain text or an instruct model.",
        )
    # Templates raise jinja errors of many kinds for roles they do not take, all of them about the messages.
    from jinja2 import TemplateError

    try:
        return list(
            tokenizer.apply_chat_template(
                list(messages), **{"add_generation_prompt": True, "return_dict": False} | template_kwargs, tokenize=True
            )
        )
    except (TemplateError, KeyError, TypeError) as error:
        raise PromptError(
            "The target's chat template refuses these messages.",
            f"It says: {error}.",
            "Give 'role' and 'content' in an order it takes.",
        ) from error


def text_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of plain text, with the special tokens the tokenizer adds by itself."""
    return list(tokenizer(text).input_ids)


def read_prompts(path: str | Path) -> list[ChatPrompt]:
    """The prompts of a JSONL file: each line holds `messages` and perhaps a `category`. Raises `PromptError`."""
    try:
        lines = Path(path).read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise PromptError("The prompt file cannot be read.", f"{error}.", "Give a JSONL file in UTF-8.") from error
    prompts = [_read_line(line, number) for number, line in enumerate(lines, start=1) if line.strip()]
    if not prompts:
        raise PromptError("The prompt file is empty.", f"'{path}' has no prompts.", "Put one JSON object on each line.")
    return prompts


def _read_line(line: str, number: int) -> ChatPrompt:
    def refuse(found: str) -> PromptError:
        return PromptError(
            "The prompt file has a bad line.",
            f"Line {number} {found}.",
            'Write {"messages": [{"role": "user", "content": "…"}]} with an optional "category".',
        )

    try:
        row = json.loads(line)
    except ValueError as error:
        raise refuse(f"is not JSON ({error})") from error
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list) or not messages:
        raise refuse("has no 'messages'")
    if not all(isinstance(m, dict) and isinstance(m.get("role"), str) and "content" in m for m in messages):
        raise refuse("has a message without 'role' and 'content'")
    category = row.get("category")
    return ChatPrompt(tuple(messages), None if category is None else str(category))


def spread(prompts: Sequence[ChatPrompt], limit: int | None) -> list[ChatPrompt]:
    """At most `limit` prompts, taken in turn from each category, so that a few stand for all."""
    if limit is None or limit >= len(prompts):
        return list(prompts)
    return [prompt for prompt, _ in zip(_in_turn(prompts), range(limit), strict=False)]


def _in_turn(prompts: Sequence[ChatPrompt]) -> Iterator[ChatPrompt]:
    queues: dict[str | None, list[ChatPrompt]] = {}
    for prompt in prompts:
        queues.setdefault(prompt.category, []).append(prompt)
    for turn in range(max(map(len, queues.values()))):
        for queue in queues.values():
            yield from queue[turn : turn + 1]
