"""The figures of the run the X-ray shows, to read closely and save as pictures; draws when looked at, measures nothing."""

from collections.abc import Mapping
from typing import Any

import gradio as gr

from app.charts import figures
from app.trace import TraceError, parse
from app.widgets import QUIET

NAMES = ("committed", "positions", "lengths", "over_time", "time_split")
EMPTY = "Send a message or open a trace: the figures of the run in the X-ray appear here."
HINT = "Point at a figure to read it, drag to zoom, double-click to reset; the camera in its corner saves a PNG."


def build(xray: gr.HTML, tab: gr.Tab) -> None:
    """Inside its tab. The figures follow the X-ray whenever the tab is opened."""
    note = gr.Markdown(EMPTY, elem_classes="dfc-hint")
    plots: dict[str, gr.Plot] = {}
    with gr.Column(visible=False) as body:
        plots["committed"] = gr.Plot(show_label=False, elem_id="dfc-plot-committed")
        for left, right in (("positions", "lengths"), ("over_time", "time_split")):
            with gr.Row():
                for name in (left, right):
                    with gr.Column(min_width=320):
                        plots[name] = gr.Plot(show_label=False, elem_id=f"dfc-plot-{name}")
    dark = gr.Checkbox(visible=False)
    tab.select(_draw, [xray, dark], [note, body, *(plots[name] for name in NAMES)], js=WITH_SCHEME, **QUIET)


WITH_SCHEME = "(trace, _) => [trace, document.body.classList.contains('dark')]"


def _draw(ndjson: str | None, dark: bool) -> tuple[Any, ...]:
    drawn = drawn_figures(ndjson or "", dark)
    if drawn is None:
        return EMPTY, gr.Column(visible=False), *(None for _ in NAMES)
    return HINT, gr.Column(visible=True), *(drawn[name] for name in NAMES)


def drawn_figures(ndjson: str, dark: bool) -> Mapping[str, Any] | None:
    """The figures of a trace, None while it has no step yet."""
    try:
        trace = parse(ndjson)
    except TraceError:
        return None
    return figures(trace.events, plain_seconds=trace.header["baseline_seconds"], dark=dark) if trace.stats.steps else None
