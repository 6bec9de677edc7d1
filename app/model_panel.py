"""The model picker and the line that says what is loaded; starts loads, never waits for one."""

from dataclasses import dataclass

import gradio as gr

from app.engine import Choice, Engine, Status
from app.limits import Limits
from app.widgets import QUIET, channel, packed, told, warn

CUSTOM = "Other models…"
LOADING_TICK_SECONDS, IDLE_TICK_SECONDS = 0.5, 5.0


@dataclass(frozen=True, slots=True)
class ModelPanel:
    """The picker's widgets; `show` wires the status line once the page has one."""

    engine: Engine
    limits: Limits
    pair: gr.Dropdown
    target: gr.Textbox
    draft: gr.Textbox
    custom: gr.Group
    load: gr.Button


def build(engine: Engine, limits: Limits, pairs: tuple[str, ...]) -> ModelPanel:
    """Inside the sidebar."""
    offered = [name for name in pairs if limits.pairs is None or name in limits.pairs]
    chosen = engine.status.choice
    custom_now = chosen is not None and chosen.target is not None
    names = offered if limits.pairs is not None else [*offered, CUSTOM]
    pair = gr.Dropdown(names, value=CUSTOM if custom_now else (chosen or Choice()).name, label="Pair", elem_id="dfc-pair")
    with gr.Group(visible=custom_now) as custom:
        target = gr.Textbox(
            chosen.target or "" if chosen else "", label="Target", placeholder="Hub id or folder", elem_id="dfc-target"
        )
        draft = gr.Textbox(
            chosen.draft or "" if chosen else "", label="Draft model", placeholder="Hub id or folder", elem_id="dfc-draft"
        )
    load = gr.Button("Load", size="sm", elem_id="dfc-load")
    return ModelPanel(engine, limits, pair, target, draft, custom, load)


def wire(panel: ModelPanel, status: gr.HTML, block_size: gr.Slider) -> None:
    """Connect the picker, the status line and the block-size slider, whose range is the draft's. Outside the sidebar."""
    # A timer inside a closed accordion never ticks.
    timer, version = gr.Timer(LOADING_TICK_SECONDS), gr.Number(-1, visible=False)

    def chosen(name: str) -> gr.Group:
        return gr.Group(visible=name == CUSTOM)

    def load(name: str, target: str, draft: str) -> gr.Timer:
        told(lambda: _load(panel, name, target, draft))
        return gr.Timer(LOADING_TICK_SECONDS)

    def tick(seen: int, chosen: int) -> tuple:
        now = panel.engine.status
        if now.version == seen:
            return gr.skip(), gr.skip(), gr.skip(), gr.skip()
        if now.phase != "loading" and now.error is not None:
            warn(now.error)
        pace = LOADING_TICK_SECONDS if now.phase == "loading" else IDLE_TICK_SECONDS
        return packed(status_line(now)), now.version, gr.Timer(pace), _slider(now, chosen)

    panel.pair.change(chosen, panel.pair, panel.custom, **QUIET)
    panel.load.click(load, [panel.pair, panel.target, panel.draft], timer, **QUIET)
    # Unchecked inputs: the slider's value may be of the draft before.
    timer.tick(tick, [version, block_size], [status, version, timer, block_size], preprocess=False, **QUIET)


def status_channel() -> gr.HTML:
    return channel("setStatus", status_line(Status(phase="loading", stage="starting")), elem_classes="dfc-status-host")


def status_line(status: Status) -> dict:
    """What the status line shows: the phase for its colour, a sentence, the progress."""
    return {"phase": status.phase, "text": _sentence(status), "fraction": status.fraction}


def _sentence(status: Status) -> str:
    if status.phase == "ready":
        draft = f"{status.draft_kind}, blocks of {status.block_size}" if status.block_size else "no draft model"
        return f"{status.pair_name} · {status.device} · {status.dtype} · {draft}"
    if status.phase == "loading":
        percent = "" if status.fraction is None else f" {status.fraction:.0%}"
        what = f" {status.choice.label}" if status.choice else ""
        return f"Loading{what}: {status.stage}{percent}"
    if status.phase == "failed":
        return f"Not loaded. {status.error}"
    return "No model is loaded: choose a pair and load it."


def _load(panel: ModelPanel, name: str, target: str, draft: str) -> None:
    if name == CUSTOM:
        panel.limits.check_pair(target)
        choice = Choice(name=target.strip(), target=target.strip(), draft=draft.strip() or None)
    else:
        panel.limits.check_pair(name)
        choice = Choice(name)
    status = panel.engine.status
    if status.phase == "ready" and status.choice == choice:
        gr.Info(f"{status.pair_name} is loaded.")
        return
    panel.engine.load(choice)


def _slider(status: Status, chosen: int) -> gr.Slider:
    """The range of this draft; the reader's choice stays where the draft allows it."""
    if status.phase != "ready" or not status.block_size:
        return gr.Slider(interactive=status.phase == "ready")
    return gr.Slider(minimum=2, maximum=status.block_size, value=min(int(chosen), status.block_size), interactive=True)
