"""What a trace line looks like and the error that reading one may raise; refuses to open files.

Line 1 is the header, then one line per event: `prefill`, `step`, and at the end `finish` or `cancel`.
"""

import json
import math
import re
from collections.abc import Mapping
from typing import Any, TypeAlias

from dflash_core import DFlashError, Finish, Prefill, Step

Event: TypeAlias = Prefill | Step | Finish

FORMAT, VERSION = "dflash-trace", 1
# "<" never appears raw, so a trace is inert inside a page; lone surrogates are not valid UTF-8.
_UNSAFE = re.compile("[<\u2028\u2029\ud800-\udfff]")


class TraceError(DFlashError):
    """A trace cannot be read, or not by this version."""


def dump_line(row: Mapping[str, Any]) -> str:
    """One row as one line of JSON, newline included."""
    text = json.dumps(row, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    return _UNSAFE.sub(lambda match: f"\\u{ord(match[0]):04x}", text) + "\n"


def load_line(line: str) -> Any:
    """The row of one line; raises `ValueError` for anything but JSON with finite numbers."""
    return json.loads(line, parse_constant=_finite, parse_float=_finite)


def _finite(text: str) -> float:
    if not math.isfinite(number := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return number


def row_text(row: Mapping[str, Any]) -> str:
    """The reply text that one row adds."""
    if "pieces" in row:
        return "".join(row["pieces"]["committed"])
    return row.get("piece", row.get("tail", ""))
