"""The suite below the race: built-in prompts through the same lanes, as a table, bars and files; measures nothing."""

import tempfile
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import gradio as gr

from app import suites
from app.race import RaceError
from app.race_charts import suite_figure
from app.race_tab import RaceTab, wire_run
from app.race_view import TABLE_HEAD, suite_progress_view, table_rows
from app.race_words import as_csv
from app.widgets import channel, packed

HINT = (
    "The built-in prompts through the lanes and with the repeats chosen above. Whiskers and spreads reach from the "
    "slowest to the fastest repeat; the camera in the figure's corner saves a PNG."
)


def build(race: RaceTab) -> None:
    """Inside the race's tab, below it. A shared host offers no suites: they are many runs."""
    if race.desk.limits.runs_per_minute is not None:
        return
    with gr.Accordion("Suite: many prompts, by category", open=False, elem_id="dfr-suite"):
        gr.Markdown(HINT, elem_classes="dfc-hint")
        with gr.Row(elem_classes="dfr-setup"):
            categories = gr.CheckboxGroup(
                list(suites.CATEGORIES), value=list(suites.CATEGORIES), label="Categories", elem_id="dfr-categories"
            )
            each = gr.Slider(1, 13, 1, step=1, label="Prompts of each", elem_id="dfr-each")
        with gr.Row(elem_classes="dfr-buttons"):
            start = gr.Button("Run the suite", variant="primary", elem_id="dfr-suite-start")
            stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dfr-suite-stop")
        progress = channel("drawRaceProgress", None, elem_classes="dfr-progress-host")
        with gr.Column(visible=False) as body:
            plot = gr.Plot(show_label=False, elem_id="dfr-suite-plot")
            table = channel("drawSuite", None, elem_id="dfr-suite-table")
            with gr.Row(elem_classes="dfr-buttons"):
                downloads = [
                    gr.DownloadButton(words, size="sm", elem_id=f"dfr-suite-{kind}")
                    for kind, words in (("csv", "Table (CSV)"), ("json", "All numbers (JSON)"))
                ]
    def measure(data: Mapping[Any, Any], client: gr.Request) -> Iterator[dict[str, Any] | suites.SuiteResult]:
        return _told(race, data, client, suites.pick(data[categories] or (), int(data[each])))

    def show(result: suites.SuiteResult, dark: bool) -> dict[Any, Any]:
        rows = suites.table(result)
        return {
            body: gr.Column(visible=True), plot: suite_figure(rows, dark=dark),
            table: packed({"head": TABLE_HEAD, "rows": table_rows(rows)}), **_saved(result, downloads),
        }  # fmt: skip

    own = replace(race, start=start, stop=stop, progress=progress)
    wire_run(
        own, race.inputs | {categories, each}, [start, stop, progress, body, plot, table, *downloads],
        {body: gr.Column(visible=False)}, measure, show,
    )  # fmt: skip


def _told(
    race: RaceTab, data: Mapping[Any, Any], client: gr.Request, prompts: tuple[suites.Prompt, ...]
) -> Iterator[dict[str, Any] | suites.SuiteResult]:
    """What the progress line is told, then the result. Raises `DFlashError`."""
    settings, lanes, repeats = race.read(data)
    if not prompts:
        raise RaceError("There is nothing to run.", "No category is chosen.", "Choose one.")
    for told in suites.suite(race.desk, race.request(data, client, settings, None), lanes, prompts, repeats):
        yield told if isinstance(told, suites.SuiteResult) else suite_progress_view(told, lanes, repeats)


def _saved(result: suites.SuiteResult, downloads: list[gr.DownloadButton]) -> dict[Any, Any]:
    folder = Path(tempfile.mkdtemp(prefix="dflash-suite-"))
    table, numbers = folder / "dflash-suite.csv", folder / "dflash-suite.json"
    table.write_text(as_csv(suites.table(result), suites.HEAD), encoding="utf-8")
    numbers.write_text(suites.as_json(result), encoding="utf-8")
    return {
        button: gr.DownloadButton(value=str(path)) for button, path in zip(downloads, (table, numbers), strict=True)
    }
