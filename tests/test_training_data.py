"""Anchors and packed rows: where blocks start, which tokens stand where, the same order after a restart."""

import itertools
import math
from collections import Counter

import numpy as np
import pytest
import torch

from dflash_core.training.anchors import draw_anchors
from dflash_core.training.data import BatchStream, DrawSettings, PackedData, fill_rows
from dflash_core.training.shards import TokenShards
from tests.progressions import write_data

# Anchors.


def runs(*lengths: int) -> tuple[np.ndarray, np.ndarray]:
    """Eligible indices and their documents: documents of these many eligible tokens after prompts of three."""
    eligible, document, at = [], [], 0
    for number, length in enumerate(lengths):
        eligible += range(at + 3, at + 3 + length)
        document += [number] * length
        at += 3 + length + 1
    return np.array(eligible), np.array(document)


def test_independent_anchors_are_distinct_and_fall_everywhere_alike():
    eligible, document = runs(7, 13, 20)
    rng, hits = np.random.default_rng(0), Counter()
    for _ in range(2000):
        anchors = draw_anchors(eligible, document, 12, 5, rng)
        assert len(anchors) == len(set(anchors.tolist())) == 12 and (np.diff(anchors) > 0).all()
        hits.update(anchors.tolist())
    assert set(hits) == set(eligible.tolist())
    expected, spread = 2000 * 12 / 40, math.sqrt(2000 * 0.3 * 0.7)
    assert all(abs(count - expected) < 5 * spread for count in hits.values())


@pytest.mark.parametrize("per_sequence", [None, 2])
def test_anchors_that_must_not_overlap_keep_a_block_apart(per_sequence):
    eligible, document = runs(3, 14, 40)
    owner, rng = dict(zip(eligible.tolist(), document.tolist(), strict=True)), np.random.default_rng(0)
    for count in (1, 4, 9, 50):
        for _ in range(50):
            anchors = draw_anchors(eligible, document, count, 5, rng, overlap=False, per_sequence=per_sequence)
            assert len(anchors) == count
            anchors = anchors[anchors >= 0].tolist()
            for one, other in itertools.pairwise(anchors):
                assert owner[one] != owner[other] or other - one >= 5
            room = sum(min(math.ceil(n / 5), per_sequence or n) for n in (3, 14, 40))
            assert len(anchors) == min(count, room)
            assert not per_sequence or max(Counter(owner[a] for a in anchors).values()) <= per_sequence


def test_every_arrangement_without_overlap_is_equally_likely():
    eligible, document = runs(7)
    rng = np.random.default_rng(0)
    found = Counter(tuple(draw_anchors(eligible, document, 2, 3, rng, overlap=False).tolist()) for _ in range(6000))
    legal = [pair for pair in itertools.combinations(eligible.tolist(), 2) if pair[1] - pair[0] >= 3]
    assert set(found) == set(legal) and len(legal) == 10
    assert all(abs(count - 600) < 5 * math.sqrt(600 * 0.9) for count in found.values())


def test_anchors_of_a_sequence_can_be_limited_and_are_padded():
    eligible, document = runs(2, 30)
    anchors = draw_anchors(eligible, document, 16, 4, np.random.default_rng(0), per_sequence=5)
    # Both tokens of the short one, five of the long one, padding.
    assert anchors[:2].tolist() == eligible[:2].tolist() and set(anchors[2:7]) <= set(eligible[2:])
    assert (anchors[7:] == -1).all()
    assert (draw_anchors(eligible[:0], document[:0], 3, 4, np.random.default_rng(0)) == -1).all()
    assert (draw_anchors(eligible[:0], document[:0], 3, 4, np.random.default_rng(0), overlap=False) == -1).all()


# Rows.


@pytest.fixture
def data(tmp_path):
    rng = np.random.default_rng(3)
    sequences = [
        (rng.integers(4, 100, rng.integers(1, 6)).tolist(), rng.integers(4, 100, rng.integers(1, 20)).tolist())
        for _ in range(60)
    ]
    write_data(tmp_path / "data.npz", sequences)
    return PackedData(TokenShards.open(tmp_path / "data.npz"), 64, held_out=[7])


def test_rows_hold_every_usable_sequence_once_and_never_overflow(data):
    order = data.order(seed=1, epoch=0)
    usable = [i for i, n in enumerate(data.shards.lengths - data.shards.prompt_lengths) if n >= 2 and i != 7]
    assert sorted(itertools.chain(*order)) == usable
    assert all(data.shards.lengths[row].sum() <= 64 for row in order)
    # First fit into a few open rows wastes little.
    assert len(order) <= 1.15 * data.shards.lengths[usable].sum() / 64 + 1
    assert data.order(1, 0) == order and data.order(1, 1) != order and data.order(2, 0) != order
    assert fill_rows(np.array([0]), np.array([64], np.int32), 64) == [[0]]


def test_a_row_says_of_each_token_whose_it_is(data):
    ids = data.order(0, 0)[0]
    pack = data.pack(ids)
    for local, index in enumerate(ids):
        tokens, prompt = data.shards[index]
        own = np.flatnonzero(pack.document == local)
        assert pack.tokens[own].tolist() == tokens.tolist() and pack.position[own].tolist() == list(range(len(tokens)))
        assert pack.offset[own].tolist() == list(range(data.starts[index], data.starts[index + 1]))
        # The reply's last token opens no block: nothing comes after it.
        anchors = pack.eligible[pack.document[pack.eligible] == local]
        assert anchors.tolist() == own[prompt:-1].tolist()
    padding = pack.document < 0
    assert (pack.offset[padding] == data.starts[-1]).all() and not padding[pack.eligible].any()


def stream(data, epoch=0, number=0, rank=0, world=1, count=40):
    rare = np.arange(50, 120)
    draw = DrawSettings(5, anchors=12, block_size=4, overlap=True, per_sequence=None, rare=rare, others=6)
    batches = BatchStream(data, draw, torch.device("cpu"), epoch, number, rank, world)
    found = list(itertools.islice(batches, count))
    batches.close()
    return found


def seen(batch) -> tuple:
    pack = batch.pack
    return pack.epoch, pack.number, pack.documents, batch.layout.anchor.tolist(), batch.others.tolist()


def test_a_stream_started_in_the_middle_shows_what_the_whole_one_shows(data):
    whole = stream(data)
    assert {batch.pack.epoch for batch in whole} >= {0, 1}
    for at in (1, 9, len(data.order(5, 0)), 30):
        last = whole[at - 1].pack
        for expected, batch in zip(whole[at:], stream(data, last.epoch, last.number + 1), strict=False):
            assert seen(batch) == seen(expected)
    # Anchors and random tokens are drawn anew in each epoch.
    assert len({str(seen(batch)[3:]) for batch in whole}) == len(whole)


def test_processes_share_the_rows_of_an_epoch(data):
    rows = [tuple(row) for row in data.order(5, 0)]
    each = len(rows) // 2
    one, two = (stream(data, rank=rank, world=2, count=each + 1) for rank in (0, 1))
    both = [batch.pack.documents for batch in one[:each] + two[:each]]
    assert len(set(both)) == 2 * each and set(both) <= set(rows)
    assert one[each].pack.epoch == two[each].pack.epoch == 1
