"""Prints a reply to a terminal as it grows, each token in the colour of who wrote it; runs no model."""

from collections.abc import Iterator, Sequence
from typing import Any, TextIO

from dflash_core.events import Event, Finish, Prefill, Step
from dflash_core.tally import Tally

_RESET = "\x1b[0m"
# Blue and amber from the colour-blind-safe palette; bold and underline carry the same without colour.
STYLES = {
    "accepted": "\x1b[38;5;74m",
    "correction": "\x1b[1;4;38;5;214m",
    "bonus": "\x1b[1;4;38;5;214m",
    "first": "\x1b[1m",
    "rejected": "\x1b[9;38;5;245m",
    "plain": "",
}
LEGEND = (("first", "first token"), ("accepted", "accepted"), ("correction", "correction ▲ or bonus ★"))
# Tokens of left context each new piece is decoded with: tokenizers treat the start of a text differently.
_CONTEXT_TOKENS = 6


def may_colour(stream: TextIO, environment: Any) -> bool:
    """Colour for a terminal that can show it and a user who did not say no (NO_COLOR, see no-color.org)."""
    return stream.isatty() and not environment.get("NO_COLOR") and environment.get("TERM") != "dumb"


class TextStream:
    """Token ids to text, whole characters only: the pieces and the last `flush` join to the decoded reply."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._before: list[int] = []
        self._held: list[int] = []

    def push(self, token: int) -> str:
        """The text this token completes, "" while a character is unfinished."""
        self._held.append(token)
        piece = self._piece()
        # A replacement character that the model itself wrote waits here too, for the next token or the flush.
        if piece.endswith("\N{REPLACEMENT CHARACTER}"):
            return ""
        self._keep()
        return piece

    def flush(self) -> str:
        piece = self._piece()
        self._keep()
        return piece

    def _piece(self) -> str:
        return self._decode(self._before + self._held)[len(self._decode(self._before)) :]

    def _keep(self) -> None:
        self._before = (self._before + self._held)[-_CONTEXT_TOKENS:]
        self._held = []

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


class Printer:
    """Writes events to a stream: the running text, or with `show_steps` one line per step and then the text."""

    def __init__(self, stream: TextIO, tokenizer: Any, *, colour: bool, show_steps: bool) -> None:
        self._stream, self._tokenizer = stream, tokenizer
        self._colour, self._show_steps = colour, show_steps
        self._text = TextStream(tokenizer)
        self._later: list[str] = []

    def show(self, event: Event) -> None:
        match event:
            case Prefill():
                self._add_tokens([event.first_token], ["first"])
            case Step():
                self._add_tokens(event.committed, _kinds(event))
        if self._show_steps and not isinstance(event, Finish):
            self._write(self._prefill_line(event) if isinstance(event, Prefill) else self._step_line(event))

    def close(self) -> None:
        """End the text, also when the run was interrupted."""
        self._write("\n" * bool(self._later) + "".join(self._later) + self._text.flush() + "\n")

    def _add_tokens(self, tokens: Sequence[int], kinds: Sequence[str]) -> None:
        for token, kind in zip(tokens, kinds, strict=True):
            if piece := self._text.push(token):
                styled = self._styled(kind, piece)
                self._later.append(styled) if self._show_steps else self._write(styled)

    def _prefill_line(self, event: Prefill) -> str:
        first = self._styled("first", self._label(event.first_token))
        return f"prefill   {event.prompt_tokens} prompt tokens, {event.seconds * 1000:.0f} ms  {first}\n"

    def _step_line(self, step: Step) -> str:
        parts = [f"step {step.index:>3}  {step.accepted}/{len(step.drafted)} accepted  "]
        parts += [f"✓{self._styled('accepted', self._label(t))} " for t in step.drafted[: step.accepted]]
        parts += [f"✗{self._styled('rejected', self._label(t))} " for t in step.drafted[step.accepted :]]
        mark, kind = ("★", "bonus") if step.drafted and step.accepted == len(step.drafted) else ("▲", "correction")
        parts.append(f"{mark}{self._styled(kind, self._label(step.correction))}")
        cut = step.accepted + 1 - len(step.committed)
        parts.append(f"  cut {cut} after the end" if cut else "")
        return "".join(parts) + f"  draft {step.draft_seconds * 1000:.1f} verify {step.verify_seconds * 1000:.1f} ms\n"

    def _label(self, token: int) -> str:
        return repr(self._tokenizer.decode([token], skip_special_tokens=False))

    def _styled(self, kind: str, text: str) -> str:
        style = STYLES[kind] if self._colour else ""
        # Style each line by itself: terminals paint an open style to the edge of the window.
        return "\n".join(f"{style}{line}{_RESET}" if style and line else line for line in text.split("\n"))

    def _write(self, text: str) -> None:
        self._stream.write(text)
        self._stream.flush()


def _kinds(step: Step) -> list[str]:
    """Who wrote each committed token of a step."""
    if not step.drafted:
        return ["plain"] * len(step.committed)
    last = "bonus" if step.accepted == len(step.drafted) else "correction"
    return (["accepted"] * step.accepted + [last])[: len(step.committed)]


def legend() -> str:
    return "  ".join(f"{STYLES[kind]}{name}{_RESET}" for kind, name in LEGEND)


def summary(tally: Tally, ending: str) -> Iterator[str]:
    """The closing numbers, one line each."""
    rate = tally.tokens_per_second
    yield (
        f"{tally.new_tokens} tokens in {tally.seconds:.2f} s"
        + (f" ({rate:.1f} tok/s)" if rate else "")
        + f", ended by {ending}"
    )
    if tally.first_token_seconds is not None:
        yield f"first token after {tally.first_token_seconds * 1000:.0f} ms"
    if tally.drafted:
        yield f"acceptance length τ {tally.tau:.2f} tokens per verify pass over {tally.steps} passes"
        yield f"accepted/drafted {tally.accepted}/{tally.drafted} ({tally.accepted_rate:.1%})"
