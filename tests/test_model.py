"""The draft model equals the plain formulas of the paper, with and without a cache, windowed or not."""

import math

import pytest
import torch

from dflash_core.config import DraftConfig, default_target_layer_ids
from dflash_core.model import DFlashDraftModel, rope_frequencies
from tests import tiny


def draft(**overrides) -> DFlashDraftModel:
    return tiny.tiny_draft(tiny.tiny_llama().config, block_size=6, seed=3, **overrides)


def norm(x, weight, eps=1e-6):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def spin(x, positions, head_dim, theta=10000.0):
    """Rotary embedding by its definition: pairs (i, i + d/2) turned by position * theta^(-2i/d)."""
    out = x.clone()
    for row, position in enumerate(positions):
        for i in range(head_dim // 2):
            angle = position * theta ** (-2 * i / head_dim)
            a, b = x[row, i], x[row, i + head_dim // 2]
            out[row, i] = a * math.cos(angle) - b * math.sin(angle)
            out[row, i + head_dim // 2] = b * math.cos(angle) + a * math.sin(angle)
    return out


def by_definition(model: DFlashDraftModel, features, block):
    """DFlash §4.1 written out with loops, one head and one slot at a time."""
    config, state = model.config, model.state_dict()
    context = norm(features @ state["fc.weight"].T, state["hidden_norm.weight"])
    start, width, d = len(features), len(block), config.head_dim
    positions = list(range(start + width))
    x = block
    for index, kind in enumerate(config.layer_types):
        w = {key.removeprefix(f"layers.{index}."): value for key, value in state.items() if key.startswith(f"layers.{index}.")}
        inside = norm(x, w["input_layernorm.weight"])
        source = torch.cat((context, inside))
        heads = []
        for head in range(config.num_attention_heads):
            kv = head // (config.num_attention_heads // config.num_key_value_heads)
            q = norm(inside @ w["self_attn.q_proj.weight"][head * d : head * d + d].T, w["self_attn.q_norm.weight"])
            k = norm(source @ w["self_attn.k_proj.weight"][kv * d : kv * d + d].T, w["self_attn.k_norm.weight"])
            v = source @ w["self_attn.v_proj.weight"][kv * d : kv * d + d].T
            q, k = spin(q, positions[start:], d), spin(k, positions, d)
            scores = q @ k.T / math.sqrt(d)
            if kind == "sliding_attention":
                for row in range(width):
                    for column in positions:
                        if abs(start + row - column) >= config.sliding_window:
                            scores[row, column] = float("-inf")
            heads.append(scores.softmax(-1) @ v)
        x = x + torch.cat(heads, -1) @ w["self_attn.o_proj.weight"].T
        inside = norm(x, w["post_attention_layernorm.weight"])
        gate, up = inside @ w["mlp.gate_proj.weight"].T, inside @ w["mlp.up_proj.weight"].T
        x = x + (gate * gate.sigmoid() * up) @ w["mlp.down_proj.weight"].T
    return norm(x, state["norm.weight"])


@pytest.mark.parametrize(
    "kinds,window", [(("full_attention",) * 2, None), (("sliding_attention", "full_attention"), 4), (("sliding_attention",) * 2, 9)]
)
@torch.inference_mode()
def test_forward_and_cache_equal_the_definition(kinds, window):
    model = draft(layer_types=kinds, sliding_window=window)
    for parameter in model.parameters():
        if parameter.dim() == 1:
            parameter.copy_(torch.rand_like(parameter) + 0.5)
    generator = torch.Generator().manual_seed(5)
    features = torch.randn(11, 64, generator=generator)
    block = torch.randn(6, 32, generator=generator)
    expected = by_definition(model, features, block)

    positions = torch.arange(17)[None]
    whole = model(block[None], model.project(features[None]), positions[:, 11:], positions[:, :11])
    torch.testing.assert_close(whole[0], expected, atol=2e-5, rtol=1e-4)

    cache = model.new_cache()
    for start, end in ((0, 4), (4, 5), (5, 11)):
        model.extend(cache, features[None, start:end])
    assert cache.length == 11
    for _ in range(2):
        torch.testing.assert_close(model.fill(cache, block[None])[0], expected, atol=2e-5, rtol=1e-4)


@torch.inference_mode()
def test_cache_keeps_its_content_when_it_grows():
    model = draft()
    features = torch.randn(1, 700, 64)
    block = torch.randn(1, 6, 32)
    slowly, at_once = model.new_cache(), model.new_cache()
    for start in range(0, 700, 7):
        model.extend(slowly, features[:, start : start + 7])
    model.extend(at_once, features)
    torch.testing.assert_close(model.fill(slowly, block), model.fill(at_once, block), atol=1e-5, rtol=1e-5)


@torch.inference_mode()
def test_every_slot_sees_the_whole_block():
    """No causal mask inside the block: the last slot's input moves the first slot's output."""
    model = draft()
    cache = model.new_cache()
    model.extend(cache, torch.randn(1, 5, 64))
    block = torch.randn(1, 6, 32)
    moved = block.clone()
    moved[0, -1] += 1.0
    assert (model.fill(cache, block)[0, 0] - model.fill(cache, moved)[0, 0]).abs().max() > 1e-4


def test_parameter_names_are_the_public_checkpoints():
    names = {name.replace("layers.1.", "layers.N.") for name in draft().state_dict() if not name.startswith("layers.0.")}
    assert names == {
        "fc.weight", "hidden_norm.weight", "norm.weight",
        *(f"layers.N.{norm}.weight" for norm in ("input_layernorm", "post_attention_layernorm")),
        *(f"layers.N.self_attn.{part}.weight" for part in ("q_proj", "k_proj", "v_proj", "o_proj", "q_norm", "k_norm")),
        *(f"layers.N.mlp.{part}.weight" for part in ("gate_proj", "up_proj", "down_proj")),
    }  # fmt: skip


@pytest.mark.parametrize(
    "rope",
    [
        {"rope_type": "default", "rope_theta": 100000.0},
        {"rope_type": "linear", "rope_theta": 10000.0, "factor": 4.0},
        {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
         "original_max_position_embeddings": 64},
        {"rope_type": "yarn", "rope_theta": 1000000.0, "factor": 4.0, "original_max_position_embeddings": 128},
    ],
    ids=lambda rope: rope["rope_type"],
)  # fmt: skip
def test_rotary_frequencies_equal_transformers(rope):
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    config = tiny.tiny_draft_config(tiny.tiny_llama().config, rope_parameters=rope)
    theirs = LlamaRotaryEmbedding(
        LlamaConfig(hidden_size=32, num_attention_heads=4, head_dim=8, max_position_embeddings=512, rope_parameters=dict(rope))
    )
    frequencies, factor = rope_frequencies(config)
    torch.testing.assert_close(frequencies, theirs.inv_freq)
    assert factor == pytest.approx(theirs.attention_scaling)
    cos, sin = DFlashDraftModel(config).rotary(torch.arange(300)[None], torch.float32)
    their_cos, their_sin = theirs(torch.zeros(1, 1, 1), torch.arange(300)[None])
    torch.testing.assert_close(cos[0, 0], their_cos[0])
    torch.testing.assert_close(sin[0, 0], their_sin[0])


def test_tap_spacing_is_the_papers():
    assert default_target_layer_ids(36, 5) == (1, 9, 17, 25, 33)
    assert default_target_layer_ids(30, 1) == (15,)


def test_config_survives_its_own_json():
    for rope in ({"rope_type": "default", "rope_theta": 5.0}, {"rope_type": "linear", "rope_theta": 7.0, "factor": 2.0}):
        config = tiny.tiny_draft_config(
            tiny.tiny_llama().config, rope_parameters=rope, layer_types=("sliding_attention", "full_attention"), sliding_window=9,
            is_causal=None, input_embedding_scale=rope["rope_theta"],
        )  # fmt: skip
        assert DraftConfig.from_dict(config.to_dict()) == config
