"""Training equals inference: N anchors in one masked forward are N separate drafts, on both attention back ends."""

import math
from collections.abc import Iterator
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from dflash_core.drafter import DFlashDrafter
from dflash_core.masks import TrainingLayout
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.training.features import TargetReader
from dflash_core.training.loss import FullSoftmax
from dflash_core.training.objective import DraftObjective, Inputs, LossSettings, fill_blocks, layer_masks
from tests.tiny import tiny_draft, tiny_llama, tiny_qwen3

BLOCK = 4
SLIDING = {"layer_types": ("sliding_attention", "full_attention", "sliding_attention"), "sliding_window": 7}
DRAFTS = {
    "full": {},
    "sliding": SLIDING,
    "causal where sliding": SLIDING | {"is_causal": None},
    "own embedding scale": {"input_embedding_scale": 3.0},
    "convolved": SLIDING | {"conv_kernel_size": 3, "conv_group_size": 8},
}


def documents() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(4, 120, (length,), generator=generator) for length in (37, 21, 5)]


def rows(kind: str) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Tokens, document, position and anchors of the same documents, packed into one row or padded to one row each."""
    parts = documents()
    width = 80 if kind == "packed" else 40
    groups = [parts] if kind == "packed" else [[part] for part in parts]
    tokens, document = torch.full((len(groups), width), 77), torch.full((len(groups), width), -1)
    position, anchors = torch.arange(width).repeat(len(groups), 1), []
    for row, group in enumerate(groups):
        at, own = 0, []
        for number, part in enumerate(group):
            place = slice(at, at + len(part))
            tokens[row, place], document[row, place] = part, number
            position[row, place] = torch.arange(len(part))
            own += [at + start for start in (1, 2, 4, 11, 12, 20, 35) if start < len(part)]
            at += len(part)
        position[row, at:] = torch.arange(width - at)
        anchors.append(own)
    most = max(map(len, anchors)) + 1
    return tokens, document, position, torch.tensor([own + [-1] * (most - len(own)) for own in anchors])


def separate(target: Target, draft: DFlashDraftModel) -> Iterator[torch.Tensor]:
    """Logits [k, V] of every anchor of every document, as decoding gets them: own session, own cache, one block."""
    for part in documents():
        for start in (1, 2, 4, 11, 12, 20, 35):
            if start < len(part):
                session = target.session(draft.config.target_layer_ids)
                _, features = session.prefill(part[None, :start])
                drafter = DFlashDrafter(target, draft)
                # In two portions, as prompt and steps arrive.
                drafter.commit(features[:, : start // 2]) if start > 1 else None
                drafter.commit(features[:, start // 2 :])
                yield drafter.propose(int(part[start]), BLOCK - 1)


@pytest.fixture(scope="module", params=["llama", "qwen3"])
def target(request):
    return Target({"llama": tiny_llama, "qwen3": tiny_qwen3}[request.param]())


def make_draft(target: Target, kind: str) -> DFlashDraftModel:
    draft = tiny_draft(target.config, block_size=BLOCK, layers=3, seed=3, **DRAFTS[kind])
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(4)
        for name, weight in draft.named_parameters():
            weight.normal_(1.0, 0.3) if "norm" in name else weight.normal_(0.0, 1.5 * weight.shape[-1] ** -0.5)
    return draft


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("backend", ["sdpa", "flex"])
@pytest.mark.parametrize("kind", ["packed", "padded"])
@pytest.mark.parametrize("draft_kind", list(DRAFTS))
@torch.no_grad()
def test_one_masked_forward_is_as_many_separate_drafts(target, draft_kind, kind, backend):
    draft, use_flex = make_draft(target, draft_kind), backend == "flex"
    tokens, document, position, anchor = rows(kind)
    reader = TargetReader(target, draft.config.target_layer_ids, use_flex=False, compile=False)
    features, _ = reader.read(tokens, document, position)
    reader.close()
    layout = TrainingLayout(document, position, anchor, BLOCK)
    masks = layer_masks(draft, layout, use_flex)
    hidden = fill_blocks(draft, target, draft.project(features), tokens, layout, masks)
    found = target.head(hidden[:, :, 1:])[anchor >= 0]
    expected = torch.stack(list(separate(target, draft)))
    assert found.shape == expected.shape == (16, BLOCK - 1, 128)
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
    assert found.isfinite().all() and hidden.isfinite().all()
    # The comparison can fail: another anchor's logits are far away.
    assert (found.roll(1, 0) - expected).abs().max() > 0.1 * expected.abs().max()


@torch.no_grad()
def test_what_padding_and_other_documents_hold_changes_nothing(target):
    draft = make_draft(target, "sliding")
    tokens, document, position, anchor = rows("packed")
    reader = TargetReader(target, draft.config.target_layer_ids, use_flex=False, compile=False)
    layout = TrainingLayout(document, position, anchor, BLOCK)

    def filled(tokens: torch.Tensor) -> torch.Tensor:
        features, _ = reader.read(tokens, document, position)
        masks = layer_masks(draft, layout, use_flex=False)
        return fill_blocks(draft, target, draft.project(features), tokens, layout, masks)

    plain, other = filled(tokens), tokens.clone()
    own = layout.slot_document.unflatten(1, (-1, BLOCK))[..., 0] == 1
    other[document != 1] = 5
    changed = filled(other)
    reader.close()
    assert torch.equal(plain[own], changed[own]) and not torch.equal(plain, changed)


@torch.no_grad()
def test_the_packed_target_says_what_each_document_alone_makes_it_say(target):
    tokens, document, position, _ = rows("packed")
    reader = TargetReader(target, (1, 2), use_flex=False, compile=False)
    features, hidden = reader.read(tokens, document, position)
    choices, (values, ids) = reader.choices(hidden[0]), reader.top(hidden[0], 3)
    reader.close()
    for number, part in enumerate(documents()):
        own = document[0] == number
        output = target.model(part[None], output_hidden_states=True)
        alone = torch.cat([output.hidden_states[tap + 1] for tap in (1, 2)], -1)[0]
        assert (features[0, own] - alone).abs().max() < 1e-5 * alone.abs().max()
        assert torch.equal(choices[own], output.logits[0].argmax(-1))
        top = output.logits[0].topk(3)
        assert torch.equal(ids[own], top.indices) and torch.allclose(values[own], top.values, atol=1e-3)


@pytest.mark.parametrize("chunks", [1, 3])
def test_the_loss_is_equation_4_over_separate_drafts(target, chunks):
    """Cross-entropy of what decoding would draft, weighted by hand; tap scales folded into the public weights."""
    draft, gamma = make_draft(target, "full"), 2.0
    tokens, document, position, anchor = rows("packed")
    reader = TargetReader(target, draft.config.target_layer_ids, use_flex=False, compile=False)
    features, _ = reader.read(tokens, document, position)
    reader.close()
    settings = LossSettings(labels="data", gamma=gamma, chunks=chunks)
    objective = DraftObjective(draft, target, FullSoftmax(target), settings, (0.25, 4.0), use_flex=False, compile=False)
    loss, counts = objective(Inputs(features, tokens, TrainingLayout(document, position, anchor, BLOCK)))

    public = DFlashDraftModel(draft.config)
    public.load_state_dict(objective.export({name: p.detach() for name, p in draft.named_parameters()}))
    total = weight = 0.0
    right, live = np.zeros(BLOCK - 1, int), np.zeros(BLOCK - 1, int)
    with torch.no_grad():
        for start, logits in zip(anchor[anchor >= 0].tolist(), separate(target, public), strict=True):
            for slot in range(1, BLOCK):
                if document[0, start + slot] == document[0, start]:
                    label = int(tokens[0, start + slot])
                    own = math.exp(-(slot - 1) / gamma)
                    total, weight = total - own * logits[slot - 1].log_softmax(-1)[label].item(), weight + own
                    right[slot - 1] += int(logits[slot - 1].argmax()) == label
                    live[slot - 1] += 1
    assert loss.item() == pytest.approx(total / weight, rel=1e-5)
    assert counts.tolist() == [right.tolist(), live.tolist()] and live.tolist() == [14, 13, 12]
    loss.backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in draft.parameters())
    assert all(p.grad is None for p in target.model.parameters())


@torch.no_grad()
def test_slots_that_draft_the_label_are_counted_as_right(target):
    draft = make_draft(target, "full")
    tokens, document, position, anchor = rows("packed")
    reader = TargetReader(target, draft.config.target_layer_ids, use_flex=False, compile=False)
    features, hidden = reader.read(tokens, document, position)
    reader.close()
    starts, argmax = anchor[anchor >= 0], torch.zeros_like(tokens)
    argmax[0, starts] = torch.stack([logits[0].argmax() for logits in separate(target, draft)])
    softmax, settings = FullSoftmax(target), LossSettings()
    objective = DraftObjective(draft, target, softmax, settings, (1.0, 1.0), use_flex=False, compile=False)
    _, counts = objective(Inputs(features, tokens, TrainingLayout(document, position, anchor, BLOCK), argmax))
    assert counts[:, 0].tolist() == [14, 14] and counts[1, 1:].tolist() == [0, 0]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_refuses_nothing_that_sdpa_takes():
    """A row that is no multiple of a tile, with blocks that cross tiles."""
    layout = TrainingLayout(
        torch.zeros(1, 150, dtype=torch.long), torch.arange(150)[None], torch.arange(3, 150, 7)[None], BLOCK
    )
    shape = {"hidden_size": 32, "vocab_size": 128, "num_hidden_layers": 4, "max_position_embeddings": 512}
    draft = tiny_draft(SimpleNamespace(**shape))
    block, context = torch.randn(1, layout.slots, 32), torch.randn(1, 150, 32)
    with torch.no_grad():
        dense, flexed = (
            draft(block, context, layout.slot_position, layout.position, layer_masks(draft, layout, use_flex))
            for use_flex in (False, True)
        )
    assert (dense - flexed).abs().max() < 1e-5
