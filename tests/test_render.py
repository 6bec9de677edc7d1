"""The shell, the script and the exported page: nothing a model writes becomes markup."""

import re
from html.parser import HTMLParser

import pytest

from app import render, trace
from tests.xray_script import recorded

EVIL = ["<script>alert(1)</script>", "</script>", "<img src=x onerror=alert(1)>", "</style>", "<!--", "]]>", "&lt;", "`${1+1}`", "{{x}}"]


class Tags(HTMLParser):
    """Every element of a page with its attributes, and the text of each script."""

    def __init__(self, page):
        super().__init__(convert_charrefs=True)
        self.tags, self.scripts = [], []
        self.inside = None
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.inside = tag
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag):
        self.inside = None

    def handle_data(self, data):
        if self.inside == "script":
            self.scripts[-1] += data


@pytest.fixture(scope="module")
def page():
    text = recorded(EVIL, messages=[{"role": "user", "content": "".join(EVIL)}], title="".join(EVIL)).ndjson
    return render.export_page(trace.parse(text))


def test_the_page_has_its_own_elements_and_no_others(page):
    tags = Tags(page).tags
    assert [tag for tag, _ in tags].count("script") == 2
    assert not [tag for tag, attrs in tags if tag in ("img", "link", "iframe", "b") or any(name.startswith("on") for name in attrs)]


def test_the_page_carries_the_whole_trace(page):
    data, script = Tags(page).scripts
    assert trace.parse(data).text == "".join(EVIL)
    assert "window.dflashXray.page(document)" in script


def test_the_page_needs_no_other_file_and_no_network(page):
    assert not re.search(r"""(src|href)\s*=|url\(|@import|fetch\(|XMLHttpRequest|WebSocket|import\(""", page.replace("src=x", ""))
    assert set(re.findall(r"https?://[^\s'\"]+", page)) == {"http://www.w3.org/2000/svg"}
    assert "default-src 'none'" in page


def test_a_trace_with_raw_angle_brackets_is_made_inert():
    raw = recorded(["x"]).ndjson.replace('"title":""', '"title":"</script><script>alert(1)</script>"')
    assert len(Tags(render.export_page(trace.parse(raw))).scripts) == 2


def test_the_script_never_turns_text_into_markup():
    script = render.xray_js()
    for door in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "DOMParser", "createContextualFragment", "eval(", "new Function"):
        assert door not in script


def test_the_head_brings_style_and_script_once():
    head = render.app_head()
    assert head.count("<script>") == head.count("</script>") == head.count("<style>") == head.count("</style>") == 1


def test_the_shell_survives_gradios_two_template_languages():
    shell = render.xray_html_template({"label": "${x} {{y}} `z` \\ \"<b>\"", "stepMode": True})
    assert not set("{}$`\\") & set(shell)
    (tag, attrs), = Tags(shell).tags
    assert (tag, attrs["class"], attrs["data-step-mode"]) == ("section", "dfx", "true")
    assert attrs["data-label"] == "${x} {{y}} `z` \\ \"<b>\""


def test_gradio_takes_the_arguments_and_knows_the_events():
    import gradio as gr

    with gr.Blocks():
        xray = gr.HTML(**render.xray_kwargs(elem_id="x", step_mode=True))
        for name in render.EVENTS:
            getattr(xray, name)(lambda: None)
    assert xray.value == "" and xray.css_template == "" and xray.elem_id == "x"
    with pytest.raises(AttributeError):
        xray.unheard_of
