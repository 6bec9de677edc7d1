"""The parts of a training step by themselves: labels, weights, softmax, Muon, schedule, first weights."""

import itertools
import math

import pytest
import torch

from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.training import loss
from dflash_core.training.features import TargetReader
from dflash_core.training.init import Measured, draft_config, initialise, measure
from dflash_core.training.muon import Muon, orthogonalise
from dflash_core.training.schedule import Clock, Schedule
from tests.tiny import tiny_draft, tiny_gemma3, tiny_llama, tiny_qwen3

# The loss.


def test_slot_weights_fall_as_equation_4_says():
    weights = loss.decay_weights(7, 4.0, torch.device("cpu"))
    assert weights.tolist() == pytest.approx([math.exp(-(j - 1) / 4.0) for j in range(1, 8)])
    assert [loss.paper_gamma(size) for size in (8, 10, 16)] == [4.0, 5.0, 7.0]
    assert 4.0 < loss.paper_gamma(12) < 7.0 < loss.paper_gamma(32)


@pytest.mark.parametrize("with_argmax", [True, False])
def test_labels_and_the_prefix_mask_equal_the_plain_loop(with_argmax):
    torch.manual_seed(0)
    tokens, argmax = torch.randint(0, 3, (40,)), torch.randint(0, 3, (40,))
    document = torch.tensor([0] * 15 + [1] * 20 + [-1] * 5)
    anchor = torch.tensor([0, 3, 11, 13, 15, 20, 21, 33, -1])
    labels, live = loss.slot_labels(tokens, argmax if with_argmax else None, document, anchor, 6)
    for row, start in enumerate(anchor.tolist()):
        following = start >= 0
        for slot in range(1, 6):
            at = start + slot
            following = following and at < 40 and document[at] == document[start]
            assert live[row, slot - 1] == following, (row, slot)
            if following:
                label = argmax[at - 1] if with_argmax else tokens[at]
                assert labels[row, slot - 1] == label
                following = not with_argmax or label == tokens[at]


def test_dpace_weights_equal_the_plain_loop():
    torch.manual_seed(0)
    nll, live = torch.rand(3, 4), torch.tensor([[1, 1, 1, 1], [1, 1, 0, 0], [0, 0, 0, 0]]).bool()
    weights = loss.dpace_weights(nll, live, 0.4)
    for row in range(3):
        reach = [1.0]
        for slot in range(4):
            confidence = 0.6 * math.exp(-nll[row, slot]) + 0.4
            reach.append(reach[-1] * confidence if live[row, slot] else 0.0)
        expected = [sum(reach[m] for m in range(j, 5)) for j in range(1, 5)]
        assert weights[row].tolist() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("make", [tiny_llama, tiny_gemma3], ids=["plain", "scaled and capped"])
def test_the_sampled_softmax_is_the_full_one_on_average(make):
    target = Target(make())
    torch.manual_seed(0)
    hidden = torch.randn(6, target.hidden_size, requires_grad=True)
    rare = torch.arange(5, 11)
    is_frequent = torch.ones(target.vocab_size, dtype=torch.bool)
    is_frequent[rare] = False
    softmax = loss.SampledSoftmax(target, is_frequent.nonzero()[:, 0], is_frequent)
    labels = torch.tensor([0, 1, 5, 6, 30, 10])
    full, right = loss.FullSoftmax(target)(hidden, labels, None)
    # All the rare tokens drawn: the very same number and gradient.
    whole, same = softmax(hidden, labels, rare)
    assert torch.allclose(whole, full, atol=1e-5) and torch.equal(same, right)
    gradients = [torch.autograd.grad(part.sum(), hidden, retain_graph=True)[0] for part in (whole, full)]
    assert torch.allclose(*gradients, atol=1e-5)
    # Every pair of them equally often: 1 / probability is right on average, for common and rare labels.
    pairs = itertools.combinations(rare.tolist(), 2)
    drawn = torch.stack([softmax(hidden, labels, torch.tensor(pair))[0] for pair in pairs])
    assert torch.allclose(drawn.exp().mean(0), full.exp(), rtol=1e-4) and (drawn.std(0) > 0).all()


def test_distillation_is_cross_entropy_to_the_kept_logits():
    torch.manual_seed(0)
    mine, theirs = torch.randn(5, 12), torch.randn(5, 12)
    found = loss.distil(mine, *theirs.topk(4))
    for row in range(5):
        ids = theirs[row].topk(4).indices
        wanted = torch.softmax(theirs[row, ids], 0)
        expected = -(wanted * torch.log_softmax(mine[row], 0)[ids]).sum().item()
        assert found[row].item() == pytest.approx(expected, abs=1e-5)
    everything = loss.distil(theirs, *theirs.topk(12))
    assert torch.allclose(everything, -(theirs.softmax(-1) * theirs.log_softmax(-1)).sum(-1), atol=1e-5)


# Muon.


@pytest.mark.parametrize("shape", [(8, 8), (8, 24), (24, 8)])
def test_orthogonalised_matrices_have_singular_values_near_one(shape):
    torch.manual_seed(0)
    matrices = torch.randn(3, *shape) * torch.tensor([1e-3, 1.0, 1e3])[:, None, None]
    found = orthogonalise(matrices)
    values = torch.linalg.svdvals(found)
    assert values.min() > 0.5 and values.max() < 1.3
    # The directions stay: the polar factor of each matrix is the nearest orthogonal one.
    u, _, v = torch.linalg.svd(matrices, full_matrices=False)
    cosine = (found * (u @ v)).sum((1, 2)) / found.norm(dim=(1, 2)) / (u @ v).norm(dim=(1, 2))
    assert cosine.min() > 0.95
    assert torch.allclose(found[1], orthogonalise(matrices[1:2])[0], atol=1e-5)


def test_muon_moves_matrices_by_orthogonal_steps_whatever_the_gradients_scale():
    torch.manual_seed(0)
    params = [torch.nn.Parameter(torch.randn(shape)) for shape in ((6, 6), (6, 6), (12, 6))]
    optimizer, before = Muon(params, lr=0.1, weight_decay=0.5), [p.detach().clone() for p in params]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 1]
    for parameter, scale in zip(params, (1e-4, 1e4, 1.0), strict=True):
        parameter.grad = scale * torch.randn_like(parameter)
    optimizer.step()
    for parameter, old in zip(params, before, strict=True):
        step = (old * (1 - 0.1 * 0.5) - parameter.detach()) / 0.1
        scale = max(1.0, parameter.shape[0] / parameter.shape[1]) ** 0.5
        values = torch.linalg.svdvals(step) / scale
        assert values.min() > 0.5 and values.max() < 1.3 and (step * parameter.grad).sum() > 0


def test_muon_solves_a_badly_scaled_bowl():
    """Minimise |W A - B A|^2 with A's scales a hundredfold apart: orthogonal steps do not care."""
    torch.manual_seed(0)
    a, goal = torch.diag(torch.logspace(-2, 0, 8)), torch.randn(8, 8)
    w = torch.nn.Parameter(torch.zeros(8, 8))
    optimizer = Muon([w], lr=0.05)
    for step in range(400):
        optimizer.param_groups[0]["lr"] = 0.05 * (1 - step / 400)
        optimizer.zero_grad()
        ((w @ a - goal @ a) ** 2).sum().backward()
        optimizer.step()
    assert (w - goal).norm() < 0.3 * goal.norm()


# The schedule.


def test_schedules_rise_hold_and_fall():
    shapes = {name: Schedule(name, 0.1, 0.5) for name in ("constant-linear", "linear", "cosine", "constant")}
    for name, schedule in shapes.items():
        assert schedule.factor(0.0) == 0.0 and schedule.factor(0.05) == pytest.approx(0.5)
        assert schedule.factor(0.1) == pytest.approx(1.0)
        assert schedule.factor(1.0) == schedule.factor(3.0) == pytest.approx(float(name == "constant"))
    at = {name: [schedule.factor(x) for x in (0.325, 0.55, 0.775)] for name, schedule in shapes.items()}
    assert at["constant-linear"] == pytest.approx([1.0, 0.9, 0.45])
    assert at["linear"] == pytest.approx([0.75, 0.5, 0.25])
    assert at["cosine"] == pytest.approx([0.5 + math.cos(math.pi / 4) / 2, 0.5, 0.5 - math.cos(math.pi / 4) / 2])
    assert at["constant"] == [1.0, 1.0, 1.0]
    assert Schedule("linear", 0.0, 0.5, floor=0.2).factor(1.0) == pytest.approx(0.2)
    assert Schedule("linear", 0.0, 0.5).factor(0.0) == 1.0


def test_the_clock_counts_time_over_resumes_and_follows_the_nearer_end(monkeypatch):
    now = [1000.0]
    monkeypatch.setattr("dflash_core.training.schedule.time.monotonic", lambda: now[0])
    clock = Clock(990.0, spent_seconds=50.0, max_seconds=210.0, max_steps=1000)
    assert clock.process_seconds == 10.0 and clock.seconds == 60.0
    # Ten seconds are kept for the end.
    assert clock.progress(0) == pytest.approx(60 / 200) and clock.progress(900) == 0.9
    clock.reserve_seconds, now[0] = 90.0, 1050.0
    assert clock.progress(0) == pytest.approx(110 / 120)
    assert Clock(0.0, 0.0, None, 100).progress(25) == 0.25


# First weights.


@pytest.mark.parametrize("make", [tiny_llama, tiny_qwen3])
def test_a_draft_starts_as_its_targets_last_layers(make):
    model = make()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if "norm" in name:
                weight.uniform_(0.5, 2.0)
    target = Target(model)
    config = draft_config(target, 2, 4, 127, None, 3)
    draft = tiny_draft(model.config, target_layer_ids=config.target_layer_ids)
    reader = TargetReader(target, config.target_layer_ids, use_flex=False, compile=False)
    tokens = torch.randint(4, 100, (1, 50))
    measured = measure(reader, tokens, torch.zeros_like(tokens), torch.arange(50)[None], layers=2)
    features, _ = reader.read(tokens, torch.zeros_like(tokens), torch.arange(50)[None])
    reader.close()
    for tap, scale in zip(features[0].chunk(3, -1), measured.tap_scale, strict=True):
        assert math.log2(scale).is_integer()
        assert 0.6 < scale * tap.pow(2).mean(-1).sqrt().median() < 1.6
    said = initialise(draft, target, measured, from_target=True)
    assert "last 2" in said and "q_proj" in said and "down_proj" in said
    x = torch.randn(1, 5, 32)
    for mine, theirs in zip(draft.layers, model.model.layers[-2:], strict=True):
        for projection in ("q_proj", "k_proj", "v_proj"):
            expected = getattr(theirs.self_attn, projection)(theirs.input_layernorm(x))
            found = getattr(mine.self_attn, projection)(mine.input_layernorm(x))
            assert torch.allclose(found, expected, atol=1e-5)
        expected = theirs.mlp(theirs.post_attention_layernorm(x))
        assert torch.allclose(mine.mlp(mine.post_attention_layernorm(x)), expected, atol=1e-5)
    assert torch.allclose(draft.norm(x), model.model.norm(x), atol=1e-5)
    assert torch.allclose(draft.fc(x.repeat(1, 1, 3)), x, atol=1e-5)
    if make is tiny_qwen3:
        assert torch.allclose(draft.layers[0].self_attn.q_norm.weight, model.model.layers[-2].self_attn.q_norm.weight)
    else:  # as sharp as queries and keys were without a norm
        queries = model.model.layers[-1].self_attn
        captured = []
        handle = queries.q_proj.register_forward_hook(lambda m, i, o: captured.append(o))
        model(tokens)
        handle.remove()
        rms = captured[0].pow(2).mean().sqrt().item()
        assert draft.layers[1].self_attn.q_norm.weight.tolist() == pytest.approx([rms] * 8, rel=1e-3)
    assert "random" in initialise(draft, target, measured, from_target=False)


def test_a_narrower_draft_takes_the_targets_strongest_units():
    model = tiny_llama()
    width = model.config.intermediate_size
    for layer in model.model.layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0.0
    target = Target(model)
    draft = DFlashDraftModel(draft_config(target, 2, 4, 127, None, 3, intermediate_size=width // 2))
    said = initialise(draft, target, Measured([1.0] * 3, [(1.0, 1.0)] * 2), from_target=True)
    assert "up_proj" in said and draft.layers[0].mlp.up_proj.weight.shape == (width // 2, 32)
    x = torch.randn(1, 5, 32)
    for mine, theirs in zip(draft.layers, model.model.layers[-2:], strict=True):
        expected = theirs.mlp(theirs.post_attention_layernorm(x))
        assert torch.allclose(mine.mlp(mine.post_attention_layernorm(x)), expected, atol=1e-5)
