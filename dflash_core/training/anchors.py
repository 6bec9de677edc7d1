"""Where blocks start: random anchors in the replies of a packed row; knows no tokens and no model.

A run of L eligible tokens holds any anchors that fit. Independent anchors are a plain draw without replacement and
their blocks may overlap. Non-overlapping anchors are at least one block apart: draw n of L - (n-1)(B-1) places, then
put B-1 tokens back after each (stars and bars), which makes every such arrangement equally likely.
"""

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]


def draw_anchors(
    eligible: Ints, document: Ints, count: int, block_size: int, rng: np.random.Generator,
    overlap: bool = True, per_sequence: int | None = None,
) -> Ints:  # fmt: skip
    """At most `count` anchors in ascending order, padded with -1 to `count`.

    eligible      indices into the row that may be anchors, ascending
    document      the document of each of them
    per_sequence  at most so many in each document; None draws evenly over all eligible tokens
    """
    if overlap and per_sequence is None:
        chosen = rng.choice(eligible, min(count, len(eligible)), replace=False)
    else:
        runs = np.split(eligible, np.flatnonzero(np.diff(document)) + 1) if len(eligible) else []
        quotas = _quotas(np.array([len(run) for run in runs]), count, 1 if overlap else block_size, rng, per_sequence)
        drawn = [_draw_run(run, n, 1 if overlap else block_size, rng) for run, n in zip(runs, quotas, strict=True)]
        chosen = np.concatenate(drawn) if drawn else eligible[:0]
    anchors = np.full(count, -1, np.int64)
    anchors[: len(chosen)] = np.sort(chosen)
    return anchors


def _quotas(lengths: Ints, count: int, spacing: int, rng: np.random.Generator, per_sequence: int | None) -> Ints:
    """How many anchors each run gets: its room, its share of `count` and `per_sequence` all respected."""
    if not len(lengths):
        return lengths
    room = (lengths - 1) // spacing + 1
    if per_sequence is not None:
        room = np.minimum(room, per_sequence)
    if room.sum() <= count:
        return room
    share = np.minimum(room, lengths * count // lengths.sum()) if per_sequence is None else room * count // room.sum()
    spare = np.repeat(np.arange(len(room)), room - share)
    return share + np.bincount(rng.choice(spare, count - share.sum(), replace=False), minlength=len(room))


def _draw_run(run: Ints, count: int, spacing: int, rng: np.random.Generator) -> Ints:
    places = len(run) - (count - 1) * (spacing - 1)
    chosen = np.sort(rng.choice(places, min(count, places), replace=False)) if count else np.empty(0, np.int64)
    return run[chosen + np.arange(len(chosen)) * (spacing - 1)]
