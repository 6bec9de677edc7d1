"""Masks against a plain-loop oracle; knows no weights."""

import pytest
import torch

from dflash_core.masks import TrainingLayout, packed_causal


def layouts() -> dict[str, TrainingLayout]:
    """Packed: three documents and padding in one row. Padded: one document a row."""
    document = torch.tensor([[0] * 70 + [1] * 50 + [2] * 25 + [-1] * 11])
    position = torch.cat([torch.arange(n) for n in (70, 50, 25, 11)])[None]
    anchor = torch.tensor([[1, 5, 6, 40, 69, 70, 90, 119, 120, 144, -1, -1] + [-1] * 25])
    packed = TrainingLayout(document, position, anchor, 5)
    document = torch.tensor([[0] * 20, [0] * 9 + [-1] * 11])
    position = torch.arange(20).expand(2, 20)
    anchor = torch.tensor([[0, 3, 4, 19], [2, 8, -1, -1]])
    return {"packed": packed, "padded": TrainingLayout(document, position, anchor, 3)}


def oracle(layout: TrainingLayout, row: int, window: int | None) -> torch.Tensor:
    document, position = layout.document[row].tolist(), layout.position[row].tolist()
    blocks, size, context = layout.anchor[row].tolist(), layout.block_size, len(document)
    allowed = torch.zeros(len(blocks) * size, context + len(blocks) * size, dtype=torch.bool)
    for number, anchor in enumerate(blocks):
        for slot in range(size):
            query, at = number * size + slot, position[anchor] + slot
            for key in range(anchor):
                if document[key] == document[anchor] and (window is None or at - position[key] < window):
                    allowed[query, key] = True
            for other in range(size):
                if window is None or abs(slot - other) < window:
                    allowed[query, context + number * size + other] = True
    return allowed


def evaluate(mask, rows: int, queries: int, keys: int) -> torch.Tensor:
    """A BlockMask as it acts: its predicate inside the tiles that it lists, nothing elsewhere."""
    b, q, k = torch.meshgrid(torch.arange(rows), torch.arange(queries), torch.arange(keys), indexing="ij")
    inside = mask.to_dense()[:, 0].bool()[b, q // 128, k // 128]
    return inside & mask.mask_mod(b, torch.zeros_like(b), q, k)


@pytest.mark.parametrize("window", [None, 1, 2, 4, 30])
@pytest.mark.parametrize("kind", ["packed", "padded"])
def test_training_masks_equal_the_plain_loop(kind, window):
    layout = layouts()[kind]
    dense, flexed = layout.dense(window), layout.flex(window)
    rows, keys = layout.document.shape[0], layout.document.shape[1] + layout.slots
    acting = evaluate(flexed, rows, layout.slots, keys)
    for row in range(rows):
        expected = oracle(layout, row, window)
        assert torch.equal(dense[row, 0], expected)
        assert torch.equal(acting[row], expected)


def test_flex_lists_few_tiles():
    """Sixteen documents of 256 tokens: a tile of queries meets its own document and itself, not the whole row."""
    document = torch.arange(16).repeat_interleave(256)[None]
    position = torch.arange(256).repeat(16)[None]
    layout = TrainingLayout(document, position, torch.arange(0, 4096, 2)[None], 8)
    assert layout.flex().kv_num_blocks.max() <= 3


def test_slot_positions_continue_their_document():
    layout = layouts()["packed"]
    assert layout.slot_position[0, 25:30].tolist() == [0, 1, 2, 3, 4]
    assert layout.slot_position[0, 30:35].tolist() == [20, 21, 22, 23, 24]


def test_packed_documents_of_the_target_never_meet():
    layout = layouts()["packed"]
    document, position = layout.document, layout.position
    dense = packed_causal(document, position, use_flex=False)
    length = document.shape[1]
    expected = torch.zeros(length, length, dtype=torch.bool)
    for q in range(length):
        for k in range(q + 1):
            expected[q, k] = document[0, q] == document[0, k]
    assert torch.equal(dense[0, 0], expected)
    acting = evaluate(packed_causal(document, position, use_flex=True), 1, length, length)
    assert torch.equal(acting[0], expected)
