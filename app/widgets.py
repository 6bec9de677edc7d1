"""Small pieces every tab uses: toasts, channels to the page's script, the style and script themselves; knows no models."""

import json
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import gradio as gr

from app.conversations import guard
from dflash_core import DFlashError

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "app"
# Event options of everything that is not a documented endpoint.
QUIET: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}


def channel(handler: str, value: Any, **gradio: Any) -> gr.HTML:
    """A JSON value that `window.dflashApp[handler](host, value)` draws; `packed` makes its updates."""
    script = (
        "const host = element.querySelector('.dfc-host');\n"
        f"const draw = () => props.value && window.dflashApp.{handler}(host, JSON.parse(props.value));\n"
        "draw();\nwatch('value', draw);\n"
    )
    return gr.HTML(
        packed(value), html_template='<div class="dfc-host"></div>', js_on_load=script, apply_default_css=False,
        container=False, padding=False, **gradio,
    )  # fmt: skip


def packed(value: Any) -> str:
    """JSON without a raw `<`, so that it is inert wherever it lands."""
    return json.dumps(value, ensure_ascii=False).replace("<", "\\u003c")


def warn(error: DFlashError) -> None:
    """Show what is wrong, what was found and what to do; toasts render markup, so none may form."""
    gr.Warning(guard(str(error)))


def told(act: Callable[[], Any], otherwise: Any = None) -> Any:
    """The result of `act`; on a `DFlashError` a toast and `otherwise`."""
    try:
        return act()
    except DFlashError as error:
        warn(error)
        return otherwise


def tab_head(folder: Path) -> str:
    """A tab's own style and script from its folder, for `launch(head=...)`, after the page's."""
    style = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.css")))
    script = "".join(path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.js")))
    assert "</s" not in style + script
    return f"<style>{style}</style>\n<script>(() => {{\n'use strict';\n{script}}})();</script>\n"


@cache
def page_css() -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.css")))


@cache
def page_head() -> str:
    """The page's script, in place before any component loads."""
    body = "".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob("*.js")))
    assert "</script" not in body
    return f"<script>(() => {{\n'use strict';\n{body}}})();</script>"
