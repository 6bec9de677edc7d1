"""The widgets of one reply's settings and what they hold; knows neither models nor chats."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import gradio as gr

from app.limits import Limits
from app.settings import CUSTOM, PRESETS, Settings, preset_of
from app.widgets import QUIET
from dflash_core import DFlashError

DEFAULT_BLOCK = 16


@dataclass(frozen=True, slots=True)
class SettingsPanel:
    system: gr.Textbox
    drafting: gr.Checkbox
    block_size: gr.Slider
    preset: gr.Radio
    temperature: gr.Slider
    top_p: gr.Slider
    top_k: gr.Slider
    max_new_tokens: gr.Slider
    seed: gr.Textbox
    acceptance: gr.Radio

    @property
    def inputs(self) -> dict[str, Any]:
        """The widgets that make a `Settings`, by its field names."""
        return {
            "temperature": self.temperature, "top_p": self.top_p, "top_k": self.top_k,
            "max_new_tokens": self.max_new_tokens, "seed": self.seed, "drafting": self.drafting,
            "block_size": self.block_size, "acceptance": self.acceptance,
        }  # fmt: skip

    def read(self, data: Mapping[Any, Any]) -> Settings:
        """The settings among an event's inputs. Raises `DFlashError`."""
        return Settings.of({name: data[widget] for name, widget in self.inputs.items()})


def build_system() -> gr.Textbox:
    return gr.Textbox(
        label="System prompt", lines=3, max_lines=8, placeholder="How the model should answer (optional)", elem_id="dfc-system"
    )


def build(limits: Limits, system: gr.Textbox) -> SettingsPanel:
    """Inside the sidebar."""
    most = limits.max_new_tokens
    start = Settings(max_new_tokens=min(512, most))
    drafting = gr.Checkbox(start.drafting, label="Drafting", info="Off is plain decoding: the baseline.", elem_id="dfc-drafting")
    block_size = gr.Slider(
        2, DEFAULT_BLOCK, DEFAULT_BLOCK, step=1, label="Block size", elem_id="dfc-block",
        info="Anchor and drafted tokens. Short blocks win on slow hardware.",
    )  # fmt: skip
    preset = gr.Radio([*PRESETS, CUSTOM], value="Exact", label="Preset", elem_id="dfc-preset")
    with gr.Accordion("Sampling", open=False):
        temperature = gr.Slider(0, 2, start.temperature, step=0.05, label="Temperature", elem_id="dfc-temperature")
        top_p = gr.Slider(0.05, 1, start.top_p, step=0.05, label="Top-p", elem_id="dfc-top-p")
        top_k = gr.Slider(0, 200, start.top_k, step=1, label="Top-k", info="0 is off.", elem_id="dfc-top-k")
        acceptance = gr.Radio(
            [("Match", "match"), ("Rejection sampling", "rejection")], value=start.acceptance, label="Acceptance rule",
            info="Above temperature 0. Match: one seed, one text, drafting or not. Rejection sampling accepts more.", elem_id="dfc-acceptance",
        )  # fmt: skip
        # No gr.Number: an empty one becomes 0 when it is first seen, and then every reply to a question is the same.
        seed = gr.Textbox(label="Seed", info="Empty draws a new one.", max_lines=1, elem_id="dfc-seed")
    max_new_tokens = gr.Slider(1, most, start.max_new_tokens, step=1, label="Max tokens", elem_id="dfc-max-tokens")
    panel = SettingsPanel(
        system, drafting, block_size, preset, temperature, top_p, top_k, max_new_tokens, seed, acceptance
    )
    _wire(panel)
    return panel


def remember(panel: SettingsPanel, page: gr.Blocks) -> None:
    """Keep the settings in the browser: written by every change without asking the server, read when the page opens."""
    kept = gr.BrowserState(None, storage_key="dflash-settings", secret="dflash-settings-1")
    names, widgets = list(panel.inputs), list(panel.inputs.values())

    def restore(values: list[Any] | None) -> tuple:
        nothing = (gr.skip(),) * (len(widgets) + 1)
        if not isinstance(values, list) or len(values) != len(widgets):
            return nothing
        try:
            settings = Settings.of(dict(zip(names, values))).capped(int(panel.max_new_tokens.maximum))
        except DFlashError:
            return nothing
        # The block size belongs to the draft that is loaded now.
        chosen = [gr.skip() if name == "block_size" else getattr(settings, name) for name in names]
        return *chosen, preset_of(settings.temperature, settings.top_p, settings.top_k)

    page.load(restore, kept, [*widgets, panel.preset], **QUIET)
    gr.on([widget.change for widget in widgets], None, widgets, kept, js="(...values) => [values]", **QUIET)


def _wire(panel: SettingsPanel) -> None:
    sampling = [panel.temperature, panel.top_p, panel.top_k]

    def choose(name: str) -> tuple:
        preset = PRESETS.get(name)
        return tuple(preset.values()) if preset else (gr.skip(), gr.skip(), gr.skip())

    panel.preset.input(choose, panel.preset, sampling, queue=False, **QUIET)
    for slider in sampling:
        slider.input(preset_of, sampling, panel.preset, queue=False, **QUIET)
