"""The page: a thin composition of the sidebar and the tabs; knows what stands where and nothing else."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from app import (
    api, charts_tab, chat_list, chat_tab, learn_tab, model_panel, race_tab, render, settings_panel, suite_tab, theme, traces_tab,
    widgets,
)  # fmt: skip
from app.answering import Answers
from app.desk import Desk
from app.engine import Engine
from app.limits import OPEN, Limits
from dflash_core import pair_names

TITLE = "DFlash"
RACE, LEARN = (widgets.ASSETS.parent / name for name in ("race", "learn"))


@dataclass(frozen=True, slots=True)
class App:
    """The page and what it stands on."""

    page: gr.Blocks
    engine: Engine
    desk: Desk


def build(engine: Engine, limits: Limits = OPEN, pairs: tuple[str, ...] = pair_names()) -> App:
    """The whole page, not yet served. `launch_options` go to its `launch`."""
    desk = Desk(engine, limits)
    with gr.Blocks(title=TITLE, fill_width=True, analytics_enabled=False) as page:
        with gr.Sidebar(width=280, elem_classes="dfc-sidebar"):
            chats = chat_list.build()
            with gr.Accordion("Model", open=False):
                models = model_panel.build(engine, limits, pairs)
            system = settings_panel.build_system()
            settings = settings_panel.build(limits, system)
        status = _head()
        with gr.Tabs():
            with gr.Tab("Chat", id="chat"):
                chat = chat_tab.build(chats)
            with gr.Tab("Charts", id="charts") as charts:
                charts_tab.build(chat.xray, charts)
            with gr.Tab("Race", id="race") as race:
                suite_tab.build(race_tab.build(desk, settings, race))
            with gr.Tab("Learn", id="learn"):
                learn_tab.build(desk)
            with gr.Tab("Traces", id="traces") as traces:
                traces_tab.build(chat.xray, traces)
        model_panel.wire(models, status, settings.block_size)
        shelf = chat_list.Shelf(chat.screen, chats, system)
        wiring = chat_tab.Wiring(desk, chat, settings, shelf)
        wiring.connect()
        shelf.wire(page)
        settings_panel.remember(settings, page)
        page.unload(_leaving(desk, wiring.answers))
        api.build(desk)
    page.queue(max_size=limits.queue_size, default_concurrency_limit=8, api_open=False)
    return App(page, engine, desk)


def launch_options() -> dict[str, Any]:
    """Theme, style and script for `launch`."""
    return {
        "theme": theme.theme(),
        "css": widgets.page_css(),
        "head": render.app_head() + widgets.page_head() + "".join(widgets.tab_head(folder) for folder in (RACE, LEARN)),
        "footer_links": ["api", "gradio"],
        "run_history": False,
        "enable_monitoring": False,
        "max_file_size": "64mb",
        "pwa": True,
        "favicon_path": str(widgets.ASSETS / "icon.svg"),
        "show_error": True,
        "max_threads": 80,
    }


def _head() -> gr.HTML:
    """The header line; returns the status channel in it."""
    with gr.Row(elem_classes="dfc-head"):
        gr.Markdown(f"# {TITLE}", elem_classes="dfc-brand")
        status = model_panel.status_channel()
        scheme = gr.Button("◐", size="sm", elem_classes="dfc-scheme", elem_id="dfc-scheme")
        scheme.click(None, None, None, js="() => dflashApp.toggleScheme()", **widgets.QUIET)
    return status


def _leaving(desk: Desk, answers: Answers) -> Any:
    def leave(client: gr.Request) -> None:
        answers.forget(client.session_hash)
        desk.forget(client.session_hash)

    return leave
