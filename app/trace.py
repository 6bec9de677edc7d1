"""Writes one run as versioned NDJSON: a header line, then one line per event with the text of its tokens.

The same string is the live value of the X-ray, the saved file and the exported page; it refuses to know HTML.
"""

import re
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from app.spans import Detokeniser
from app.stats import RunStats, add
from app.trace_format import FORMAT, VERSION, Event, TraceError, dump_line, row_text
from app.trace_reading import Trace, open_trace, parse
from dflash_core import Finish, Prefill

__all__ = [
    "Recorder", "Trace", "TraceError", "cancel_line", "event_line", "file_name", "header_line", "new_header",
    "open_trace", "parse", "save",
]  # fmt: skip


def new_header(
    *,
    pair: str,
    device: str,
    dtype: str,
    settings: Mapping[str, Any],
    messages: Sequence[Mapping[str, str]] = (),
    drafting: bool = True,
    title: str = "",
    baseline_seconds: float | None = None,
) -> dict[str, Any]:
    """What line 1 says. `settings` are plain JSON values; `messages` the chat (role, content) that was answered;
    `baseline_seconds` what one pass of plain decoding took on this machine before, None when it was not measured."""
    return {
        "format": FORMAT,
        "version": VERSION,
        "id": uuid.uuid4().hex,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "pair": pair,
        "device": device,
        "dtype": dtype,
        "title": title,
        "drafting": drafting,
        "baseline_seconds": baseline_seconds,
        "settings": dict(settings),
        "messages": [{"role": message["role"], "content": message["content"]} for message in messages],
    }


def header_line(header: Mapping[str, Any]) -> str:
    """Line 1 of a trace, newline included."""
    return dump_line(header)


def event_line(event: Event, detokeniser: Detokeniser) -> str:
    """One event as one line, newline included; feeds its tokens to the detokeniser, so call it once, in order."""
    return dump_line(_event_row(event, detokeniser))


def cancel_line(detokeniser: Detokeniser, why: str = "stopped") -> str:
    """The last line of a run that ended before its `Finish`."""
    return dump_line(_cancel_row(detokeniser, why))


class Recorder:
    """Collects one run: add events as they come; read the growing NDJSON, the reply text and the totals any time.

    One thread adds, another may read.
    """

    def __init__(self, header: Mapping[str, Any], tokenizer: Any) -> None:
        self.header = dict(header)
        self.stats = RunStats()
        self._detokeniser = Detokeniser(tokenizer)
        self._lines = [header_line(self.header)]
        self._texts: list[str] = []
        self._ndjson, self._read = "", 0

    def add(self, event: Event) -> str:
        """Record one event; returns its line, the delta to stream."""
        self.stats = add(self.stats, event)
        return self._append(_event_row(event, self._detokeniser))

    def cancel(self, why: str = "stopped") -> str:
        """Close a run that ended without `Finish`; returns its line."""
        return self._append(_cancel_row(self._detokeniser, why))

    @property
    def ndjson(self) -> str:
        """The whole trace so far; each reading starts with the one before. For one reader."""
        new = self._lines[self._read :]
        self._ndjson, self._read = self._ndjson + "".join(new), self._read + len(new)
        return self._ndjson

    @property
    def text(self) -> str:
        """The reply so far, plain, whole characters only."""
        return "".join(self._texts)

    def _append(self, row: Mapping[str, Any]) -> str:
        self._texts.append(row_text(row))
        self._lines.append(line := dump_line(row))
        return line


def save(trace: str | Trace, path: str | Path) -> Path:
    """Write a trace as UTF-8 NDJSON. Raises `TraceError` when the place cannot be written."""
    text = trace.ndjson if isinstance(trace, Trace) else trace
    try:
        Path(path).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TraceError("The trace was not saved.", f"{error.strerror}.", "Choose another folder.") from error
    return Path(path)


def file_name(header: Mapping[str, Any], suffix: str = ".ndjson") -> str:
    """A plain file name that says which pair and when: `dflash-smollm2-135m-20260131-1530.ndjson`."""
    pair = re.sub(r"[^A-Za-z0-9._-]+", "-", str(header.get("pair", ""))).strip("-.")[:60] or "run"
    stamp = re.sub(r"[^0-9T]", "", str(header.get("created", "")))[:13].replace("T", "-")
    return "-".join(filter(None, ("dflash", pair, stamp))) + suffix


def _event_row(event: Event, detokeniser: Detokeniser) -> dict[str, Any]:
    fields = {key: _rounded(key, value) for key, value in asdict(event).items()}
    if isinstance(event, Prefill):
        return {"t": "prefill", **fields, "piece": detokeniser.feed([event.first_token])[0]}
    if isinstance(event, Finish):
        return {"t": "finish", **fields, "tail": detokeniser.flush()}
    pieces = {
        "drafted": [detokeniser.label(token) for token in event.drafted],
        "posterior": [detokeniser.label(token) for token in event.posterior],
        "committed": detokeniser.feed(event.committed),
        "anchor": detokeniser.label(event.anchor),
    }
    return {"t": "step", **fields, "pieces": pieces}


def _cancel_row(detokeniser: Detokeniser, why: str) -> dict[str, Any]:
    return {"t": "cancel", "why": why, "tail": detokeniser.flush()}


def _rounded(key: str, value: Any) -> Any:
    """Seconds to the microsecond, finer than our clocks; probabilities to 0.0001, finer than any bar shows."""
    if key.endswith("confidence"):
        return [round(probability, 4) for probability in value]
    return round(value, 6) if isinstance(value, float) else value
