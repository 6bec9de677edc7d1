"""Acceptance length by teacher forcing: the draft guesses after every reply token at once, then the blocks are walked.

With the target's greedy reply known, block after block is anchor -> anchor + accepted + 1, which is what decoding does
(there the last block before the length limit is shorter). It knows no sampling and writes no files.
"""

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_core.masks import TrainingLayout
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.training.data import Pack, PackedData
from dflash_core.training.features import HEAD_CHUNK, TargetReader
from dflash_core.training.loss import predecessors, slot_labels
from dflash_core.training.objective import fill_blocks, layer_masks

OPENING = 64


@dataclass(frozen=True)
class Replies:
    """Greedy replies of the target: whole sequences, where the reply starts, and the prompt's category."""

    sequences: Sequence[NDArray[np.int64]]
    prompt_lengths: NDArray[np.int32]
    categories: Sequence[str]

    @property
    def lengths(self) -> NDArray[np.int32]:
        return np.array([len(sequence) for sequence in self.sequences], np.int32)

    def __len__(self) -> int:
        return len(self.sequences)

    def __getitem__(self, index: int) -> tuple[NDArray[np.int64], int]:
        return self.sequences[index], int(self.prompt_lengths[index])


@dataclass(frozen=True)
class Tally:
    """Verify passes and the tokens they committed."""

    tokens: int = 0
    passes: int = 0

    @property
    def tau(self) -> float | None:
        """Committed tokens per verify pass, None without a pass."""
        return self.tokens / self.passes if self.passes else None

    def __add__(self, other: "Tally") -> "Tally":
        return Tally(self.tokens + other.tokens, self.passes + other.passes)


@dataclass(frozen=True)
class Score:
    """How well a draft does on a set of replies.

    categories  tally by category; `opening` and `later` split by whether a pass starts in the first 64 reply tokens
    match       by drafted slot: how often it is right
    accepted    by drafted slot: how often it is right when all before it in its block are
    """

    categories: dict[str, Tally]
    opening: Tally
    later: Tally
    match: tuple[float, ...]
    accepted: tuple[float, ...]

    @property
    def overall(self) -> Tally:
        return sum(self.categories.values(), Tally())

    def record(self) -> dict[str, object]:
        """Plain numbers for a metrics file."""
        return {
            "tau": self.overall.tau,
            "tau_by_category": {name: tally.tau for name, tally in sorted(self.categories.items())},
            "tau_opening": self.opening.tau,
            "tau_later": self.later.tau,
            "match_by_slot": list(self.match),
            "accepted_by_slot": list(self.accepted),
        }


@torch.no_grad()
def right_slots(
    draft: DFlashDraftModel, reader: TargetReader, pack: Pack, anchors: int, block_size: int, use_flex: bool
) -> tuple[Tensor, Tensor]:
    """Which slots match the reply [N, k] and which lie inside it [N, k], for an anchor on every eligible token.

    A selector is shown the reply's own token before each slot: where a block is still right, that is what it chose.
    """
    device = draft.fc.weight.device
    tokens, document, position = (
        torch.from_numpy(a).to(device)[None] for a in (pack.tokens, pack.document, pack.position)
    )
    features, _ = reader.read(tokens, document, position)
    anchor = torch.full((1, anchors), -1, device=device)
    anchor[0, : len(pack.eligible)] = torch.from_numpy(pack.eligible).to(device)
    layout = TrainingLayout(document, position, anchor, block_size)
    context = draft.project(features.to(draft.fc.weight.dtype))
    masks = layer_masks(draft, layout, use_flex)
    hidden = fill_blocks(draft, reader.target, context, tokens, layout, masks)[0, :, 1:]
    labels, live = slot_labels(tokens[0], None, document[0], anchor[0], block_size)
    flat = hidden.flatten(0, 1).to(reader.target.dtype)
    before = predecessors(tokens[0], anchor[0], labels).flatten()
    parts = zip(flat.split(HEAD_CHUNK), before.split(HEAD_CHUNK), strict=True)
    guesses = torch.cat([_guess(draft, reader.target, *part) for part in parts])
    count = len(pack.eligible)
    return (guesses.view_as(labels) == labels)[:count] & live[:count], live[:count]


def _guess(draft: DFlashDraftModel, target: Target, hidden: Tensor, before: Tensor) -> Tensor:
    logits, selector = target.head(hidden), draft.candidate_selector
    return logits.argmax(-1) if selector is None else selector.follow(hidden, logits, before)


def walk(accepted: Sequence[int]) -> Iterator[tuple[int, int]]:
    """(reply position of the anchor, tokens committed) of each pass; `accepted` [n - 1] after each reply token."""
    anchor, last = 0, len(accepted)
    while anchor < last:
        yield anchor, min(accepted[anchor] + 1, last - anchor)
        anchor += accepted[anchor] + 1


def score(
    draft: DFlashDraftModel, reader: TargetReader, replies: Replies, context_tokens: int, anchors: int,
    use_flex: bool, block_size: int | None = None,
) -> Score:  # fmt: skip
    """Walk every reply. `block_size` at most the draft's; rows are shaped like the training's so nothing recompiles."""
    size = block_size or draft.config.block_size
    data = PackedData(replies, context_tokens)
    categories: dict[str, Tally] = defaultdict(Tally)
    opening = later = Tally()
    right_sum = live_sum = kept_sum = reached_sum = np.zeros(size - 1)
    for ids in _rows(data, context_tokens, anchors):
        pack = data.pack(ids)
        right, live = (t.cpu().numpy() for t in right_slots(draft, reader, pack, anchors, size, use_flex))
        kept = np.cumprod(right, axis=1)
        reached = np.concatenate((np.ones_like(kept[:, :1]), kept[:, :-1]), axis=1) * live
        right_sum, live_sum = right_sum + right.sum(0), live_sum + live.sum(0)
        kept_sum, reached_sum = kept_sum + kept.sum(0), reached_sum + reached.sum(0)
        owner = pack.document[pack.eligible]
        for local, index in enumerate(ids):
            for position, committed in walk(kept.sum(1)[owner == local].tolist()):
                categories[replies.categories[index]] += Tally(committed, 1)
                opening, later = (
                    (opening + Tally(committed, 1), later)
                    if position < OPENING
                    else (opening, later + Tally(committed, 1))
                )
    return Score(dict(categories), opening, later, _rates(right_sum, live_sum), _rates(kept_sum, reached_sum))


def _rates(part: NDArray[np.float64], whole: NDArray[np.float64]) -> tuple[float, ...]:
    return tuple((part / np.maximum(whole, 1)).tolist())


def _rows(data: PackedData, context_tokens: int, anchors: int) -> Iterator[list[int]]:
    """Sequences in order, as many to a row as both its tokens and its anchors hold."""
    row: list[int] = []
    tokens = blocks = 0
    for index in data.ids.tolist():
        length = int(data.shards.lengths[index])
        eligible = length - 1 - int(data.shards.prompt_lengths[index])
        assert length <= context_tokens and eligible <= anchors
        if row and (tokens + length > context_tokens or blocks + eligible > anchors):
            yield row
            row, tokens, blocks = [], 0, 0
        row.append(index)
        tokens, blocks = tokens + length, blocks + eligible
    if row:
        yield row
