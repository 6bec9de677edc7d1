"""Builds the X-ray's static shell, its style and script, and the self-contained page of a trace.

The only file that escapes HTML; it refuses to know Gradio objects, and model text stays JSON that a script reads.
"""

import html
import json
from functools import cache
from pathlib import Path
from typing import Any

from app.trace import Trace

ASSETS = Path(__file__).resolve().parent.parent / "assets" / "xray"
# Gradio evaluates these names when it wires listeners: xray.step_selected(fn), xray.next_step(fn), xray.step_mode(fn).
EVENTS = ("step_selected", "next_step", "step_mode")


def xray_kwargs(
    value: str = "",
    *,
    label: str = "X-ray",
    controls: bool = True,
    charts: bool = True,
    compact: bool = False,
    step_mode: bool = False,
    **gradio: Any,
) -> dict[str, Any]:
    """Arguments for `gr.HTML(**xray_kwargs(...))`; the value is a trace's NDJSON, growing while it decodes.

    controls    scrubber, replay and keyboard; off for a lane that a clock drives
    charts      the small charts and the table of steps
    compact     a lane: no legend, smaller type
    step_mode   offer "Step by step": fires `step_mode` {"on": bool} and `next_step` {}; `step_selected` {"step": i}
                fires whenever a reader picks a step
    gradio      anything else for gr.HTML, such as elem_id
    The page also needs `launch(head=app_head())`.
    """
    options = {"label": label, "controls": controls, "charts": charts, "compact": compact, "stepMode": step_mode}
    return {
        "value": value,
        "html_template": xray_html_template(options),
        "css_template": "",
        "js_on_load": xray_js_on_load(),
        "apply_default_css": False,
        "container": False,
        "padding": False,
        **gradio,
    }


def xray_html_template(options: dict[str, Any]) -> str:
    """The shell, without a word of model text; the script fills it. Safe inside Gradio's template language."""
    data = "".join(f' data-{_kebab(key)}="{_attribute(value)}"' for key, value in sorted(options.items()))
    return f'<section class="dfx"{data}></section>'


def xray_js_on_load() -> str:
    """What each gr.HTML runs when it appears: hand the shell, the value and the events to the shared script."""
    events = ", ".join(f"{json.dumps(name)}: data => trigger({json.dumps(name)}, data)" for name in EVENTS)
    return (
        "const shell = element.querySelector('.dfx');\n"
        f"const xray = window.dflashXray.mount(shell, {{{events}}});\n"
        "xray.setTrace(props.value || '');\n"
        "watch('value', () => xray.setTrace(props.value || ''));\n"
    )


@cache
def xray_css() -> str:
    """The style of every X-ray, light and dark."""
    style = _joined("*.css")
    assert "</style" not in style
    return style


@cache
def xray_js() -> str:
    """The script, one closed function; defines `window.dflashXray` once however often it is loaded."""
    body = _joined("*.js")
    assert "</script" not in body and "<!--" not in body
    return f"(() => {{\n'use strict';\nif (window.dflashXray) return;\n{body}}})();\n"


def app_head() -> str:
    """For `launch(head=...)`: style and script, in the page before any component loads.

    The style must not go through `launch(css=...)`: Gradio rewrites that and loses container queries.
    """
    return f"<style>{xray_css()}</style>\n<script>{xray_js()}</script>\n"


def export_page(trace: Trace, title: str = "") -> str:
    """A trace as one HTML file that needs no server, no network and no other file."""
    heading = html.escape(title or trace.header["title"] or f"DFlash X-ray · {trace.header['pair']}")
    options = {"label": "X-ray", "controls": True, "charts": True, "compact": False, "stepMode": False}
    return _PAGE.format(
        title=heading,
        css=xray_css(),
        script=xray_js(),
        shell=xray_html_template(options),
        data=trace.ndjson,
        text=html.escape(trace.text),
    )


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data: blob:">
<title>{title}</title>
<style>
{css}</style>
</head>
<body class="dfx-page">
<main>
<header class="dfx-page-head"><h1>{title}</h1><p class="dfx-page-facts"></p></header>
<div class="dfx-page-prompt" hidden></div>
{shell}
<noscript><p>The X-ray needs JavaScript. This is the reply:</p><pre>{text}</pre></noscript>
<footer class="dfx-page-foot">Recorded with DFlash block-diffusion speculative decoding. This page works offline.</footer>
</main>
<script type="application/x-ndjson" id="dfx-trace">{data}</script>
<script>
{script}
window.dflashXray.page(document);
</script>
</body>
</html>
"""


def _joined(pattern: str) -> str:
    return "".join(path.read_text(encoding="utf-8") for path in sorted(ASSETS.glob(pattern)))


def _kebab(name: str) -> str:
    return "".join(f"-{char.lower()}" if char.isupper() else char for char in name)


def _attribute(value: Any) -> str:
    """Escaped for HTML, for Handlebars and for a JavaScript template string, all of which Gradio runs it through."""
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return html.escape(text, quote=True).translate({ord(char): f"&#{ord(char)};" for char in "{}$`\\"})
