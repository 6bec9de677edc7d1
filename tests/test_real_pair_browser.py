"""The page on the real default target: what streams is what was decoded, and watching costs the decode little."""

import re
import statistics
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import pytest

from app.engine import Choice, Engine
from app.turn import prompt_ids
from dflash_core import SamplingParams, Step, decode, load_pair
from tests.conftest import serve
from tests.test_app_browser import REPLY, finished, replies, send, stream_text, writing
from tests.test_default_pair import random_draft

QUESTION = "Explain in a few sentences why the sky is blue."


def load(name, **options):
    """The default target in float32; a random draft accepts almost nothing and every reply stays exact."""
    options |= {"draft": "none", "device": "cpu", "dtype": "float32"}
    return replace(load_pair(name, **options), draft=random_draft())


@pytest.fixture(scope="module")
def real():
    engine = Engine(load=load, spare_cores=1)
    engine.load(Choice())
    served = serve(engine)
    assert engine.wait(120) and engine.status.phase == "ready", engine.status
    yield served
    served.close()


@pytest.fixture
def real_page(real, chromium):
    page = chromium.new_page(viewport={"width": 1440, "height": 900})
    page.set_default_timeout(30_000)
    page.goto(real.url)
    page.wait_for_selector(".dfc-status[data-phase=ready]")
    page.locator("#dfc-max-tokens input[type=number]").fill("40")
    yield page
    page.close()


def plain_reply(engine, question, tokens):
    """Transformers' own greedy reply."""
    pair = engine.borrow()
    try:
        import torch

        ids = prompt_ids(pair, [{"role": "user", "content": question}])
        output = pair.target.model.generate(torch.tensor([ids]), max_new_tokens=tokens, do_sample=False)
        return pair.tokenizer.decode(output[0, len(ids) :], skip_special_tokens=True)
    finally:
        engine.give_back()


def test_the_page_shows_the_targets_own_reply_and_keeps_it(real, real_page):
    send(real_page, QUESTION, wait=False)
    writing(real_page, 2)
    assert real_page.locator("#dfc-xray .dfx-text .dfx-token").count() >= 2
    finished(real_page)
    expected = plain_reply(real.app.engine, QUESTION, 40)
    real_page.wait_for_function("() => dflashXray('#dfc-xray').info.ended")
    assert stream_text(real_page).startswith(expected)
    assert "".join(replies(real_page)[0].split()) == "".join(expected.split())
    footer = real_page.locator(".dfc-foot").inner_text()
    assert re.search(r"tok/s · first token .* · τ 1\.\d\d · \d+/\d+ drafted tokens accepted", footer)
    assert "Drafting did not pay here" in footer and "smaller block" in footer
    real_page.wait_for_timeout(300)
    real_page.reload()
    real_page.wait_for_selector(REPLY)
    real_page.wait_for_function("() => dflashXray('#dfc-xray').info.ended")
    assert stream_text(real_page).startswith(expected)


def test_a_real_run_is_stopped_and_retried(real, real_page):
    real_page.locator("#dfc-max-tokens input[type=number]").fill("400")
    send(real_page, "Write a long story about a lighthouse.", wait=False)
    writing(real_page, 3)
    real_page.keyboard.press("Escape")
    real_page.wait_for_selector(".dfc-foot-numbers >> text=stopped")
    assert real.app.engine.status.phase == "ready" and real.app.engine._borrowed == 0
    real_page.locator("#dfc-max-tokens input[type=number]").fill("8")
    real_page.locator('.dfc-chat button[aria-label="Retry"], .dfc-chat button[title="Retry"]').last.click()
    real_page.wait_for_selector(".dfc-foot-numbers >> text=length limit reached")


def test_watching_costs_the_decode_little(real, real_page):
    """Seconds in the passes of the same reply with and without the page open, in turn; the medians are printed."""
    tokens, rounds, alone, watched = 40, 2, [], []
    for _ in range(rounds):
        # Every run has a thread of its own, as on the desk: PyTorch counts its threads per thread.
        with ThreadPoolExecutor(1) as pool:
            alone.append(pool.submit(_alone, real.app.engine, tokens).result())
        real.ended.clear()
        send(real_page, QUESTION, wait=False)
        # Asking the page whether it is done would make it draw.
        assert real.ended.wait(60)
        watched.append(real.last_seconds)
        finished(real_page)
        real_page.click("#dfc-new")
        real_page.wait_for_function("() => !document.querySelector('.message-row')")
    ratio = statistics.median(alone) / statistics.median(watched)
    print(f"seconds per reply alone {alone}, watched {watched}: {ratio:.1%} of the speed")
    # The aim is 95 %; the bound leaves room for whatever else runs on the machine.
    assert ratio > 0.3, "far below the 0.95 of a quiet machine"


def _alone(engine, tokens):
    pair = engine.borrow()
    try:
        params = SamplingParams(max_new_tokens=tokens)
        events = list(decode(pair, prompt_ids(pair, [{"role": "user", "content": QUESTION}]), params))
        return sum(event.draft_seconds + event.verify_seconds for event in events if isinstance(event, Step))
    finally:
        engine.give_back()


@pytest.fixture(autouse=True)
def timed(real):
    """Remember how long the passes of the newest run took, and that it has ended."""
    inner = real.app.engine.decode
    real.ended = threading.Event()

    def measured(*given, **options):
        seconds = 0.0
        for event in inner(*given, **options):
            if isinstance(event, Step):
                seconds += event.draft_seconds + event.verify_seconds
            yield event
        real.last_seconds = seconds
        real.ended.set()

    real.app.engine.decode = measured
    yield
    real.app.engine.decode = inner


def test_a_real_pair_is_ready_soon(real):
    """A second engine on this machine: asking returns at once, and the load is short."""
    engine = Engine(load=load)
    start = time.perf_counter()
    engine.load(Choice())
    assert engine.status.phase == "loading"
    assert engine.wait(60) and engine.status.baseline_seconds > 0
    print(f"loaded and warmed up in {time.perf_counter() - start:.1f} s")
