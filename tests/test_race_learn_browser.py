"""A whole race and the whole tour in a real browser, on the scripted pair: what a reader sees, does and takes away."""

import csv
import json
import re
import time
import urllib.request
from contextlib import contextmanager

import pytest

from app.engine import Choice, Engine
from app.learn import tour
from tests.conftest import serve, serve_stage
from tests.stage import DEFAULT_REPLY, Stage, paced

CARDS = tour()["cards"]
LANE_TEXT = "document.querySelector(`[data-lane='${key}'] .dfx-text`).textContent"


def open_tab(page, name):
    page.get_by_role("tab", name=name, exact=True).click()


def open_race(page, prompt="tell me about the sea"):
    open_tab(page, "Race")
    page.fill("#dfr-prompt textarea", prompt)


def run_race(page, prompt="tell me about the sea"):
    open_race(page, prompt)
    page.click("#dfr-start")
    page.wait_for_selector(".dfr-verdict", timeout=30_000)


def replayed(page):
    page.wait_for_function("() => document.querySelector('.dfr-clock button.main').textContent === 'Play again'")


def lane_text(page, key):
    return page.evaluate(f"key => {LANE_TEXT}", key)


def toasts(page):
    page.wait_for_selector(".toast-body")
    return page.locator(".toast-body").all_inner_texts()


@contextmanager
def looping(served, decode):
    """The engine decodes with another loop for a while."""
    engine = served.app.engine
    before, engine.decode = engine.decode, decode
    try:
        yield
    finally:
        engine.decode = before


@pytest.fixture
def quick(served):
    with paced(served.stage, 400):
        yield served.stage


def fits(page):
    return page.evaluate("() => document.documentElement.scrollWidth <= innerWidth + 1")


# ---- the race


def test_a_whole_race(page, quick):
    open_race(page)
    page.get_by_label("DFlash, block 4").check()
    page.click("#dfr-start")
    page.wait_for_selector(".dfr-progress >> text=/repeat \\d of 3/")
    assert page.locator("#dfr-start").is_disabled() and page.locator("#dfr-stop").is_visible()
    page.wait_for_selector(".dfr-verdict", timeout=30_000)
    factor = float(page.locator(".dfr-factor").inner_text().rstrip("×"))
    assert factor > 2
    verdict = page.locator(".dfr-verdict").inner_text()
    assert f"DFlash was {factor:.2f} times as fast as plain decoding." in verdict
    assert re.search(r"Median of 3 repeats, [\d.]+× to [\d.]+×", verdict)
    assert "Identical output: all " in verdict and "τ" in verdict
    assert page.locator(".dfr-times-lap").count() == 9, "every lap of every lane is shown"
    assert "Measured one after the other, replayed in sync." in page.locator(".dfr-clock").inner_text()
    replayed(page)
    for key in ("plain", "dflash", "block-4"):
        assert DEFAULT_REPLY.startswith(lane_text(page, key)[:90]) and len(lane_text(page, key)) > 60
    assert len({lane_text(page, key) for key in ("plain", "dflash", "block-4")}) == 1
    assert page.locator("[data-lane=dflash] .dfr-place").inner_text() == "first"
    assert page.locator("[data-lane=plain] .dfr-place").inner_text() == "3rd"
    assert page.locator("#dfr-start").is_enabled() and not page.locator("#dfr-stop").is_visible()
    assert page.locator(".dfr-progress").count() == 0


def test_the_lanes_stand_at_one_moment_of_one_clock(page, quick):
    run_race(page)
    page.click(".dfr-clock button.main")
    page.evaluate("""() => { const range = document.querySelector('.dfr-clock input'); range.value = 400;
        range.dispatchEvent(new Event('input')); }""")
    page.wait_for_timeout(150)
    found = page.evaluate("""() => {
        const lanes = [...document.querySelectorAll('.dfr-lane .dfx')].map(node => dflashXray(node));
        const time = 0.4 * Math.max(...lanes.map(x => x.duration));
        return lanes.map(x => [x.info.mode, x.info.step, x.run.at(time)]); }""")
    assert all(mode == "clock" and step == expected for mode, step, expected in found), found
    plain, fast = (
        int(re.match(r"(\d+) of", text)[1]) if "of" in text else 999
        for text in page.locator(".dfr-lane-state").all_inner_texts()
    )
    assert plain < fast
    assert page.locator(".dfr-clock button.main").inner_text() == "Play"
    page.click(".dfr-clock [aria-label='Replay at a tenth of the speed']")
    page.click(".dfr-clock button.main")
    page.wait_for_timeout(300)
    moved = page.evaluate("() => parseFloat(document.querySelector('.dfr-clock output').textContent)")
    total = page.evaluate("() => parseFloat(document.querySelector('.dfr-clock output').textContent.split('/')[1])")
    assert 0.4 * total <= moved <= 0.4 * total + 0.1, "a tenth of the speed is a tenth of the way"


def test_what_a_race_leaves_in_files(page, quick, tmp_path):
    run_race(page)
    for kind, check in (("csv", _check_csv), ("json", _check_json), ("png", _check_png)):
        with page.expect_download() as download:
            page.click(f"#dfr-save-{kind}")
        path = tmp_path / f"race.{kind}"
        download.value.save_as(path)
        assert download.value.suggested_filename == f"dflash-race.{kind}"
        check(path)
    box = page.locator("#dfr-card img").bounding_box()
    assert box and abs(box["width"] / box["height"] - 1200 / 630) < 0.02


def _check_csv(path):
    rows = list(csv.DictReader(path.open(newline="")))
    assert [row["lane"] for row in rows] == ["Plain decoding", "DFlash, block 8"] and rows[1]["repeats"] == "3"


def _check_json(path):
    told = json.loads(path.read_text())
    assert told["prompt"] == "tell me about the sea" and len(told["lanes"][1]["laps"]) == 3


def _check_png(path):
    assert path.read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_stopping_a_race_frees_the_device(page, served):
    with paced(served.stage, 10):
        open_race(page)
        page.click("#dfr-start")
        page.wait_for_selector(".dfr-progress >> text=/Plain decoding, repeat 1 of 3/")
        page.click("#dfr-stop")
        page.wait_for_function("() => !document.querySelector('#dfr-start').disabled")
        deadline = time.monotonic() + 2
        while served.stage.live and time.monotonic() < deadline:
            time.sleep(0.02)
    assert served.stage.live == 0
    page.wait_for_selector(".dfr-welcome")


def test_chatting_beside_a_race_takes_turns(page, served):
    with paced(served.stage, 100):
        open_race(page)
        page.click("#dfr-start")
        page.wait_for_selector(".dfr-progress >> text=/repeat 1/")
        open_tab(page, "Chat")
        page.fill("#dfc-composer textarea", "say hello there")
        page.press("#dfc-composer textarea", "Enter")
        page.wait_for_selector(".dfc-foot-numbers >> text=/tok\\/s/", timeout=20_000)
        open_tab(page, "Race")
        page.wait_for_selector(".dfr-verdict", timeout=30_000)
    assert served.stage.most_live == 1


def test_a_difference_is_shown_with_both_tokens_and_is_never_called_identical(page, served, quick):
    def decode(pair, ids, params, *, drafting=True):
        served.stage.reply = "The wind is <b>cold</b>" if drafting else "The wind is warm"
        yield from served.stage.decode(pair, ids, params, drafting=drafting)

    before = served.stage.reply
    try:
        with looping(served, decode):
            run_race(page, "what about the wind")
    finally:
        served.stage.reply = before
    verdict = page.locator(".dfr-verdict").inner_text()
    assert "The replies differ from token" in verdict and "was not measured" in verdict and "Identical" not in verdict
    assert page.locator(".dfr-sign.differs").count() == 1
    assert page.locator(".dfr b >> text=cold").count() == 0, "a reply's markup stays text"
    assert "<b>cold</b>" in lane_text(page, "dflash")


def test_hostile_prompts_stay_text(page, quick):
    hostile = "say <img src=x onerror=\"document.title='hacked'\"><script>document.title='hacked'</script>"
    run_race(page, hostile)
    replayed(page)
    assert page.title() != "hacked" and page.locator(".dfr img[src=x]").count() == 0
    assert lane_text(page, "dflash").startswith("<img src=x onerror=")


def test_nothing_to_race_is_explained(page, quick):
    open_race(page, "   ")
    page.click("#dfr-start")
    assert "prompt is empty" in " ".join(toasts(page))
    page.fill("#dfr-prompt textarea", "tell me")
    page.get_by_label("DFlash, block 8").uncheck()
    page.click("#dfr-start")
    page.wait_for_selector(".toast-body >> text=nothing to race")
    page.wait_for_function("() => !document.querySelector('#dfr-start').disabled")


def test_a_built_in_prompt_fills_the_box(page, quick):
    open_race(page)
    page.click("#dfr-built-in input")
    page.locator("#dfr-built-in [role=option], ul[role=listbox] [role=option]").first.click()
    page.wait_for_function(
        "() => document.querySelector('#dfr-prompt textarea').value.startsWith('Explain what a black hole')"
    )


def test_a_suite_becomes_a_table_bars_and_files(page, served, tmp_path):
    with paced(served.stage, 3000):
        open_tab(page, "Race")
        page.click("#dfr-suite button")
        for name in ("code", "summary", "translation"):
            page.locator("#dfr-categories").get_by_label(name, exact=True).uncheck()
        page.click("#dfr-suite-start")
        page.wait_for_selector("#dfr-suite-table td", timeout=40_000)
    page.wait_for_selector("#dfr-suite-plot .js-plotly-plot .bars", state="attached")
    text = page.locator("#dfr-suite-table").inner_text()
    assert all(word in text for word in ("chat", "maths", "all", "DFlash, block 8", "Plain decoding"))
    assert page.locator("#dfr-suite-table tbody tr").count() == 6
    assert page.locator("#dfr-suite-plot .yerror").count() >= 2
    with page.expect_download() as download:
        page.click("#dfr-suite-csv")
    download.value.save_as(tmp_path / "suite.csv")
    rows = list(csv.DictReader((tmp_path / "suite.csv").open(newline="")))
    assert {row["category"] for row in rows} == {"chat", "maths", "all"} and rows[0]["repeats"] == "3"


# ---- the tour


def at_card(page, index):
    page.locator(".dfl-dot").nth(index).click()
    page.wait_for_function(
        "title => document.querySelector('.dfl-title').textContent === title", arg=CARDS[index]["title"]
    )


def xray(page):
    return page.evaluate(
        "() => { const i = dflashXray('.dfl-view').info; return [i.mode, i.step, i.phase, i.header.drafting]; }"
    )


def index_of(key):
    return next(i for i, card in enumerate(CARDS) if card["key"] == key)


def test_the_whole_tour_drives_the_xray(page):
    open_tab(page, "Learn")
    page.wait_for_selector(".dfl-card")
    for index, card in enumerate(CARDS):
        page.wait_for_function("title => document.querySelector('.dfl-title').textContent === title", arg=card["title"])
        assert page.locator(".dfl-text p").count() == len(card["text"])
        assert "**" not in page.locator(".dfl-card").inner_text()
        assert page.locator(".dfl-dot[aria-current]").inner_text() == str(index + 1)
        if card["beats"]:
            last = card["beats"][-1]
            page.wait_for_function(
                """([step, phase]) => { const i = dflashXray('.dfl-view').info;
                return i.step === step && i.phase === phase; }""",
                arg=[last["step"], last["phase"]],
            )
        assert xray(page)[3] == (card["trace"] == "dflash")
        if index + 1 < len(CARDS):
            page.get_by_role("button", name="Next", exact=True).click()
    assert page.locator(".dfl-links a").first.get_attribute("href") == "https://arxiv.org/abs/2602.06036"
    page.get_by_role("button", name="Race it").click()
    page.wait_for_selector("#dfr-start")


def test_the_tour_by_keyboard_and_its_first_card_replays_plain_decoding(page):
    open_tab(page, "Learn")
    page.wait_for_selector(".dfl-card")
    page.wait_for_function("() => dflashXray('.dfl-view').info.mode === 'play'")
    page.focus(".dfl-title")
    page.keyboard.press("ArrowRight")
    page.wait_for_function("title => document.querySelector('.dfl-title').textContent === title", arg=CARDS[1]["title"])
    assert page.evaluate("() => document.activeElement.className") == "dfl-title"
    page.keyboard.press("ArrowLeft")
    page.wait_for_function("title => document.querySelector('.dfl-title').textContent === title", arg=CARDS[0]["title"])


def test_the_attention_picture_shows_the_rule(page):
    open_tab(page, "Learn")
    at_card(page, index_of("context"))
    rows = ".dfl-mask-row:not(.head)"
    pictures = tour()["attention"]
    for name, kind in (("Draft model", "draft"), ("Target, checking", "target"), ("In training", "training")):
        page.get_by_role("button", name=name).click()
        shown = page.eval_on_selector_all(
            rows,
            """rows => rows.map(row =>
            [...row.querySelectorAll('.dfl-cell')].map(c => +c.classList.contains('seen')).join(''))""",
        )
        assert shown == pictures[kind]["rows"]
    page.locator(rows).first.hover()
    assert "sees 2 of 8 context tokens and 3 of 6 slots" in page.locator(".dfl-attention").inner_text()


def test_what_if_follows_the_formula_and_measures_this_machine(page, quick):
    open_tab(page, "Learn")
    at_card(page, index_of("speed"))
    costs = tour()["costs"]
    expected = costs["tau"] * costs["plain_seconds"] / (costs["draft_seconds"] + costs["verify_seconds"])
    assert float(page.locator(".dfl-factor").inner_text().rstrip("×")) == pytest.approx(expected, rel=0.03)
    page.evaluate(
        """() => { const tau = document.querySelector('.dfl-slider input');
        tau.value = 1; tau.dispatchEvent(new Event('input')); }"""
    )
    assert "slower than plain decoding" in page.locator(".dfl-verdict").inner_text()
    page.get_by_role("button", name="Measure this machine").click()
    page.wait_for_selector(".dfl-whatif >> text=/measured on this machine \\(smollm2-135m/", timeout=20_000)
    assert (
        "plain pass 9.0 ms, draft pass 4.0 ms, verify pass 9.0 ms for a block of 8"
        in page.locator(".dfl-whatif").inner_text()
    )
    at_card(page, index_of("limits"))
    assert "measured on this machine" in page.locator(".dfl-whatif").inner_text(), (
        "the numbers are kept for the next card"
    )


def test_the_game_hides_the_answer_until_it_is_given(page):
    open_tab(page, "Learn")
    at_card(page, index_of("game"))
    game = tour()["game"]
    for number, step in enumerate(game):
        page.wait_for_selector(f".dfl-game >> text=Round {number + 1} of {len(game)}")
        page.wait_for_function(
            "step => { const i = dflashXray('.dfl-view').info; return i.step === step && i.phase === 'draft'; }",
            arg=step,
        )
        page.wait_for_timeout(60)
        assert page.locator(".dfl-view .dfx-strip .dfx-chip:is(.correction, .bonus, .rejected)").count() == 0
        hidden = page.eval_on_selector_all(
            ".dfl-view .dfx-step.future", "nodes => nodes.every(node => getComputedStyle(node).opacity === '0')"
        )
        assert hidden and page.locator(".dfl-view .dfx-step.future").count() > 0
        assert not page.locator(".dfl-view .dfx-numbers").is_visible()
        page.locator(".dfl-choice").nth(2).click()
        truth = page.evaluate("step => dflashXray('.dfl-view').run.steps[step].accepted", step)
        assert page.locator(".dfl-choice.right").inner_text() == str(truth)
        page.locator(".dfl-game .dfl-button").click()
    said = page.locator(".dfl-game").inner_text()
    assert re.search(r"You were exact in \d of \d blocks and off by \d\.\d on average", said) and "simple rule" in said
    page.get_by_role("button", name="Play again").click()
    page.wait_for_selector(".dfl-game >> text=Round 1")


# ---- everywhere


@pytest.mark.parametrize("width", [1440, 380])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_nothing_overflows_in_any_scheme_or_width(chromium, served, quick, width, scheme):
    context = chromium.new_context(viewport={"width": width, "height": 800}, reduced_motion="reduce")
    page = context.new_page()
    page.set_default_timeout(8_000)
    page.goto(served.url + ("?__theme=dark" if scheme == "dark" else ""))
    page.wait_for_selector("#dfc-composer textarea")
    run_race(page, "say a short word")
    assert fits(page), "race"
    assert not page.evaluate("() => document.querySelector('.dfr-clock button.main').textContent === 'Pause'"), (
        "no motion"
    )
    assert lane_text(page, "plain") == "a short word"
    open_tab(page, "Learn")
    page.wait_for_selector(".dfl-card")
    for index in range(len(CARDS)):
        at_card(page, index)
        assert fits(page), CARDS[index]["key"]
    assert page.locator(".dfl-title").evaluate("node => getComputedStyle(node).color") == (
        "rgb(243, 244, 246)" if scheme == "dark" else "rgb(17, 24, 39)"
    )
    context.close()


def test_the_tour_is_there_within_five_seconds_while_the_model_loads(chromium):
    stage = Stage(load_seconds=12)
    engine = Engine(load=stage.load, decode=stage.decode)
    served = serve(engine, stage)
    engine.load(Choice())
    page = chromium.new_page()
    page.set_default_timeout(8_000)
    start = time.monotonic()
    page.goto(served.url)
    open_tab(page, "Learn")
    page.wait_for_selector(".dfl-view .dfx-text:not(:empty)")
    assert time.monotonic() - start < 5
    assert engine.status.phase == "loading"
    page.get_by_role("button", name="Next", exact=True).click()
    at_card(page, index_of("speed"))
    page.get_by_role("button", name="Measure this machine").click()
    assert "No pair is ready" in " ".join(toasts(page))
    page.wait_for_function("() => !document.querySelector('.dfl-whatif .dfl-button').disabled")
    page.close()
    served.close()


def test_a_pair_without_a_draft_can_still_race(chromium):
    stage = Stage(steps_per_second=400)
    served = serve_stage(stage, load=False)
    load = stage.load

    def without_draft(*args, **kwargs):
        pair = load(*args, **kwargs)
        pair.draft = pair.block_size = None
        return pair

    served.app.engine._load = without_draft
    served.app.engine.load(Choice())
    assert served.app.engine.wait(10)
    page = chromium.new_page()
    page.set_default_timeout(8_000)
    page.goto(served.url)
    open_tab(page, "Race")
    page.wait_for_function("() => document.querySelectorAll('#dfr-lanes input').length === 1")
    assert "Prompt lookup" in page.locator("#dfr-lanes").inner_text()
    page.close()
    served.close()


def test_it_can_be_installed_as_an_app(served):
    with urllib.request.urlopen(served.url + "manifest.json", timeout=10) as answer:
        manifest = json.load(answer)
    assert manifest["display"] == "standalone" and manifest["name"] == "DFlash"
    icon = manifest["icons"][0]
    with urllib.request.urlopen(served.url.rstrip("/") + "/" + icon["src"].lstrip("/"), timeout=10) as answer:
        assert icon["type"] == "image/svg+xml" and b"<svg" in answer.read()[:200]
