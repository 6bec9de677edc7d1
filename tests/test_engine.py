"""The batched engine: the target's own greedy replies id for id, however rows are mixed, refilled and sampled."""

import importlib.util
import os
import subprocess
import sys

import numpy as np
import pytest
import torch

from dflash_core.errors import TrainingError
from dflash_core.training import slot_kernel
from dflash_core.training.engine import Engine, Job, fitting_rows, pick
from tests.tiny import STOP_TOKEN_ID, TARGETS

CAPACITY = 64
STOPS = (STOP_TOKEN_ID, *range(40, 46))  # several, so that replies of every tiny target end early now and then
CUDA = pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"))


def random_jobs(count, temperature=0.0, seed=0):
    random = np.random.default_rng(seed)
    jobs = []
    for key in range(count):
        length = int(random.integers(1, 30))
        prompt = random.integers(4, 127, length).tolist()
        jobs.append(Job(key, prompt, temperature, int(random.integers(1, CAPACITY - length + 1))))
    return jobs


def reference(model, job):
    ids = torch.tensor([job.prompt], device=model.device)
    out = model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=job.max_new_tokens, do_sample=False, eos_token_id=STOPS
    )
    return out[0, len(job.prompt) :].tolist()


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("name", ["llama", "qwen3", "gemma3"])
def test_greedy_replies_are_generates_own(name, device):
    """Prompts of 1 to 29 tokens, four rows for 21 jobs: every row is refilled; gemma3 has sliding windows of 8."""
    jobs, model = random_jobs(21), TARGETS[name]().to(device)
    expected = {job.key: reference(model, job) for job in jobs}
    replies = list(Engine(model, STOPS, rows=4, capacity=CAPACITY).generate(jobs))
    assert {reply.job.key: reply.tokens.tolist() for reply in replies} == expected
    assert any(reply.stopped for reply in replies) and not all(reply.stopped for reply in replies)
    assert all(reply.stopped == (reply.tokens[-1] in STOPS) for reply in replies)


def test_sampled_neighbours_leave_greedy_rows_alone():
    greedy, sampled = random_jobs(8), random_jobs(8, temperature=1.0, seed=1)
    model = TARGETS["llama"]()
    expected = {job.key: reference(model, job) for job in greedy}
    mixed = [
        job
        for both in zip(greedy, [Job(100 + j.key, j.prompt, 1.0, j.max_new_tokens) for j in sampled], strict=True)
        for job in both
    ]
    engine = Engine(model, STOPS, rows=5, capacity=CAPACITY)
    replies = {reply.job.key: reply.tokens.tolist() for reply in engine.generate(mixed)}
    assert {key: tokens for key, tokens in replies.items() if key < 100} == expected
    assert len(replies) == 16


def test_an_engine_answers_twice_and_ends_early():
    """Jobs that stop coming let the rows in flight finish; the next call starts clean."""
    model = TARGETS["llama"]()
    jobs = random_jobs(9)
    expected = {job.key: reference(model, job) for job in jobs}
    engine = Engine(model, STOPS, rows=3, capacity=CAPACITY)
    assert {reply.job.key for reply in engine.generate(iter(jobs[:2]))} == {0, 1}
    again = {reply.job.key: reply.tokens.tolist() for reply in engine.generate(jobs)}
    assert again == expected
    assert list(engine.generate([])) == []


def test_samples_follow_the_softmax_at_their_temperature():
    torch.manual_seed(0)
    logits = torch.tensor([2.0, 1.0, 0.0, -1.0])
    for temperature in (0.5, 1.0, 2.0):
        drawn = pick(logits.expand(40_000, 4), torch.full((40_000,), temperature))
        share = torch.bincount(drawn, minlength=4) / 40_000
        torch.testing.assert_close(share, torch.softmax(logits / temperature, -1), atol=0.01, rtol=0)
    assert pick(logits.expand(1000, 4), torch.zeros(1000)).eq(0).all()


@pytest.mark.parametrize("name, reason", [("gpt_oss", "attention sinks"), ("qwen3_5", "linear_attention layers")])
def test_targets_it_cannot_decode_are_refused(name, reason):
    with pytest.raises(TrainingError, match=f"{reason}.*--server"):
        Engine(TARGETS[name](), STOPS, rows=2, capacity=CAPACITY)


def test_batch_size_follows_free_memory(monkeypatch):
    model = TARGETS["llama"]()
    assert fitting_rows(model, 512) == 16
    monkeypatch.setattr(type(model), "device", torch.device("cuda"))
    row_bytes = 512 * 2 * 4 * 2 * 8 * 4 + 14 * 128
    for free_rows, rows in ((100, 80), (10_000, 2048), (0, 8)):
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda _, free=free_rows: (free * row_bytes, 0))
        assert fitting_rows(model, 512) == rows


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_the_kernel_agrees_with_sdpa_on_cuda():
    assert slot_kernel.check(torch.device("cuda:0"), torch.bfloat16, 64) == "Triton kernel"


INTERPRETED = """
import torch
from dflash_core.training import slot_kernel
assert slot_kernel.agrees("cpu", torch.float32, 1e-4) and slot_kernel.agrees("cpu", torch.float16, 5e-3)
"""


INTERPRETER = importlib.util.find_spec("triton") is not None and np.lib.NumpyVersion(np.__version__) < "2.4.0"


@pytest.mark.skipif(not INTERPRETER, reason="needs Triton and a NumPy that its interpreter can work with")
def test_the_kernel_agrees_with_sdpa_in_the_interpreter():
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    subprocess.run([sys.executable, "-c", INTERPRETED], check=True, env=environment, timeout=60)


def test_without_triton_attention_is_masked_sdpa():
    assert slot_kernel.check(torch.device("cpu"), torch.float32, 64).startswith("masked SDPA")
