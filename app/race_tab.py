"""The race: sets it up, runs it, hands the result to the page and to files; measures nothing itself."""

import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from app import suites
from app.answering import visitor_of
from app.desk import Desk
from app.race import PLAIN, Lane, RaceError, Result, catalogue, chosen
from app.race_card import card
from app.race_runs import Request, race
from app.race_view import EMPTY, progress_view, race_view
from app.race_words import as_csv, as_json, record
from app.settings import Settings
from app.settings_panel import SettingsPanel
from app.space import ZeroEngine
from app.widgets import QUIET, channel, packed, warn
from dflash_core import DFlashError

LOAD_POLL_SECONDS = 0.25
FIRST_PROMPT = "Write a Python function that returns the n-th Fibonacci number using a loop."
HINT = (
    "One prompt, the same settings, the same device: every lane is measured on its own, in turns, several times. "
    "Then the laps are replayed side by side. Sampling and the system prompt come from the sidebar. Predictable text, "
    "such as code, gains most: try prompts of your own."
)


@dataclass(frozen=True, slots=True)
class RaceTab:
    """The widgets that a race or a suite reads and changes."""

    desk: Desk
    settings: SettingsPanel
    prompt: gr.Textbox
    lanes: gr.CheckboxGroup
    repeats: gr.Slider
    tokens: gr.Slider
    start: gr.Button
    stop: gr.Button
    progress: gr.HTML
    stage: gr.HTML
    files: gr.Row
    picture: gr.Image
    downloads: tuple[gr.DownloadButton, ...]

    @property
    def inputs(self) -> set[Any]:
        return {
            self.prompt,
            self.lanes,
            self.repeats,
            self.tokens,
            self.settings.system,
            *self.settings.inputs.values(),
        }

    @property
    def outputs(self) -> list[Any]:
        return [self.start, self.stop, self.progress, self.stage, self.files, self.picture, *self.downloads]

    def read(self, data: Mapping[Any, Any]) -> tuple[Settings, tuple[Lane, ...], int]:
        """Settings, lanes and repeats as chosen. Raises `DFlashError`."""
        status = self.desk.engine.status
        if status.phase != "ready":
            raise status.error or RaceError(
                "No pair is ready.", f"The model is {status.phase}.", "Load a pair in the sidebar."
            )
        settings = self.settings.read(data)
        raw = settings.to_dict() | {"max_new_tokens": data[self.tokens], "drafting": True, "block_size": None}
        settings = Settings.of(raw).capped(self.desk.limits.max_new_tokens)
        lanes = chosen(status.block_size, data[self.lanes] or ())
        repeats = max(2, int(data[self.repeats]))
        self._check_cost(len(lanes), repeats)
        return settings, lanes, repeats

    def request(self, data: Mapping[Any, Any], client: gr.Request, settings: Settings, prompt: str | None) -> Request:
        """Who asks, and the chat up to the prompt (None: the suite adds its own)."""
        system = data[self.settings.system] or ""
        messages = [{"role": "system", "content": system}] if system.strip() else []
        messages += [] if prompt is None else [{"role": "user", "content": prompt}]
        return Request(race_session(client), visitor_of(client), client.session_hash, tuple(messages), settings)

    def _check_cost(self, lanes: int, repeats: int) -> None:
        allowed, needed = self.desk.limits.runs_per_minute, lanes * (repeats + 2) - 1
        if allowed is not None and needed > allowed:
            raise RaceError(
                "This race is too long for a shared host.",
                f"It takes up to {needed} runs, {allowed} a minute are allowed.",
                "Take fewer lanes or repeats, or run the app yourself.",
            )


def build(desk: Desk, settings: SettingsPanel, tab: gr.Tab) -> RaceTab:
    """Inside its tab."""
    gr.Markdown(HINT, elem_classes="dfc-hint")
    with gr.Row(elem_classes="dfr-setup"):
        with gr.Column(scale=6, min_width=300):
            prompt = gr.Textbox(FIRST_PROMPT, label="Prompt", lines=3, max_lines=8, elem_id="dfr-prompt")
            built_in = gr.Dropdown(
                [(f"{one.category}: {one.text[:90]}", one.text) for one in suites.built_in()],
                value=None,
                label="Or take a built-in prompt",
                elem_id="dfr-built-in",
            )
        with gr.Column(scale=5, min_width=300):
            lanes = gr.CheckboxGroup(label="Against plain decoding", elem_id="dfr-lanes", **_lanes(desk))
            with gr.Row():
                repeats = gr.Slider(
                    2, 9, 2 if desk.limits.runs_per_minute else 3, step=1, label="Repeats", elem_id="dfr-repeats"
                )
                tokens = gr.Slider(16, 512, 96, step=16, label="Tokens at most", elem_id="dfr-tokens")
    with gr.Row(elem_classes="dfr-buttons"):
        start = gr.Button("Race", variant="primary", elem_id="dfr-start")
        stop = gr.Button("Stop", variant="stop", visible=False, elem_id="dfr-stop")
    progress = channel("drawRaceProgress", None, elem_classes="dfr-progress-host")
    stage = channel("drawRace", EMPTY, elem_id="dfr-stage")
    with gr.Row(visible=False, elem_classes="dfr-files") as files:
        with gr.Column(scale=5, min_width=300):
            picture = gr.Image(
                show_label=False,
                interactive=False,
                buttons=[],
                container=False,
                elem_id="dfr-card",
                type="filepath",
                format="png",
            )
        with gr.Column(scale=2, min_width=180):
            gr.Markdown(
                "**Share it.** The card says no more than was measured; the files hold every lap.",
                elem_classes="dfc-hint",
            )
            downloads = tuple(
                gr.DownloadButton(words, size="sm", elem_id=f"dfr-save-{kind}")
                for kind, words in (("png", "Card (PNG)"), ("csv", "Table (CSV)"), ("json", "All numbers (JSON)"))
            )
    race_tab = RaceTab(
        desk, settings, prompt, lanes, repeats, tokens, start, stop, progress, stage, files, picture, downloads
    )
    _wire(race_tab, built_in, tab)
    return race_tab


def race_session(client: gr.Request) -> str:
    """A race is no reply: the tab may chat beside it, each waiting its turn."""
    return f"{client.session_hash}-race"


def _lanes(desk: Desk) -> dict[str, Any]:
    """What the pair in memory can run; DFlash is chosen until a reader chooses otherwise."""
    lanes = catalogue(desk.engine.status.block_size)
    if not desk.engine.status.fits_transformers:
        lanes.pop("hf-dflash", None)
    # transformers' own loops would run outside the process that is lent a GPU.
    offered = [
        lane
        for lane in lanes.values()
        if lane.key != PLAIN and (lane.own_loop or not isinstance(desk.engine, ZeroEngine))
    ]
    first = "dflash" if "dflash" in lanes else "prompt-lookup"
    return {"choices": [(lane.label, lane.key) for lane in offered], "value": [first] if offered else []}


def _wire(tab: RaceTab, built_in: gr.Dropdown, place: gr.Tab) -> None:
    shown = gr.State(-1)

    def refresh(seen: int) -> tuple[Any, Any]:
        version = tab.desk.engine.status.version
        return (gr.skip(), gr.skip()) if version == seen else (gr.CheckboxGroup(**_lanes(tab.desk)), version)

    def measure(data: Mapping[Any, Any], client: gr.Request) -> Iterator[dict[str, Any] | Result]:
        settings, lanes, repeats = tab.read(data)
        if not (data[tab.prompt] or "").strip():
            raise RaceError("The prompt is empty.", "", "Write one or take a built-in prompt.")
        for told in race(tab.desk, tab.request(data, client, settings, data[tab.prompt]), lanes, repeats):
            yield told if isinstance(told, Result) else progress_view(told, lanes, repeats)

    place.select(refresh, shown, [tab.lanes, shown], queue=False, **QUIET)
    built_in.input(_taken, built_in, tab.prompt, queue=False, **QUIET)
    wire_run(
        tab, tab.inputs, tab.outputs, {tab.stage: packed(EMPTY), tab.files: gr.Row(visible=False)}, measure,
        lambda result, _: _shown(tab, result),
    )  # fmt: skip


def wire_run(
    tab: RaceTab, inputs: set[Any], outputs: list[Any], cleared: Mapping[Any, Any],
    measure: Callable[[Mapping[Any, Any], gr.Request], Iterator[Any]], show: Callable[[Any, bool], dict[Any, Any]],
) -> None:  # fmt: skip
    """Wire start and stop. `measure` tells the progress line's values (dicts), then the result; `show` draws it.

    Three events: at every update Gradio builds all of an event's outputs anew, in the process that is being measured, so
    the event that measures has one output. `cleared` are the updates at the start; `show` is told whether it is dark.
    """
    results: dict[str, Any] = {}
    dark = gr.Checkbox(visible=False)

    def run(data: Mapping[Any, Any], client: gr.Request) -> Iterator[dict[Any, Any]]:
        results.pop(client.session_hash, None)
        try:
            yield from _until_loaded(tab)
            for told in measure(data, client):
                if isinstance(told, dict):
                    yield {tab.progress: packed(told)}
                else:
                    results[client.session_hash] = told
        except DFlashError as error:
            warn(error)
            yield {tab.progress: packed(None)}

    def end(is_dark: bool, client: gr.Request) -> dict[Any, Any]:
        result = results.pop(client.session_hash, None)
        return _closed(tab) | ({} if result is None else show(result, is_dark))

    def stop(client: gr.Request) -> dict[Any, Any]:
        tab.desk.close(race_session(client))
        return _closed(tab)

    begun = tab.start.click(lambda: _opened(tab) | dict(cleared), None, outputs, concurrency_limit=None, **QUIET)
    running = begun.then(
        run, inputs, [tab.progress], preprocess=False, concurrency_limit=None, concurrency_id="races", **QUIET
    )
    running.then(end, dark, outputs, js="() => [document.body.classList.contains('dark')]", concurrency_limit=None, **QUIET)
    tab.stop.click(stop, None, [tab.start, tab.stop, tab.progress], cancels=[running], queue=False, **QUIET)


def _taken(text: str | None) -> Any:
    return text or gr.skip()


def _until_loaded(tab: RaceTab) -> Iterator[dict[Any, Any]]:
    while not tab.desk.engine.wait(LOAD_POLL_SECONDS):
        yield {tab.progress: packed({"text": "The model is still loading: the race starts as soon as it is ready."})}


def _opened(tab: RaceTab) -> dict[Any, Any]:
    return {
        tab.start: gr.Button(interactive=False),
        tab.stop: gr.Button(visible=True),
        tab.progress: packed({"text": "Starting."}),
    }


def _closed(tab: RaceTab) -> dict[Any, Any]:
    return {tab.start: gr.Button(interactive=True), tab.stop: gr.Button(visible=False), tab.progress: packed(None)}


def _shown(tab: RaceTab, result: Result) -> dict[Any, Any]:
    folder = Path(tempfile.mkdtemp(prefix="dflash-race-"))
    png, table, numbers = (folder / f"dflash-race.{suffix}" for suffix in ("png", "csv", "json"))
    png.write_bytes(card(result))
    table.write_text(as_csv([record(entry) for entry in result.lanes]), encoding="utf-8")
    numbers.write_text(as_json(result), encoding="utf-8")
    saved = dict(zip(tab.downloads, (png, table, numbers), strict=True))
    return {
        tab.stage: packed(race_view(result)),
        tab.files: gr.Row(visible=True),
        tab.picture: str(png),
        **{button: gr.DownloadButton(value=str(path)) for button, path in saved.items()},
    }
