"""Traces: save the run in the X-ray, open a saved one, export it as a page, look at the recorded example; runs nothing."""

import tempfile
from pathlib import Path
from typing import Any

import gradio as gr

from app.render import export_page, xray_kwargs
from app.trace import Trace, TraceError, file_name, open_trace, parse, save
from app.widgets import ASSETS, QUIET, told

RECORDED = ASSETS.parent / "traces"
NONE_YET = "**No trace here yet.** Open a file, show the run from the chat, or look at the recorded example."


def build(xray: gr.HTML, tab: gr.Tab) -> None:
    """Inside its tab, which opens on the chat's run; `xray` is the chat's."""
    gr.Markdown(
        "A trace holds one run: its settings, its chat and every step. Open it later or on another machine, "
        "or export it as one HTML page that works offline.",
        elem_classes="dfc-hint",
    )
    with gr.Row(elem_classes="dfc-trace-bar"):
        from_chat = gr.Button("Run from the chat", size="sm", elem_id="dfc-trace-chat")
        opened = gr.UploadButton("Open trace…", size="sm", file_types=[".ndjson", ".jsonl", ".txt"], elem_id="dfc-trace-open")
        example = gr.Button("Recorded example", size="sm", elem_id="dfc-trace-example", visible=bool(recorded()))
        as_file = gr.DownloadButton("Save trace", size="sm", interactive=False, elem_id="dfc-trace-save")
        as_page = gr.DownloadButton("Export page", size="sm", interactive=False, elem_id="dfc-trace-export")
    about = gr.Markdown(NONE_YET, elem_classes="dfc-hint", sanitize_html=True)
    viewer = gr.HTML(**xray_kwargs(label="Trace", elem_id="dfc-trace-view"))
    shown = [viewer, about, as_file, as_page]
    tab.select(_first_look, [viewer, xray], shown, **QUIET)
    from_chat.click(_from_chat, xray, shown, **QUIET)
    opened.upload(_from_file, opened, shown, **QUIET)
    example.click(_example, None, shown, **QUIET)


def recorded() -> list[Path]:
    """The traces that ship with the app."""
    return sorted(RECORDED.glob("*.ndjson"))


def _first_look(open_here: str | None, ndjson: str | None) -> tuple[Any, ...]:
    return _show(None) if open_here or not ndjson else _from_chat(ndjson)


def _from_chat(ndjson: str | None) -> tuple[Any, ...]:
    return _show(told(lambda: _with_steps(ndjson or "")))


def _from_file(path: str) -> tuple[Any, ...]:
    return _show(told(lambda: open_trace(path)))


def _example() -> tuple[Any, ...]:
    return _show(told(lambda: open_trace(recorded()[0])))


def _with_steps(ndjson: str) -> Trace:
    if not ndjson:
        raise TraceError("There is no run to show.", "The X-ray of the chat is empty.", "Send a message first.")
    return parse(ndjson)


def _show(trace: Trace | None) -> tuple[Any, ...]:
    """Updates for the viewer and both downloads; nothing changes when there is no trace."""
    if trace is None:
        return (gr.skip(),) * 4
    folder = Path(tempfile.mkdtemp(prefix="dflash-trace-"))
    as_file = save(trace, folder / file_name(trace.header))
    as_page = folder / file_name(trace.header, ".html")
    as_page.write_text(export_page(trace), encoding="utf-8")
    return (
        trace.ndjson,
        _about(trace),
        gr.DownloadButton(value=str(as_file), interactive=True),
        gr.DownloadButton(value=str(as_page), interactive=True),
    )


def _about(trace: Trace) -> str:
    stats = trace.stats
    state = "complete" if trace.complete else "cut short"
    tau = "" if stats.tau is None else f" · τ {stats.tau:.2f}"
    return f"{stats.new_tokens:,} tokens in {stats.steps:,} passes{tau} · {state}"
