"""Turns decode events into text: each token's piece, whole characters only, and who wrote it.

It refuses to know how text is drawn, saved or sent.
"""

import codecs
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from dflash_core import Finish, Prefill, Step

Kind: TypeAlias = Literal["first", "accepted", "correction", "bonus", "plain"]
Event: TypeAlias = Prefill | Step | Finish

_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"
_BYTE_TOKEN = re.compile(r"<0x[0-9A-F]{2}>")


@dataclass(frozen=True, slots=True)
class Span:
    """A run of reply text from one step (None for the first token) and one kind; joined texts are the reply."""

    text: str
    kind: Kind
    step: int | None


def _byte_alphabet() -> dict[str, int]:
    """The printable stand-ins that byte-level tokenizers use for the 256 bytes, mapped back to the bytes."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    hidden = [byte for byte in range(256) if byte not in printable]
    return {chr(b): b for b in printable} | {chr(256 + i): b for i, b in enumerate(hidden)}


_BYTES = _byte_alphabet()


class Detokeniser:
    """Token ids to text, one reply at a time.

    `feed` gives one piece per token and holds a piece back ("") until its character is whole, so that all pieces
    and the final `flush` join to `tokenizer.decode(ids, skip_special_tokens=True)` without clean-up.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._special = {i for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        self._special |= set(getattr(tokenizer, "all_special_ids", ()))
        self._reader = _ByteReader() if _is_byte_level(tokenizer) else _WindowReader(self._decode)
        self._labels: dict[int, str] = {}
        self._tokens: dict[int, str] = {}

    def feed(self, ids: Iterable[int]) -> list[str]:
        """The text that each token adds to the reply; special tokens add nothing."""
        return ["" if i in self._special else self._reader.feed(i, self._token(i)) for i in ids]

    def flush(self) -> str:
        """What is still held back at the end of the reply (an unfinished character)."""
        return self._reader.flush()

    def label(self, token: int) -> str:
        """One token on its own, for a label: special tokens by name, part of a character as ⟨e2 98⟩."""
        if token not in self._labels:
            self._labels[token] = self._make_label(token)
        return self._labels[token]

    def _make_label(self, token: int) -> str:
        text = self._token(token)
        if token in self._special or not text:
            return text or f"⟨{token}⟩"
        shown = self._decode([token], special=True)
        if _REPLACEMENT in shown:
            return _hex_label(text) or shown
        # A decoder that strips the first blank of a text would hide the blank that starts a word.
        return " " + shown if text.startswith("\N{LOWER ONE EIGHTH BLOCK}") and not shown.startswith(" ") else shown

    def _token(self, token: int) -> str:
        if token not in self._tokens:
            self._tokens[token] = self._tokenizer.convert_ids_to_tokens(token) or ""
        return self._tokens[token]

    def _decode(self, ids: Sequence[int], special: bool = False) -> str:
        return self._tokenizer.decode(
            list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
        )


def _is_byte_level(tokenizer: Any) -> bool:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return type(getattr(backend, "decoder", None)).__name__ == "ByteLevel"


def _token_bytes(text: str) -> bytes:
    mapped = [_BYTES.get(char) for char in text]
    return text.encode() if None in mapped else bytes(mapped)  # type: ignore[arg-type]


def _hex_label(text: str) -> str:
    if _BYTE_TOKEN.fullmatch(text):
        return f"⟨{text[3:5].lower()}⟩"
    return f"⟨{_token_bytes(text).hex(' ')}⟩" if text and all(char in _BYTES for char in text) else ""


class _ByteReader:
    """Byte-level tokenizers: the reply is the tokens' bytes in a row, so an incremental UTF-8 decoder is exact."""

    def __init__(self) -> None:
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def feed(self, token: int, text: str) -> str:
        return self._utf8.decode(_token_bytes(text))

    def flush(self) -> str:
        return self._utf8.decode(b"", final=True)


class _WindowReader:
    """Any other tokenizer: decode a short window twice, before and after the new token, and keep the difference."""

    def __init__(self, decode: Any) -> None:
        self._decode = decode
        self._context: list[int] = []
        self._held: list[int] = []

    def feed(self, token: int, text: str) -> str:
        self._held.append(token)
        # A run of byte tokens may still change as a whole, and a trailing U+FFFD may be half a character.
        if _BYTE_TOKEN.fullmatch(text):
            return ""
        new = self._new_text()
        return "" if new.endswith(_REPLACEMENT) else self._release(new)

    def flush(self) -> str:
        return self._release(self._new_text()) if self._held else ""

    def _new_text(self) -> str:
        return self._decode(self._context + self._held)[len(self._decode(self._context)) :]

    def _release(self, text: str) -> str:
        self._context, self._held = self._held, []
        return text


def committed_kind(step: Step, index: int) -> Kind:
    """Who wrote `step.committed[index]`."""
    if index < step.accepted:
        return "accepted"
    if not step.drafted:
        return "plain"
    return "bonus" if step.accepted == len(step.drafted) else "correction"


def spans(events: Iterable[Event], detokeniser: Detokeniser) -> Iterator[Span]:
    """Fold events into runs of reply text; the texts join to the tokenizer's decode of the reply."""
    last = Span("", "first", None)
    for event in events:
        if isinstance(event, Prefill):
            yield (last := Span(detokeniser.feed([event.first_token])[0], "first", None))
        elif isinstance(event, Step):
            for run in _step_runs(event, detokeniser.feed(event.committed)):
                yield (last := run)
    if tail := detokeniser.flush():
        yield Span(tail, last.kind, last.step)


def _step_runs(step: Step, pieces: Sequence[str]) -> Iterator[Span]:
    accepted = "".join(pieces[: step.accepted])
    if pieces[: step.accepted]:
        yield Span(accepted, "accepted", step.index)
    if rest := pieces[step.accepted :]:
        yield Span("".join(rest), committed_kind(step, step.accepted), step.index)
