"""Fixed buffers and recorded forwards change no token; on CUDA the same tests run with real recordings."""

import pytest
import torch

from dflash_core import SamplingParams
from dflash_core.graphed import GraphedDrafter, can_graph
from dflash_core.target import Target
from tests import tiny
from tests.scripted import OracleDrafter, run
from tests.test_decode import generated, prompt
from tests.test_draft_parity import uneven

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def graphed_pair(**draft_options):
    model = tiny.tiny_llama(max_position_embeddings=2048).to(DEVICE)
    # Uneven: DFlash 2's parts change nothing when they are fresh.
    pair = tiny.tiny_pair(model, uneven(tiny.tiny_draft(model.config, block_size=8, **draft_options)).to(DEVICE))
    object.__setattr__(pair, "target", Target(model, graphs=True))
    return pair


@pytest.mark.parametrize("seed", range(3))
def test_recorded_baseline_and_drafting_equal_generate(seed):
    pair = graphed_pair()
    ids = prompt(seed)
    expected = generated(pair.target.model.cpu(), ids, 60)
    pair.target.model.to(DEVICE)
    params = SamplingParams(max_new_tokens=60, stop_token_ids=())
    assert run(pair, ids, params, drafting=False)[0] == expected
    assert run(pair, ids, params)[0] == expected


@pytest.mark.parametrize("k", [1, 4, 15])
def test_rolling_back_a_recorded_target_leaves_no_trace(k):
    pair = graphed_pair()
    ids = prompt(7)
    expected, _ = run(pair, ids, SamplingParams(max_new_tokens=70, stop_token_ids=()), drafting=False)
    oracle = OracleDrafter(expected, 128, k, right_of=lambda step: (step * 7) % (k + 1), taps=(0, 2))
    reply, events = run(pair, ids, SamplingParams(max_new_tokens=70, stop_token_ids=()), drafter=oracle)
    assert reply == expected
    assert len({step.accepted for step in events[1:-1]}) > min(k, 3)


SLIDING = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}
DFLASH2 = {"conv_kernel_size": 2, "conv_group_size": 4, "selector_rank": 6, "selector_top_k": 5}


@pytest.mark.parametrize("options", [{}, SLIDING, DFLASH2, SLIDING | DFLASH2 | {"is_causal": None}])
def test_recorded_draft_guesses_what_the_plain_one_does(options):
    """Same drafted tokens and confidences step by step, also after the buffers have grown (prompt 24, 700 new tokens)."""
    pair = graphed_pair(**options)
    plain = tiny.tiny_pair(pair.target.model, pair.draft)
    object.__setattr__(plain, "target", Target(pair.target.model, graphs=False))
    params = SamplingParams(max_new_tokens=700, stop_token_ids=())
    expected, mine = run(plain, prompt(3), params)[1], run(pair, prompt(3), params)[1]
    assert [step.drafted for step in mine[1:-1]] == [step.drafted for step in expected[1:-1]]
    for a, b in zip(mine[1:-1], expected[1:-1], strict=True):
        assert a.draft_confidence == pytest.approx(b.draft_confidence, abs=1e-4)


def test_only_one_device_full_attention_is_recorded():
    for name, build in tiny.TARGETS.items():
        model = build().to(DEVICE)
        assert can_graph(model) == (DEVICE == "cuda" and name in ("llama", "qwen3"))


def test_growing_keeps_the_context():
    pair = graphed_pair()
    drafter, features = GraphedDrafter(pair.target, pair.draft), torch.randn(1, 900, 64, device=DEVICE)
    with torch.inference_mode():
        at_once = GraphedDrafter(pair.target, pair.draft)
        at_once.commit(features)
        expected = at_once.propose(5, 7)
        drafter.commit(features[:, :20])
        for start in range(20, 900, 8):
            drafter.propose(9, 7)
            drafter.commit(features[:, start : start + 8])
        torch.testing.assert_close(drafter.propose(5, 7), expected, atol=1e-4, rtol=1e-4)
