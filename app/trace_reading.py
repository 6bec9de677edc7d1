"""Reads a trace back and checks every line; refuses damage and newer versions, keeps what is whole of a cut file."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from app.stats import RunStats, summarise
from app.trace_format import FORMAT, VERSION, Event, TraceError, dump_line, load_line, row_text
from dflash_core import Finish, Prefill, Step

MAX_BYTES = 64 * 1024 * 1024


@dataclass(frozen=True, slots=True)
class Trace:
    """A checked trace. `complete` is False when the run was stopped or the file was cut short.

    `rows` are the events as JSON rows with the text of their tokens; `ndjson` is the whole trace, cleaned.
    """

    header: Mapping[str, Any]
    events: tuple[Event, ...]
    rows: tuple[Mapping[str, Any], ...]
    text: str
    complete: bool
    ndjson: str

    @property
    def stats(self) -> RunStats:
        """Totals of the run, see `app.stats`."""
        return summarise(self.events)


def parse(text: str) -> Trace:
    """Read a trace. A last line cut short is dropped; damage before it, or a newer version, raises `TraceError`."""
    first, *lines = text.removeprefix("\ufeff").split("\n")
    header = _read_header(first)
    read = _read_rows(lines)
    events = tuple(event for event, _ in read if event is not None)
    rows = tuple(row for _, row in read)
    _check_order(rows)
    return Trace(
        header=header,
        events=events,
        rows=rows,
        text="".join(map(row_text, rows)),
        complete=bool(events) and isinstance(events[-1], Finish),
        ndjson="".join(map(dump_line, (header, *rows))),
    )


def open_trace(path: str | Path) -> Trace:
    """Read a trace file of at most 64 MiB. Raises `TraceError`."""
    try:
        size_bytes = Path(path).stat().st_size
        if size_bytes > MAX_BYTES:
            raise TraceError("This file is too large.", f"It has {size_bytes:,} bytes.", "Open a trace under 64 MiB.")
        raw = Path(path).read_bytes()
    except OSError as error:
        raise TraceError("This file cannot be read.", f"{error.strerror}.", "Choose another file.") from error
    return parse(_utf8(raw))


def _utf8(raw: bytes) -> str:
    """The text; a character cut in half at the very end is dropped with its line."""
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        if b"\n" in raw[error.start :] or len(raw) - error.start > 3:
            raise _not_a_trace("It holds bytes that are not UTF-8 text.") from error
        return raw[: error.start].decode("utf-8")


def _not_a_trace(found: str) -> TraceError:
    return TraceError("This is not a DFlash trace.", found, "Open a file that was saved as a trace.")


def _damaged(line: int, what: str) -> TraceError:
    return TraceError("This trace is damaged.", f"Line {line}: {what}.", "Open another copy or record the run again.")


def _read_header(line: str) -> dict[str, Any]:
    try:
        header = load_line(line)
    except (ValueError, RecursionError) as error:
        raise _not_a_trace("Its first line is not a trace header.") from error
    if not isinstance(header, dict) or header.get("format") != FORMAT:
        raise _not_a_trace("Its first line is not a trace header.")
    version = header.get("version")
    if type(version) is not int or version < 1:
        raise _not_a_trace(f"Its version is {version!r}.")
    if version > VERSION:
        found = f"It has version {version}, this app reads up to version {VERSION}."
        raise TraceError("This trace was made by a newer version.", found, "Update the app.")
    return _clean_header(header)


def _clean_header(header: Mapping[str, Any]) -> dict[str, Any]:
    """Every field that readers rely on, with the type they rely on."""
    words = {key: str(header.get(key, "")) for key in ("id", "created", "pair", "device", "dtype", "title")}
    settings, messages, pace = header.get("settings"), header.get("messages"), header.get("baseline_seconds")
    return {
        "format": FORMAT,
        "version": VERSION,
        **words,
        "drafting": bool(header.get("drafting", True)),
        "baseline_seconds": float(pace) if type(pace) in (int, float) and pace > 0.0 else None,
        "settings": settings if isinstance(settings, dict) else {},
        "messages": [
            {"role": str(message.get("role", "")), "content": str(message.get("content", ""))}
            for message in (messages if isinstance(messages, list) else [])
            if isinstance(message, dict)
        ],
    }


class _RowError(ValueError):
    """What is wrong with one line, in words for the user."""


def _read_rows(lines: Sequence[str]) -> list[tuple[Event | None, dict[str, Any]]]:
    """The rows up to the end, or up to a last line that was cut short."""
    rows = []
    for number, line in enumerate(lines, 2):
        if not line.strip():
            continue
        try:
            rows.append(_read_row(load_line(line)))
        except (ValueError, RecursionError, KeyError, TypeError) as error:
            if number == len(lines) + 1:
                return rows
            raise _damaged(number, str(error) if isinstance(error, _RowError) else "it cannot be read") from error
    return rows


def _read_row(row: Any) -> tuple[Event | None, dict[str, Any]]:
    """One line as its event (None for `cancel`) and the row without anything unknown."""
    _need(isinstance(row, dict), "it is not an event")
    readers = {"prefill": _read_prefill, "step": _read_step, "finish": _read_finish, "cancel": _read_cancel}
    _need(row.get("t") in readers, "it is not a known event")
    return readers[row["t"]](row)


def _read_prefill(row: Mapping[str, Any]) -> tuple[Event, dict[str, Any]]:
    event = Prefill(_count(row, "prompt_tokens"), _count(row, "first_token"), _seconds(row, "seconds"))
    return event, {"t": "prefill", **asdict(event), "piece": _text(row, "piece")}


def _read_finish(row: Mapping[str, Any]) -> tuple[Event, dict[str, Any]]:
    _need(row["reason"] in ("stop", "length", "context"), "its reason to finish is unknown")
    event = Finish(row["reason"], _count(row, "new_tokens"), _count(row, "steps"), _seconds(row, "seconds"))
    return event, {"t": "finish", **asdict(event), "tail": _text(row, "tail")}


def _read_cancel(row: Mapping[str, Any]) -> tuple[None, dict[str, Any]]:
    return None, {"t": "cancel", "why": _text(row, "why"), "tail": _text(row, "tail")}


def _read_step(row: Mapping[str, Any]) -> tuple[Event, dict[str, Any]]:
    drafted, committed = _many(row, "drafted", int), _many(row, "committed", int)
    k, accepted = len(drafted), _count(row, "accepted")
    _need(accepted <= k, f"{accepted} tokens were accepted of {k} drafted")
    _need(len(committed) <= accepted + 1, f"{len(committed)} tokens were committed after {accepted} accepted")
    event = Step(
        index=_count(row, "index"),
        position=_count(row, "position"),
        anchor=_count(row, "anchor"),
        drafted=drafted,
        posterior=_many(row, "posterior", int, k + 1),
        accepted=accepted,
        correction=_count(row, "correction"),
        committed=committed,
        draft_confidence=_many(row, "draft_confidence", float, k),
        target_confidence=_many(row, "target_confidence", float, k + 1),
        draft_seconds=_seconds(row, "draft_seconds"),
        verify_seconds=_seconds(row, "verify_seconds"),
    )
    return event, {"t": "step", **asdict(event), "pieces": _pieces(row["pieces"], k, len(committed))}


def _pieces(pieces: Mapping[str, Any], k: int, committed: int) -> dict[str, Any]:
    lengths = {"drafted": k, "posterior": k + 1, "committed": committed}
    texts = {key: list(_many(pieces, key, str, length)) for key, length in lengths.items()}
    return texts | {"anchor": _text(pieces, "anchor")}


def _need(ok: bool, what: str) -> None:
    if not ok:
        raise _RowError(what)


def _count(row: Mapping[str, Any], key: str) -> int:
    _need(type(row[key]) is int and 0 <= row[key] < 2**53, f"'{key}' is not a count")
    return row[key]


def _seconds(row: Mapping[str, Any], key: str) -> float:
    _need(type(row[key]) in (int, float) and row[key] >= 0, f"'{key}' is not a number of seconds")
    return float(row[key])


def _text(row: Mapping[str, Any], key: str) -> str:
    _need(isinstance(row[key], str), f"'{key}' is not text")
    return row[key]


def _many(row: Mapping[str, Any], key: str, kind: type, length: int | None = None) -> tuple[Any, ...]:
    """A list of one kind; whole numbers count as probabilities too."""
    kinds = (int, float) if kind is float else (kind,)
    _need(isinstance(row[key], list) and all(type(v) in kinds for v in row[key]), f"'{key}' is not a list of {kind.__name__}")
    _need(length is None or len(row[key]) == length, f"'{key}' has {len(row[key])} entries, not {length}")
    return tuple(row[key])


def _check_order(rows: Sequence[Mapping[str, Any]]) -> None:
    """One prefill, then steps numbered from 0, then at most one end."""
    for index, row in enumerate(rows):
        ok = {
            "prefill": index == 0,
            "step": index > 0 and row.get("index") == index - 1,
            "finish": index > 0 and index == len(rows) - 1,
            "cancel": index == len(rows) - 1,
        }[row["t"]]
        if not ok:
            raise _damaged(index + 2, f"this {row['t']} event is out of order")
