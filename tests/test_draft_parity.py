"""Our draft model against transformers' own class of it: hidden states to 1e-6, and whole generations id for id."""

from itertools import accumulate

import pytest
import torch
from transformers.cache_utils import DFlashCache

from dflash_core import SamplingParams
from dflash_core.bench_methods import hf_draft, make_methods
from dflash_core.target import cache_argument
from tests.tiny import TARGETS, tiny_draft, tiny_llama, tiny_pair

FULL = {}
SLIDING = {"layer_types": ("sliding_attention", "sliding_attention"), "sliding_window": 5}
MIXED = {"layer_types": ("sliding_attention", "full_attention"), "sliding_window": 6}
SHAPES = pytest.mark.parametrize("shape", [FULL, SLIDING, MIXED], ids=["full", "sliding", "mixed"])


def uneven(draft):
    """Norm weights away from 1, so that a swapped or skipped one shows."""
    generator = torch.Generator().manual_seed(7)
    for weight in draft.parameters():
        weight.data.add_(0.1 * torch.randn(weight.shape, generator=generator))
    return draft


def forward(model, block, features, cache, **more):
    return model(block, features, **{cache_argument(model): cache}, **more)


@SHAPES
@torch.inference_mode()
def test_one_block_equals_theirs(shape):
    draft = uneven(tiny_draft(tiny_llama().config, **shape))
    generator = torch.Generator().manual_seed(1)
    block = torch.randn(1, 4, 32, generator=generator)
    features = torch.randn(1, 19, 64, generator=generator)
    cache = DFlashCache(config=hf_draft(draft).config)
    cache.set_previous_accepted_tokens(19)
    theirs = forward(hf_draft(draft), block, features, cache).last_hidden_state
    positions = torch.arange(23)[None]
    ours = draft(block, draft.project(features), positions[:, 19:], positions[:, :19])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)
    assert ours.abs().max() > 0.5


@SHAPES
@torch.inference_mode()
def test_a_cache_fed_in_pieces_equals_theirs(shape):
    draft = uneven(tiny_draft(tiny_llama().config, **shape))
    model, cache = hf_draft(draft), draft.new_cache()
    their_cache = DFlashCache(config=model.config)
    their_cache.activate_past_recording()
    generator = torch.Generator().manual_seed(2)
    length = 0
    for count in (7, 1, 4, 3, 1, 2):
        features = torch.randn(1, count, 64, generator=generator)
        block = torch.randn(1, 4, 32, generator=generator)
        their_cache.set_previous_accepted_tokens(count)
        if length:
            their_cache.crop(-4)
        positions = torch.arange(length, length + count + 4)[None]
        theirs = forward(model, block, features, their_cache, position_ids=positions).last_hidden_state
        draft.extend(cache, features)
        torch.testing.assert_close(draft.fill(cache, block), theirs, atol=1e-6, rtol=0)
        length += count
    assert length > 3 * 5  # the context outgrew the window


def test_their_model_holds_the_very_same_tensors():
    draft = tiny_draft(tiny_llama().config)
    theirs = hf_draft(draft)
    ours = dict(draft.named_parameters())
    assert theirs.encoder.fc.weight.data_ptr() == ours["fc.weight"].data_ptr()
    assert theirs.encoder.output_norm_enc.weight.data_ptr() == ours["hidden_norm.weight"].data_ptr()
    assert sum(1 for _ in theirs.parameters()) == len(ours) and not any(p.is_meta for p in theirs.parameters())


@pytest.mark.parametrize("rope", [{"rope_type": "linear", "factor": 4.0}, {"rope_type": "yarn", "factor": 4.0}])
@torch.inference_mode()
def test_scaled_rotary_embeddings_equal_theirs(rope):
    rope = {"rope_theta": 10000.0, "original_max_position_embeddings": 16} | rope
    draft = uneven(tiny_draft(tiny_llama().config, rope_parameters=rope, max_position_embeddings=64))
    block, features = torch.randn(1, 4, 32), torch.randn(1, 19, 64)
    cache = DFlashCache(config=hf_draft(draft).config)
    cache.set_previous_accepted_tokens(19)
    theirs = forward(hf_draft(draft), block, features, cache).last_hidden_state
    positions = torch.arange(23)[None]
    ours = draft(block, draft.project(features), positions[:, 19:], positions[:, :19])
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=0)


def strong(draft):
    """Wide matrices, so that what is guessed depends on the whole context and not on the anchor alone."""
    for weight in uneven(draft).parameters():
        weight.data.mul_(3.0 if weight.dim() > 1 else 1.0)
    return draft


def two_words(model):
    """The target says token 0 or 1 only, so a random draft is right half of the time."""
    head = model.lm_head.weight.data
    head[1] = -head[0]
    head[2:] *= 0.001
    return model


def assert_same_generation(pair, limit: int) -> list[int]:
    """Ids, and how far each block was accepted, are the same in both; returns our tokens per verify pass."""
    prompt = [5, 9, 17, 33, 40, 41, 42, 43, 44, 55, 66, 77, 88]
    params = SamplingParams(max_new_tokens=limit, stop_token_ids=())
    ours, theirs = (method.run(prompt) for method in make_methods(pair, ["dflash", "hf-dflash"], params, []))
    assert ours.ids == theirs.ids and len(ours.ids) == limit
    # Near the limit we draft a shorter block, they a full one that is cut afterwards.
    full = sum(total <= limit - pair.draft.config.block_size for total in accumulate(ours.commits))
    assert full > limit // 5 and ours.commits[: full + 1] == theirs.commits[: full + 1]
    return list(ours.commits[1:])


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3", "gpt_oss"])
@SHAPES
def test_whole_generations_equal_theirs(family, shape):
    model = TARGETS[family]()
    assert_same_generation(tiny_pair(model, strong(tiny_draft(model.config, **shape))), 48)


@SHAPES
def test_generations_with_accepted_drafts_equal_theirs(shape):
    """Partly and wholly accepted blocks, with the bonus of the latter."""
    model = two_words(tiny_llama())
    for seed in range(3):
        commits = assert_same_generation(tiny_pair(model, strong(tiny_draft(model.config, seed=seed, **shape))), 60)
        assert {1, 2, 3, 4} <= set(commits)


def test_a_draft_that_taps_other_layers_accepts_otherwise():
    """The comparison above would notice a wrong tap: it changes how far blocks are accepted."""
    model = two_words(tiny_llama())
    drafts = [strong(tiny_draft(model.config, target_layer_ids=taps)) for taps in ((1, 2), (0, 3))]
    commits = [assert_same_generation(tiny_pair(model, draft), 60) for draft in drafts]
    assert commits[0] != commits[1]
