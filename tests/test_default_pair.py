"""The pair everyone starts with, real weights on this machine: exact, and quick to load a second time."""

import time
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch

from dflash_core import SamplingParams, load_pair
from dflash_core.config import DraftConfig, default_target_layer_ids
from dflash_core.model import DFlashDraftModel
from tests.scripted import OracleDrafter, run
from tests.test_decode import eval_prompts, generated

PROMPTS = 40
NEW_TOKENS = 24


@pytest.fixture(scope="module")
def pair():
    return load_pair(draft="none", device="cpu", dtype="float32")


@pytest.fixture(scope="module")
def replies(pair) -> list[tuple[list[int], list[int]]]:
    """40 real prompts and transformers' own greedy float32 replies to them."""
    rows = []
    for row in eval_prompts(PROMPTS):
        ids = pair.tokenizer.apply_chat_template(row["messages"], add_generation_prompt=True, return_dict=False)
        rows.append((ids, generated(pair.target.model, ids, NEW_TOKENS, eos=list(pair.stop_token_ids))))
    return rows


def random_draft() -> DFlashDraftModel:
    config = DraftConfig(
        hidden_size=576, intermediate_size=1536, num_hidden_layers=1, num_attention_heads=9, num_key_value_heads=3,
        head_dim=64, vocab_size=49152, block_size=4, mask_token_id=15, target_layer_ids=default_target_layer_ids(30, 2),
        num_target_layers=30,
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return DFlashDraftModel(config).eval()


@pytest.mark.parametrize("start", range(0, PROMPTS, 10))
def test_forty_real_prompts_with_scripted_acceptance_equal_generate(pair, replies, start):
    """The oracle's accepted count runs through 0..15, another order for every prompt."""
    for index, (ids, expected) in enumerate(replies[start : start + 10], start):
        script: Callable[[int], int] = lambda step, index=index: (index + 7 * step) % 16  # noqa: E731
        oracle = OracleDrafter(expected, 49152, 15, right_of=script, taps=(1, 27))
        reply, _ = run(pair, ids, SamplingParams(max_new_tokens=NEW_TOKENS), drafter=oracle)
        assert reply == expected, f"prompt {index}"


@pytest.mark.parametrize("start", range(0, PROMPTS, 10))
def test_forty_real_prompts_with_a_random_draft_equal_generate(pair, replies, start):
    """A draft that guesses almost nothing costs time, never correctness."""
    drafting = replace(pair, draft=random_draft())
    for index, (ids, expected) in enumerate(replies[start : start + 10], start):
        reply, _ = run(drafting, ids, SamplingParams(max_new_tokens=12))
        assert reply == expected[:12], f"prompt {index}"


def test_forty_real_prompts_with_the_shipped_draft_equal_generate(replies):
    pair = load_pair(device="cpu", dtype="float32")
    steps = tokens = 0
    for index, (ids, expected) in enumerate(replies):
        reply, events = run(pair, ids, SamplingParams(max_new_tokens=NEW_TOKENS))
        assert reply == expected, f"prompt {index}"
        steps, tokens = steps + events[-1].steps, tokens + events[-1].new_tokens - 1
    # The first 24 tokens of a reply are its hardest; the shipped draft must still clearly pay there.
    assert tokens / steps > 2.0


def test_second_start_needs_no_network_and_little_time(pair, monkeypatch):
    import socket
    import subprocess

    def refuse(*_args, **_options):
        raise AssertionError("the second start went looking outside")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(subprocess, "run", refuse)
    monkeypatch.setattr(subprocess, "Popen", refuse)
    start = time.perf_counter()
    load_pair(draft="none", device="cpu")
    assert time.perf_counter() - start < 20, "far beyond the 3 s that a quiet machine needs"
