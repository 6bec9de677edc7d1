"""A lent GPU: decodes run in a forked worker, events arrive in chunks, a stop ends them; elsewhere nothing changes."""

import argparse
import contextvars
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest

from app import space
from app.desk import Desk
from app.engine import Choice, Engine
from app.server import spare_cores
from app.settings import Settings
from app.space import ZeroEngine, chunks, events, make_engine
from app.trace import parse
from dflash_core import DFlashError, Finish, Prefill, SamplingParams
from tests.lent_gpu import FORK, LentGpu
from tests.stage import Stage

VISITOR = SimpleNamespace(name="visitor")


@pytest.fixture
def gpu():
    return LentGpu()


@pytest.fixture
def stage():
    return Stage(steps_per_second=200)


@pytest.fixture
def desk(gpu, stage):
    engine = ZeroEngine(lend=gpu.GPU(duration=60), load=stage.load, decode=stage.decode)
    engine.load(Choice())
    assert engine.wait(20) and engine.status.phase == "ready"
    return Desk(engine)


def asked(desk, text="say hello", **settings):
    """A run opened as a handler opens it: in the context of a visitor's request."""
    from gradio.context import LocalContext

    def opened():
        LocalContext.request.set(VISITOR)
        return desk.open("tab", "visitor", [{"role": "user", "content": text}], Settings(**settings))

    return contextvars.copy_context().run(opened)


def test_elsewhere_the_engine_is_the_ordinary_one(monkeypatch):
    monkeypatch.delenv("SPACES_ZERO_GPU", raising=False)
    engine = make_engine(device="cpu")
    assert type(engine) is Engine and "spaces" not in sys.modules
    space.ready_to_launch(engine)


def test_a_space_is_open_to_visitors_and_capped_and_nothing_else_is(monkeypatch):
    plain = argparse.Namespace(pair="qwen3-4b", host="127.0.0.1", port=7860, public=False, no_browser=False, share=True)
    monkeypatch.delenv("SPACE_ID", raising=False)
    assert space.settled(plain) is plain and plain.host == "127.0.0.1" and not plain.public
    monkeypatch.setenv("SPACE_ID", "someone/dflash")
    settled = space.settled(plain)
    assert (settled.host, settled.public, settled.no_browser, settled.share) == ("0.0.0.0", True, True, False)
    assert settled.pair == "qwen3-4b" and settled.port == plain.port
    assert spare_cores(plain) == 1, "the browser is on this machine and needs a core"
    assert spare_cores(settled) == 0
    assert spare_cores(argparse.Namespace(host="0.0.0.0", public=False)) == 0


def test_a_space_serves_with_its_engine_once_the_pair_is_there(monkeypatch, stage, gpu):
    """`serve` from its arguments to the launch, which is stood in for."""
    from app import server

    launched = {}

    class Page:
        def launch(self, **options):
            launched.update(options, phase=engines[0].status.phase)
            return None, "http://here/", None

        def block_thread(self):
            pass

    engines = []

    def build(engine, limits):
        engines.append(engine)
        launched["limits"] = limits
        return SimpleNamespace(page=Page())

    monkeypatch.setenv("SPACE_ID", "someone/dflash")
    monkeypatch.setenv("SPACES_ZERO_GPU", "1")
    monkeypatch.setitem(sys.modules, "spaces", gpu)
    monkeypatch.setattr(server, "build", build)
    monkeypatch.setattr(
        server,
        "make_engine",
        lambda **_: ZeroEngine(lend=gpu.GPU(duration=60), load=slowed(stage.load), decode=stage.decode),
    )
    chosen = SimpleNamespace(
        pair="smollm2-135m", target=None, draft=None, device="auto", dtype="auto", quantize=None, host="127.0.0.1",
        port=None, share=False, no_browser=False, public=False,
    )  # fmt: skip
    assert server.serve(chosen) == 0
    assert launched["server_name"] == "0.0.0.0" and launched["phase"] == "ready", (
        "the weights are there before the launch"
    )
    assert launched["limits"].pairs == ("smollm2-135m",) and launched["limits"].runs_per_minute


def slowed(load):
    def later(*args, **kwargs):
        time.sleep(0.3)
        return load(*args, **kwargs)

    return later


def test_on_zero_gpu_the_engine_lends(monkeypatch, gpu):
    monkeypatch.setenv("SPACES_ZERO_GPU", "true")
    monkeypatch.setitem(sys.modules, "spaces", gpu)
    engine = make_engine(device="cuda")
    assert type(engine) is ZeroEngine and gpu.durations == [space.LENT_SECONDS]


def test_the_warm_up_borrows_nothing_and_the_pair_stays(desk, gpu):
    assert gpu.requests == [] and desk.engine.status.baseline_seconds is None
    space.ready_to_launch(desk.engine)
    with pytest.raises(DFlashError, match="keeps its pair"):
        desk.engine.load(Choice("other"))


def test_a_reply_is_decoded_in_the_worker_and_arrives_whole(desk, gpu, stage):
    run = asked(desk, "tell me about the sea")
    assert run.wait(20) and run.error is None and run.ended == "stop"
    assert run.text == stage.reply and stage.prompts == [], "this process must not have decoded"
    trace = parse(run.ndjson)
    assert trace.complete and [event.index for event in trace.events[1:-1]] == list(range(len(trace.events) - 2))
    assert gpu.requests == [VISITOR], "the visitor's share is used, from whatever thread"
    seconds = trace.stats.steps / stage.steps_per_second
    assert len(gpu.sent) <= seconds / space.CHUNK_SECONDS + 3, "chunks, not one message per event"
    desk.close("tab")


def test_a_stop_is_seen_at_the_next_chunk_and_ends_the_worker(gpu):
    passes = FORK.Value("i", 0)

    stage = Stage()
    engine = ZeroEngine(lend=gpu.GPU(duration=60), load=stage.load, decode=endless(passes))
    engine.load(Choice())
    assert engine.wait(20)
    desk = Desk(engine)
    run = asked(desk)
    deadline = time.monotonic() + 10
    while passes.value < 5 and time.monotonic() < deadline:
        time.sleep(0.01)
    start = time.monotonic()
    desk.stop("tab")
    assert run.wait(5) and run.ended == "stopped"
    assert time.monotonic() - start < 1.0
    at_stop = passes.value
    time.sleep(0.2)
    assert at_stop >= 5 and passes.value == at_stop, "the worker must have ended its decode"
    desk.close("tab")


def endless(passes):
    """A decode that never ends by itself and counts its passes where the parent can see them."""
    from tests.stage import scripted_step

    def decode(pair, ids, params, *, drafting=True):
        yield Prefill(len(ids), 5, 0.0)
        for index in range(10_000):
            time.sleep(0.02)
            passes.value += 1
            yield scripted_step([5] * 40_000, 1 + index, 0, index)

    return decode


def test_an_error_crosses_with_its_words(desk, stage):
    stage.step_error = (3, DFlashError("It is broken.", "Found a hole.", "Mend it."))
    run = asked(desk, "tell me about the sea")
    assert run.wait(20) and run.ended == "failed"
    assert (run.error.wrong, run.error.found, run.error.do) == ("It is broken.", "Found a hole.", "Mend it.")
    assert parse(run.ndjson).stats.steps == 3, "what was decoded before stays"
    desk.close("tab")


def test_a_bug_in_the_worker_is_told_and_not_hidden(desk, stage):
    stage.step_error = (1, ZeroDivisionError("oops"))
    run = asked(desk, "tell me about the sea")
    assert run.wait(20) and "ZeroDivisionError" in str(run.error)
    desk.close("tab")


def test_functions_do_not_cross(desk):
    def opened():
        from gradio.context import LocalContext

        LocalContext.request.set(VISITOR)
        return desk.engine.decode

    decode = contextvars.copy_context().run(opened)
    with pytest.raises(DFlashError, match="cross"):
        decode(None, [1], SamplingParams(processors=(lambda ids, logits: logits,)))


def test_chunks_beat_while_nothing_is_new_and_keep_the_order():
    def decode():
        yield Prefill(1, 1, 0.0)
        time.sleep(0.25)
        yield Finish("stop", 1, 0, 0.25)

    told = list(chunks(decode, seconds=0.05))
    assert 4 <= len(told) <= 7 and any(not fresh for fresh, _ in told)
    assert list(events(iter(told))) == [Prefill(1, 1, 0.0), Finish("stop", 1, 0, 0.25)]


def test_a_consumer_that_leaves_ends_the_thread():
    closed = []

    def decode():
        try:
            while True:
                time.sleep(0.01)
                yield Prefill(1, 1, 0.0)
        finally:
            closed.append(True)

    told = chunks(decode, seconds=0.02)
    next(told)
    told.close()
    assert closed == [True]


REAL = """
import contextvars, sys
from types import SimpleNamespace
import torch
torch.set_num_threads(1)
from app.space import ZeroEngine
from app.engine import Choice
from dflash_core import SamplingParams, decode
from gradio.context import LocalContext
from tests.lent_gpu import LentGpu
from tests.scripted import reply_of
from tests.tiny import tiny_draft, tiny_llama, tiny_pair
model = tiny_llama()
pair = tiny_pair(model, tiny_draft(model.config))
engine = ZeroEngine(lend=LentGpu().GPU(duration=60), load=lambda *a, **k: pair)
engine.load(Choice()); assert engine.wait(60) and engine.status.phase == "ready", engine.status
LocalContext.request.set(SimpleNamespace())
params = SamplingParams(max_new_tokens=40, stop_token_ids=())
there = list(engine.decode(pair, [5, 9, 17], params, drafting=True))
here = list(decode(pair, [5, 9, 17], params, drafting=False))
assert len(there) > 3 and reply_of(there) == reply_of(here)
print("same reply")
"""


def test_a_real_pair_decodes_the_same_reply_in_the_worker():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(__file__).parents[1])}
    done = subprocess.run([sys.executable, "-c", REAL], capture_output=True, text=True, timeout=90, env=environment)
    assert done.stdout.strip() == "same reply", done.stderr
