"""The guided tour's tab: hands the tour to its script and measures this machine when asked; knows no card's content."""

import json
from dataclasses import asdict
from typing import Any

import gradio as gr

from app.answering import visitor_of
from app.desk import Desk
from app.learn import Costs, costs, tour
from app.race import RaceError, Result, chosen
from app.race_runs import Request, race
from app.settings import Settings
from app.trace import TraceError, parse
from app.widgets import QUIET, channel, packed, warn
from dflash_core import DFlashError

MEASURED_TOKENS, MEASURED_REPEATS = 48, 2
QUESTION = "Explain what a black hole is to a ten-year-old."
SCRIPT = """
const host = element.querySelector('.dfc-host');
const measure = () => trigger("measure", {});
const draw = () => props.value && window.dflashApp.drawTour(host, JSON.parse(props.value), measure);
draw();
watch('value', draw);
"""


def build(desk: Desk) -> None:
    """Inside its tab. Works before any pair is loaded."""
    try:
        value = packed(tour())
    except (TraceError, OSError, json.JSONDecodeError) as error:
        gr.Markdown(f"The tour's recordings cannot be read. {error} Install the app again.", elem_classes="dfc-hint")
        return
    stage = gr.HTML(
        value,
        html_template='<div class="dfc-host"></div>',
        js_on_load=SCRIPT,
        apply_default_css=False,
        container=False,
        padding=False,
        elem_id="dfl-stage",
    )
    measured = channel("drawCosts", None, elem_id="dfl-measured")

    def measure(client: gr.Request) -> str:
        try:
            return packed({"costs": asdict(measure_costs(desk, client)), "machine": machine(desk)})
        except DFlashError as error:
            warn(error)
            return packed({"costs": None})

    stage.measure(measure, None, measured, concurrency_limit=None, concurrency_id="races", **QUIET)


def measure_costs(desk: Desk, client: Any) -> Costs:
    """One pass of each kind on this machine: a short race of plain decoding and DFlash. Raises `DFlashError`."""
    status = desk.engine.status
    if status.phase != "ready":
        raise status.error or RaceError(
            "No pair is ready.", f"The model is {status.phase}.", "Measure again when it is loaded."
        )
    messages = ({"role": "user", "content": QUESTION},)
    settings = Settings(max_new_tokens=MEASURED_TOKENS)
    request = Request(f"{client.session_hash}-costs", visitor_of(client), client.session_hash, messages, settings)
    result: Any = None
    for result in race(desk, request, chosen(status.block_size, ["dflash"]), MEASURED_REPEATS):
        pass
    assert isinstance(result, Result)
    plain, drafted = (parse(entry.shown.ndjson) for entry in result.lanes)
    return costs(plain, drafted)


def machine(desk: Desk) -> str:
    status = desk.engine.status
    return " · ".join((status.pair_name, status.device, status.dtype))
