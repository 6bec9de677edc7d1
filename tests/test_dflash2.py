"""DFlash 2: its two parts against plain loops, and decoding, loading and training with them; drafts are random."""

import itertools
import json
from collections import Counter
from dataclasses import replace

import pytest
import torch

from dflash_core import DraftConfig, SamplingParams
from dflash_core.bench_methods import hf_draft
from dflash_core.dflash2 import DynamicConv
from dflash_core.drafter import Chain, DFlashDrafter
from dflash_core.errors import PromptError, TrainingError
from dflash_core.masks import TrainingLayout
from dflash_core.model import DFlashDraftModel
from dflash_core.sampling import Sampler
from dflash_core.step_callback import WatchedDrafter
from dflash_core.training import loss, train
from dflash_core.training.evaluate import Reply, teacher_forced
from dflash_core.training.features import TargetReader
from dflash_core.training.init import grown
from dflash_core.training.objective import DraftObjective, Inputs, LossSettings, fill_blocks, layer_masks
from dflash_core.training.report import read_metrics
from tests.progressions import fresh_process, options, trained, world
from tests.scripted import run
from tests.test_draft_parity import strong, two_words, uneven
from tests.test_loading import edit_json, load, nested, refused, take
from tests.test_sampling import CPU, ThreeTokens, chi_square, chi_square_limit
from tests.test_train_infer import rows
from tests.tiny import VOCAB_SIZE, tiny_draft, tiny_llama, tiny_pair, write_draft, write_target

PARTS = dict(conv_kernel_size=2, conv_group_size=4, selector_rank=6, selector_top_k=5)
PROMPT = [5, 9, 17, 33, 40, 41]
SLIDING, FULL = ("sliding_attention",) * 2, ("full_attention",) * 2
BLOCK, CONTEXT = torch.randn(2, 1, 4, 32, generator=torch.Generator().manual_seed(0))


def random_pair(seed=0, **shape):
    """The draft's new parts are random too: fresh ones would change nothing."""
    model = two_words(tiny_llama())
    return tiny_pair(model, strong(tiny_draft(model.config, seed=seed, **PARTS | shape)))


def drafted_by(pair):
    return [step.drafted for step in run(pair, PROMPT, SamplingParams(max_new_tokens=40, stop_token_ids=()))[1][1:-1]]


@torch.inference_mode()
def forward(draft, block=BLOCK):
    where = torch.arange(8)[None]
    return draft(block, CONTEXT, where[:, 4:], where[:, :4])


def plain_convolution(conv, x, kernel_input, side, slots, group):
    """[Q, H] by the published formula: blocks end to end, `side` 0 before the sublayer and 1 after it."""
    _, taps, size = conv.base_kernel.shape
    result = torch.zeros_like(x)
    for i, given in enumerate(kernel_input):
        delta = (conv.kernel_projection.weight @ given).view(2, taps, size // group)
        for t in range(min(taps, i % slots + 1)):
            for c in range(size):
                result[i, c] += (conv.base_kernel[side, t, c] + delta[side, t, c // group]) * x[i - t, c]
    return result


@pytest.mark.parametrize("taps, slots, group", [(1, 4, 4), (2, 2, 8), (2, 4, 4), (3, 4, 16), (3, 2, 32)])
@torch.no_grad()
def test_the_convolution_equals_a_plain_loop(taps, slots, group):
    draft = tiny_draft(tiny_llama().config, conv_kernel_size=taps, conv_group_size=group)
    conv, (x, inner) = uneven(DynamicConv(draft.config)), torch.randn(2, 1, 8, 32)
    before, kernel = conv.before(x, slots)
    for found, given, side in ((before, x, 0), (conv.after(inner, kernel, slots), inner, 1)):
        expected = plain_convolution(conv, given[0], x[0], side, slots, group)
        torch.testing.assert_close(found[0], expected, atol=1e-5, rtol=1e-5)
    x[:, :slots] += 1.0
    assert torch.equal(conv.before(x, slots)[0][:, slots:], before[:, slots:])  # the first block does not leak


@torch.no_grad()
def test_a_layer_convolves_around_both_sublayers():
    draft = random_pair().draft
    layer, rotary = draft.layers[0], draft.rotary(torch.arange(8)[None], torch.float32)
    mask = (torch.arange(8)[:, None] // 4 == torch.arange(8) // 4)[None, None]
    x = expected = torch.randn(1, 8, 32)
    for norm, conv, sublayer in (
        (layer.input_layernorm, layer.attention_conv, lambda h: layer.self_attn(h, rotary, None, mask)),
        (layer.post_attention_layernorm, layer.mlp_conv, layer.mlp),
    ):
        given = norm(expected)[0]
        inner = sublayer(plain_convolution(conv, given, given, 0, 4, 4)[None])[0]
        expected = expected + plain_convolution(conv, inner, given, 1, 4, 4)
    assert (layer(x, rotary, None, mask, 4) - expected).abs().max() < 1e-4 * expected.abs().max()


def plain_walk(selector, hidden, logits, anchor):
    """The best candidate of each slot after the one before, and each slot's scores by candidate."""
    tokens, scores = [anchor], []
    for state, row in zip(hidden, logits, strict=True):
        code = selector.predecessor_codebook[tokens[-1]] * (selector.hidden_projection.weight @ state)
        best = sorted(range(len(row)), key=row.tolist().__getitem__)[-PARTS["selector_top_k"] :]
        scores.append({token: float(row[token] + code @ selector.successor_codebook[token]) for token in best})
        tokens.append(max(scores[-1], key=scores[-1].__getitem__))
    return tokens[1:], scores


@torch.inference_mode()
def test_the_drafter_walks_as_a_plain_loop_does():
    pair, changed = random_pair(block_size=6), 0
    draft, drafter = pair.draft, WatchedDrafter(DFlashDrafter(pair.target, pair.draft))
    _, features = pair.target.session(draft.config.target_layer_ids).prefill(torch.tensor([PROMPT]))
    drafter.commit(features)
    draft.extend(cache := draft.new_cache(), features)
    for anchor, k in itertools.product((0, 1, 50, 77), (1, 3, 5)):
        ids = torch.tensor([[anchor] + [draft.config.mask_token_id] * k])
        hidden = draft.fill(cache, pair.target.embed(ids))[0, 1:]
        logits = pair.target.head(hidden)
        expected, scores = plain_walk(draft.candidate_selector, hidden, logits, anchor)
        tokens, chosen_from = drafter.propose(anchor, k).walk(lambda row: row.argmax(-1))
        assert tokens.tolist() == expected and chosen_from.shape == (k, VOCAB_SIZE)
        for row, by_candidate in zip(chosen_from, scores, strict=True):
            assert row.isfinite().nonzero()[:, 0].tolist() == sorted(by_candidate)
            assert row[list(by_candidate)].tolist() == pytest.approx(list(by_candidate.values()), abs=1e-4)
        assert torch.equal(drafter.take(), chosen_from)  # what a step's callback sees
        known = torch.tensor([anchor, *expected[:-1]])
        assert draft.candidate_selector.follow(hidden, logits, known).tolist() == expected
        changed += expected != logits.argmax(-1).tolist()
    assert changed > 3  # the selector had something to say


def test_fresh_parts_change_nothing():
    model = two_words(tiny_llama())
    new = grown(plain := strong(tiny_draft(model.config)), PARTS)
    assert new.config.is_dflash2 and all(parameter.requires_grad for parameter in new.parameters())
    assert torch.equal(forward(new), forward(plain))
    assert drafted_by(tiny_pair(model, new)) == drafted_by(tiny_pair(model, plain))
    assert (forward(random_pair().draft) - forward(plain)).abs().max() > 0.1


@pytest.mark.parametrize("block_size", [2, 3, 4])
def test_replies_are_the_targets_own(block_size):
    """Greedy from blocks accepted not at all, partly and wholly; sampled by the seed; rejection has its own luck."""
    accepted = {0.0: set(), 0.8: set(), "rejection": set()}
    for seed, temperature in itertools.product((1, 2, 3), (0.0, 0.8)):
        pair = random_pair(seed)
        params = SamplingParams(temperature, seed=seed, max_new_tokens=60, stop_token_ids=(), block_size=block_size)
        reply, events = run(pair, PROMPT, params)
        assert reply == run(pair, PROMPT, params, drafting=False)[0]
        _, others = run(pair, PROMPT, replace(params, temperature=0.8, acceptance="rejection"))
        accepted[temperature].update(step.accepted for step in events[1:-1])
        accepted["rejection"].update(step.accepted for step in others[1:-1])
    assert accepted.pop(0.0) == set(range(block_size)) and all(found >= {0, 1} for found in accepted.values())


@pytest.mark.parametrize("candidates, honest", [(3, True), (2, True), (3, False)])
def test_rejection_sampling_from_a_chain_follows_the_target_exactly(candidates, honest):
    """27 sequences, 8,000 draws: a right rule fails once in 3.5 million; claiming another row's odds is caught."""
    three, generator = ThreeTokens(1, k=2), torch.Generator().manual_seed(1)
    tokens = torch.stack([torch.randperm(3, generator=generator)[:candidates] for _ in range(2)])
    scores = 1.5 * torch.randn(2, candidates, candidates, generator=generator)
    params = SamplingParams(temperature=1.0, seed=1, acceptance="rejection")
    judging, drafting = Sampler(params, CPU), Sampler(replace(params, seed=2), CPU)

    def draft(logits):
        chain = Chain(tokens[-len(logits) :], scores[-len(logits) :], 3)
        drafted, probs, chosen_from = drafting.draft(chain)
        first_rows = torch.zeros_like(probs).scatter(1, chain.candidates, chain.scores[:, 0].softmax(-1))
        return drafted, probs if honest else first_rows, chosen_from

    judging.draft = draft
    counts, exact = Counter(three.sample(judging, 3 * draw) for draw in range(8_000)), three.exact()
    observed = torch.tensor([float(counts[sequence]) for sequence in exact])
    assert (chi_square(observed, torch.tensor(list(exact.values()))) < chi_square_limit(27)) == honest


# What a published config.json says besides the shape of a Qwen3; its block size stands in here alone.
PUBLISHED = {"architectures": ["DFlash2DraftModel"], "is_causal": False, "dflash_config": {
    "block_size": 4, "conv_group_size": 4, "conv_kernel_size": 2, "mask_token_id": 127, "selector_rank": 6,
    "selector_top_k": 5, "target_layer_ids": [1, 1],
}}  # fmt: skip
SELECTOR = {"hidden_projection.weight": [6, 32], "predecessor_codebook": [128, 6], "successor_codebook": [128, 6]}
CONV = {"base_kernel": [2, 2, 32], "kernel_projection.weight": [2 * 2 * 8, 32]}


@pytest.fixture
def published(tmp_path):
    """A folder with a target and a public DFlash 2 draft, and the same two in memory."""
    pair = random_pair(layer_types=SLIDING, sliding_window=7)
    write_target(tmp_path / "target", pair.target.model)
    write_draft(tmp_path / "draft", pair.draft, **PUBLISHED)
    edit_json(tmp_path / "draft" / "config.json", block_size=None)
    return tmp_path, pair


def test_a_public_checkpoint_drafts_as_the_draft_it_was_made_of(published):
    folder, pair = published
    loaded, plain = load(folder), tiny_draft(pair.target.config).state_dict()
    assert drafted_by(loaded) == drafted_by(pair) and len(set(drafted_by(pair))) > 3
    new = {name: list(value.shape) for name, value in loaded.draft.state_dict().items() if name not in plain}
    shapes = {f"layers.{layer}.{part}_conv": CONV for layer in range(2) for part in ("attention", "mlp")}
    shapes |= {"candidate_selector": SELECTOR}
    assert new == {f"{part}.{name}": shape for part, own in shapes.items() for name, shape in own.items()}
    config = loaded.draft.config
    assert config == pair.draft.config and DraftConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert config.to_dict() | PUBLISHED == config.to_dict()
    with pytest.raises(PromptError, match="knows no DFlash 2"):
        hf_draft(loaded.draft)


@pytest.mark.parametrize("change, expected", [
    (take("candidate_selector.hidden_projection.weight"), "1 tensors are missing and 0 unexpected"),
    (nested(selector_rank=None), "0 tensors are missing and 3 unexpected"),
    (nested(conv_group_size=5), "'conv_group_size' is 5 for hidden size 32"),
    (nested(selector_top_k=VOCAB_SIZE + 1), "'selector_top_k' is 129"),
])  # fmt: skip
def test_a_broken_checkpoint_is_refused(published, change, expected):
    change(published[0] / "draft")
    refused(expected, published[0])


@pytest.mark.parametrize("said", [None, False, True])
@pytest.mark.parametrize("kinds", [SLIDING, FULL, SLIDING[:1] + FULL[:1]], ids=["sliding", "full", "mixed"])
def test_slots_see_later_ones_unless_the_checkpoint_says_otherwise(tmp_path, kinds, said):
    """A missing entry speaks of sliding layers alone, so that a full one still lets a slot see what follows."""
    write_draft(tmp_path, tiny_draft(tiny_llama().config), layer_types=kinds, sliding_window=8)
    edit_json(tmp_path / "config.json", is_causal=said)
    config = DraftConfig.from_dict(json.loads((tmp_path / "config.json").read_text()))
    draft, changed = uneven(DFlashDraftModel(config)), BLOCK.index_fill(1, torch.tensor([2]), 1.0)
    moved = (forward(draft, changed) - forward(draft)).abs().amax(-1)[0]
    assert (moved[:2].max() < 1e-6) == (said or (said is None and kinds == SLIDING)) and moved[2:].min() > 1e-4


def test_growing_keeps_what_is_there_and_refuses_what_weights_cannot_follow():
    for layer in (old := random_pair().draft).layers:
        layer.mlp.down_proj.weight.data[:, ::2] = 0.0
    torch.testing.assert_close(forward(grown(old, {"intermediate_size": 32})), forward(old), atol=1e-4, rtol=1e-4)
    for name, size in (("intermediate_size", 65), ("conv_kernel_size", 3), ("selector_rank", 7)):
        with pytest.raises(TrainingError, match=f"Its {name} is .*, asked for is {size}"):
            grown(old, {name: size})


@pytest.mark.parametrize("block_size", [3, 4])
def test_teacher_forcing_counts_the_loops_own_passes(block_size):
    """Pass for pass, up to where the length limit shortens blocks; the selector matters."""
    pair, prompts, replies, expected = random_pair(2), [[5 + number, 9, 17, 33] for number in range(6)], [], []
    for ids in prompts:
        reply, events = run(pair, ids, SamplingParams(max_new_tokens=80, stop_token_ids=(), block_size=block_size))
        replies.append(Reply(reply[:-block_size]))
        expected.append(sum(step.position < len(replies[-1].ids) for step in events[1:-1]))
    for selector in (pair.draft.candidate_selector, None):
        pair.draft.candidate_selector = selector
        walked = teacher_forced(pair, prompts, replies, "abcdef", block_size)
        assert ([walked.categories[name].passes for name in "abcdef"] == expected) == (selector is not None)


@pytest.mark.parametrize("softmax, chunks", [("full", 1), ("full", 3), ("sampled", 1), ("sampled", 3)])
@torch.no_grad()
def test_the_loss_scores_every_second_block_after_the_true_tokens(softmax, chunks):
    """By hand. A sample that holds all the rare tokens is the whole softmax."""
    pair, (tokens, document, position, anchor) = random_pair(), rows("packed")
    target, draft, layout = pair.target, pair.draft, TrainingLayout(document, position, anchor, 4)
    reader = TargetReader(target, draft.config.target_layer_ids, use_flex=False, compile=False)
    features, _ = reader.read(tokens, document, position)
    reader.close()
    hidden = fill_blocks(draft, target, draft.project(features), tokens, layout, layer_masks(draft, layout, False))[0]
    selector, losses = draft.candidate_selector, []
    for block, start in enumerate(anchor[anchor >= 0].tolist()):
        for slot in range(1, 4):
            (before, label), state = tokens[0, start + slot - 1 : start + slot + 1], hidden[block, slot]
            codes = selector.predecessor_codebook[before] * (selector.hidden_projection.weight @ state)
            logits = target.head(state) + (selector.successor_codebook @ codes if block % 2 == 0 else 0.0)
            if document[0, start + slot] == document[0, start]:
                losses.append(-logits.log_softmax(-1)[label].item())
    settings = LossSettings(labels="data", gamma=1e9, chunks=chunks)  # all slots weigh the same
    frequent = torch.arange(VOCAB_SIZE) % 2 == 0
    sampled = loss.SampledSoftmax(target, frequent.nonzero()[:, 0], frequent)
    kind, others = (sampled, (~frequent).nonzero()[:, 0]) if softmax == "sampled" else (loss.FullSoftmax(target), None)
    objective = DraftObjective(draft, target, kind, settings, (1.0, 1.0), use_flex=False, compile=False)
    found, _ = objective(Inputs(features, tokens, layout, others=others))
    assert found.item() == pytest.approx(sum(losses) / len(losses), rel=1e-5)


@pytest.mark.usefixtures("fresh_process")
@pytest.mark.parametrize("start, steps", [("a plain draft", 20), ("the target", 40)])
def test_the_command_trains_it_and_goes_on(tmp_path, start, steps):
    parts = {"conv_kernel_size": 2, "conv_group_size": 8, "selector_rank": 4, "selector_top_k": 4}
    changes = {"softmax": "sampled", "frequent": 40, "others": 20, "loss_chunks": 3}
    if start == "a plain draft":
        changes = {"init_from": trained() / "last", "layers": None, "features": None}
    for limit in (steps, steps + 10):
        assert train.main(options(tmp_path, **parts, **changes, max_steps=limit, evaluate_every=10)) == 0
    record = [record for record in read_metrics(tmp_path / "metrics.jsonl") if record["kind"] == "evaluation"][-1]
    assert record["step"] == limit and record["tau"] > 2.2
    raw = json.loads((tmp_path / "best" / "config.json").read_text())
    assert raw["architectures"] == ["DFlash2DraftModel"] and raw["dflash_config"].items() >= parts.items()
    draft = load(world(), draft=tmp_path / "best", dtype="float32", device="cpu").draft
    assert draft.candidate_selector.successor_codebook.abs().max() > 0.001
    assert draft.layers[1].mlp_conv.base_kernel[:, 1].abs().max() > 0.001
