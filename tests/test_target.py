"""A target session forwards, taps and takes back exactly, whatever its layers keep."""

import warnings

import pytest
import torch

from dflash_core import DFlashError
from dflash_core.target import Target
from tests import tiny


@pytest.fixture(scope="module", params=sorted(tiny.TARGETS))
def target(request):
    return Target(tiny.TARGETS[request.param]())


def ids(seed: int, count: int) -> torch.Tensor:
    return torch.randint(4, 126, (1, count), generator=torch.Generator().manual_seed(seed))


def same(a: torch.Tensor, b: torch.Tensor) -> None:
    torch.testing.assert_close(a, b, atol=2e-4, rtol=1e-3)


@torch.inference_mode()
def test_features_are_the_tapped_layers_outputs(target):
    taps = (0, 2, target.num_layers - 1)
    tokens = ids(1, 9)
    output = target.model(tokens, output_hidden_states=True)
    session = target.session(taps)
    logits, features = session.prefill(tokens)
    same(features, torch.cat([output.hidden_states[i + 1] for i in taps], -1))
    same(logits, output.logits[0, -1])
    assert target.session(()).prefill(tokens)[1] is None


@torch.inference_mode()
def test_a_forward_uses_nothing_that_transformers_will_drop(target):
    with warnings.catch_warnings():
        warnings.simplefilter("error", FutureWarning)
        session = target.session((0,))
        session.prefill(ids(4, 9))
        session.forward(ids(5, 4))


@pytest.mark.parametrize("keep", range(1, 7))
@torch.inference_mode()
def test_rollback_leaves_no_trace(target, keep):
    """After many partly kept blocks the next logits equal those of a session that only saw the kept tokens."""
    prompt = ids(2, 19)
    session, clean = target.session((1,)), target.session((1,))
    session.prefill(prompt)
    kept = prompt
    for turn in range(5):
        block = ids(10 + turn, 6)
        session.forward(block)
        session.rollback(keep)
        kept = torch.cat((kept, block[:, :keep]), dim=1)
        assert session.length == kept.shape[1]
    clean.prefill(kept)
    last = ids(30, 4)
    logits, features = session.forward(last)
    expected, expected_features = clean.forward(last)
    same(logits, expected)
    same(features, expected_features)


@torch.inference_mode()
def test_one_token_steps_mix_with_blocks(target):
    session = target.session()
    tokens = ids(3, 40)
    session.prefill(tokens[:, :11])
    at = 11
    for width, keep in ((1, 1), (5, 2), (1, 1), (1, 1), (6, 6), (4, 1), (1, 1)):
        session.forward(tokens[:, at : at + width])
        session.rollback(keep)
        at += keep
    logits, _ = session.forward(tokens[:, at : at + 3])
    same(logits, target.model(tokens[:, : at + 3]).logits[0, -3:])


@torch.inference_mode()
def test_head_and_embedding_carry_the_targets_own_scales(target):
    """Embedding scale, logit scale and softcap: head(last hidden) is what the model returns."""
    tokens = ids(4, 7)
    output = target.model(tokens, output_hidden_states=True)
    same(target.embed(tokens), output.hidden_states[0])
    same(target.embed(tokens, 3.0), 3.0 * target.model.get_input_embeddings().weight[tokens])
    same(target.head(output.hidden_states[-1]), output.logits)


@torch.inference_mode()
def test_scales_applied_outside_the_modules_are_measured():
    from transformers import GraniteConfig, GraniteForCausalLM

    torch.manual_seed(0)
    shape = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, vocab_size=128)
    model = GraniteForCausalLM(GraniteConfig(**shape, embedding_multiplier=12.0, logits_scaling=8.0))
    target = Target(model.eval())
    output = model(ids(5, 6), output_hidden_states=True)
    same(target.embed(ids(5, 6)), output.hidden_states[0])
    same(target.head(output.hidden_states[-1]), output.logits)


def test_a_cache_that_cannot_be_rolled_back_is_refused(monkeypatch):
    from transformers import cache_utils

    class Odd(cache_utils.DynamicLayer):
        pass

    monkeypatch.setitem(cache_utils.DYNAMIC_LAYER_TYPE_MAPPING, "full_attention", Odd)
    with pytest.raises(DFlashError, match="rolled back.*uses Odd"):
        Target(tiny.tiny_llama())
