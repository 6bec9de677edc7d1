"""Prompts: chat JSONL in, token ids of the target's own template out; knows no model and no decoding."""

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_core.errors import TrainingError

_MARK = "USER TEXT GOES HERE"


@dataclass(frozen=True, slots=True)
class Prompt:
    """A conversation that waits for the assistant."""

    messages: tuple[Mapping[str, str], ...]
    category: str = "other"

    @property
    def normalised(self) -> str:
        """Equal for prompts that differ in case and white space only."""
        return "\x1e".join(f"{m['role']}\x1f{' '.join(m['content'].split()).casefold()}" for m in self.messages)

    def key(self, sample: int = 0) -> int:
        """A stable 63-bit name of this prompt's `sample`-th reply."""
        digest = hashlib.blake2b(f"{sample}\x1d{self.normalised}".encode(), digest_size=8).digest()
        return int.from_bytes(digest, "big") >> 1


def user_prompt(text: str, category: str = "other") -> Prompt:
    return Prompt(({"role": "user", "content": text},), category)


def _conversation(row: Any) -> tuple[Mapping[str, str], ...]:
    """The messages up to the last user turn; what an assistant answered there is dropped. Raises `ValueError`."""
    messages = row.get("messages") if isinstance(row, dict) else None
    if not isinstance(messages, list):
        raise ValueError("there is no list 'messages'")
    for message in messages:
        if not (
            isinstance(message, dict)
            and isinstance(message.get("role"), str)
            and isinstance(message.get("content"), str)
        ):
            raise ValueError("a message lacks a 'role' or a 'content' text")
    users = [
        index for index, message in enumerate(messages) if message["role"] == "user" and message["content"].strip()
    ]
    if not users:
        raise ValueError("there is no user message")
    return tuple({"role": m["role"], "content": m["content"]} for m in messages[: users[-1] + 1])


def read_prompts(path: Path) -> Iterator[Prompt]:
    """Prompts of a JSONL file of `{"messages": [...], "category": "..."}`. Raises `TrainingError` naming the line."""
    number = 0
    try:
        with path.open(encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                if line.strip():
                    row = json.loads(line)
                    yield Prompt(_conversation(row), str(row.get("category") or "other"))
    except (ValueError, OSError) as error:  # bad JSON and bad UTF-8 are ValueErrors
        where = f"{path}, line {number + isinstance(error, UnicodeDecodeError)}" if number else f"{path}"
        raise TrainingError(
            "A prompt file cannot be read.",
            f"{where}: {error}.",
            'Each line must be {"messages": [{"role": …, "content": …}]}.',
        ) from error


def append_prompts(path: Path, prompts: Iterable[Prompt]) -> None:
    with path.open("a", encoding="utf-8") as file:
        for prompt in prompts:
            file.write(
                json.dumps({"messages": list(prompt.messages), "category": prompt.category}, ensure_ascii=False) + "\n"
            )


def mend_tail(path: Path) -> None:
    """Cut off a last line that a killed run left half-written."""
    if path.exists():
        data = path.read_bytes()
        if data and not data.endswith(b"\n"):
            path.write_bytes(data[: data.rfind(b"\n") + 1])


@dataclass
class Unique:
    """Filters prompts seen before (normalised) or to be kept out, such as evaluation prompts; counts what it drops."""

    seen: set[str] = field(default_factory=set)
    excluded: frozenset[str] = frozenset()
    duplicates: int = 0
    held_out: int = 0

    def take(self, prompt: Prompt) -> bool:
        name = prompt.normalised
        if name in self.excluded:
            self.held_out += 1
        elif name in self.seen:
            self.duplicates += 1
        else:
            self.seen.add(name)
            return True
        return False


class Template:
    """The target's chat template as functions from messages to ids and text."""

    def __init__(self, tokenizer: Any, options: Mapping[str, Any] | None = None) -> None:
        """`options` go to the template, such as `enable_thinking`. Raises `TrainingError` where there is none."""
        self.tokenizer, self.options = tokenizer, dict(options or {})
        if not getattr(tokenizer, "chat_template", None):
            raise TrainingError(
                "This target has no chat template.", "Its tokenizer brings none.", "Choose an instruction-tuned target."
            )

    @property
    def sha256(self) -> str:
        text = json.dumps([self.tokenizer.chat_template, self.options], sort_keys=True)
        return hashlib.sha256(text.encode()).hexdigest()

    def text(self, messages: Sequence[Mapping[str, str]], reply_next: bool = True) -> str:
        """Raises `TrainingError` for a conversation that the template refuses."""
        from jinja2 import TemplateError

        try:
            rendered = self.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=reply_next, **self.options
            )
        except TemplateError as error:
            raise TrainingError(
                "The target's chat template refuses a prompt.",
                f"It says: {error}. The prompt's roles are {', '.join(m['role'] for m in messages)}.",
                "Remove such prompts.",
            ) from error
        return str(rendered)

    def ids(self, texts: Sequence[str]) -> list[list[int]]:
        """Token ids of rendered texts; special tokens are the template's business."""
        return (
            [list(ids) for ids in self.tokenizer(list(texts), add_special_tokens=False)["input_ids"]] if texts else []
        )

    def open_user_turn(self) -> str:
        """The rendered text up to where a user's words begin, for the target to go on from."""
        head, found, _ = self.text([{"role": "user", "content": _MARK}]).partition(_MARK)
        assert found
        return head


@dataclass(frozen=True, slots=True)
class Encoded:
    """A prompt's key, ids and category, ready for any back end."""

    key: int
    ids: tuple[int, ...]
    category: str


def encode(
    prompts: Sequence[Prompt], template: Template, samples: int, too_long: Callable[[int], bool]
) -> Iterator[Encoded]:
    """Keys and ids of every prompt that is not `too_long(tokens)`, `samples` times each."""
    for start in range(0, len(prompts), 1000):
        part = prompts[start : start + 1000]
        for prompt, ids in zip(part, template.ids([template.text(p.messages) for p in part]), strict=True):
            if not too_long(len(ids)):
                yield from (Encoded(prompt.key(sample), tuple(ids), prompt.category) for sample in range(samples))
