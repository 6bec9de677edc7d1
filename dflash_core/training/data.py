"""From token shards to packed rows in a reproducible order; knows no model and no loss.

Everything random comes from (seed, epoch, number of the pack): a resumed run sees what the killed one would have seen.
"""

import queue
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_core.errors import TrainingError
from dflash_core.masks import TrainingLayout
from dflash_core.training.anchors import draw_anchors
from dflash_core.training.shards import TokenShards

OPEN_ROWS = 16
CHUNK = 4096


@dataclass(frozen=True)
class Pack:
    """One row of whole documents, padded at its end; arrays of S.

    epoch, number  its place in the run
    documents      ids of its sequences in the data
    document       number of each token's document within the row, -1 for padding
    offset         each token's place in all the data's tokens, one past the last for padding
    eligible       indices that may be anchors: reply tokens with at least one token after them
    """

    epoch: int
    number: int
    documents: tuple[int, ...]
    tokens: NDArray[np.int64]
    document: NDArray[np.int64]
    position: NDArray[np.int64]
    offset: NDArray[np.int64]
    eligible: NDArray[np.int64]


@dataclass(frozen=True)
class Batch:
    """A pack on the device: tensors [1, S], anchors [1, N], and the sampled softmax's random tokens [C] or None."""

    pack: Pack
    tokens: Tensor
    offset: Tensor
    layout: TrainingLayout
    others: Tensor | None


class PackedData:
    """Sequences of a token data set as rows of `context_tokens`."""

    def __init__(self, shards: TokenShards, context_tokens: int, held_out: Sequence[int] = ()) -> None:
        self.shards, self.context_tokens = shards, context_tokens
        self.starts = np.concatenate(([0], np.cumsum(shards.lengths, dtype=np.int64)))
        usable = shards.lengths - shards.prompt_lengths >= 2
        usable[np.asarray(held_out, np.int64)] = False
        self.ids = np.flatnonzero(usable)
        _check_lengths(shards, self.ids, context_tokens)

    def order(self, seed: int, epoch: int) -> list[list[int]]:
        """The sequences of each pack of one epoch."""
        shuffled = np.random.default_rng((seed, epoch)).permutation(self.ids)
        return fill_rows(shuffled, self.shards.lengths, self.context_tokens)

    def pack(self, ids: Sequence[int], epoch: int = 0, number: int = 0) -> Pack:
        tokens, document, position, offset = (np.zeros(self.context_tokens, np.int64) for _ in range(4))
        document[:], offset[:] = -1, self.starts[-1]
        eligible, at = [], 0
        for local, index in enumerate(ids):
            sequence, prompt = self.shards[int(index)]
            end = at + len(sequence)
            tokens[at:end], document[at:end] = sequence, local
            position[at:end] = np.arange(len(sequence))
            offset[at:end] = np.arange(self.starts[index], self.starts[index + 1])
            eligible.append(np.arange(at + prompt, end - 1))
            at = end
        # Padding counts on as a document of its own: positions must have no gaps.
        position[at:] = np.arange(self.context_tokens - at)
        return Pack(epoch, number, tuple(map(int, ids)), tokens, document, position, offset, np.concatenate(eligible))

    def frequencies(self, vocab_size: int) -> NDArray[np.int64]:
        """How often each token occurs in all the data. Raises `TrainingError` for ids beyond the vocabulary."""
        counts = np.zeros(vocab_size, np.int64)
        for first in range(0, len(self.shards), CHUNK):
            chunk = range(first, min(first + CHUNK, len(self.shards)))
            tokens = np.concatenate([self.shards[index][0] for index in chunk])
            if int(tokens.max()) >= vocab_size:
                raise TrainingError(
                    "The data does not fit the target.",
                    f"It holds token {int(tokens.max())}, the target's vocabulary has {vocab_size}.",
                    "Generate the data with this target.",
                )
            counts += np.bincount(tokens, minlength=vocab_size)
        return counts


def fill_rows(ids: NDArray[np.int64], lengths: NDArray[np.int32], capacity: int) -> list[list[int]]:
    """Put each sequence into the fullest of a few open rows that still has room; close the fullest when none has."""
    rows: list[list[int]] = []
    free: list[int] = []
    done: list[list[int]] = []
    for index, length in zip(ids.tolist(), lengths[ids].tolist(), strict=True):
        fitting = [i for i, room in enumerate(free) if room >= length]
        if fitting:
            best = min(fitting, key=free.__getitem__)
        else:
            if len(rows) == OPEN_ROWS:
                fullest = min(range(len(free)), key=free.__getitem__)
                done.append(rows.pop(fullest))
                free.pop(fullest)
            rows.append([])
            free.append(capacity)
            best = len(rows) - 1
        rows[best].append(index)
        free[best] -= length
    return done + rows


def _check_lengths(shards: TokenShards, ids: NDArray[np.int64], context_tokens: int) -> None:
    if not len(ids):
        raise TrainingError(
            "There is nothing to train on.", "No sequence of the data has a reply of two tokens.", "Generate more data."
        )
    longest = int(shards.lengths[ids].max())
    if longest > context_tokens:
        raise TrainingError(
            "A sequence does not fit into a packed row.",
            f"The longest has {longest} tokens, --context-tokens is {context_tokens}.",
            f"Use --context-tokens {-(-longest // 128) * 128} or more.",
        )


@dataclass(frozen=True)
class DrawSettings:
    """What is drawn anew for every pack."""

    seed: int
    anchors: int
    block_size: int
    overlap: bool
    per_sequence: int | None
    rare: NDArray[np.int64] | None
    others: int


class BatchStream:
    """Endless batches from (epoch, number) on, built by a thread while the device works; close it when done."""

    def __init__(
        self, data: PackedData, draw: DrawSettings, device: torch.device,
        epoch: int = 0, number: int = 0, rank: int = 0, world: int = 1, ahead: int = 3,
    ) -> None:  # fmt: skip
        self._data, self._draw, self._device, self._rank, self._world = data, draw, device, rank, world
        self._queue: queue.Queue[tuple[Pack, list[Tensor]] | BaseException] = queue.Queue(ahead)
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(epoch, number), daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Batch]:
        while True:
            item = self._queue.get()
            if isinstance(item, BaseException):
                raise item
            yield self._to_device(*item)

    def close(self) -> None:
        self._closed.set()
        self._thread.join()

    def _work(self, epoch: int, number: int) -> None:
        try:
            while not self._closed.is_set():
                rows = self._data.order(self._draw.seed, epoch)
                # Every process takes the same number of rows: a collective step must not miss one.
                for place in range(
                    number * self._world, len(rows) // self._world * self._world or len(rows), self._world
                ):
                    mine = rows[(place + self._rank) % len(rows)]
                    self._put((pack := self._data.pack(mine, epoch, place // self._world), self._arrays(pack)))
                    if self._closed.is_set():
                        return
                epoch, number = epoch + 1, 0
        except BaseException as error:  # handed to the consumer, which raises it
            self._put(error)

    def _arrays(self, pack: Pack) -> list[Tensor]:
        draw = self._draw
        rng = np.random.default_rng((draw.seed, 1 + pack.epoch, pack.number, self._rank))
        anchors = draw_anchors(
            pack.eligible,
            pack.document[pack.eligible],
            draw.anchors,
            draw.block_size,
            rng,
            draw.overlap,
            draw.per_sequence,
        )
        arrays = [pack.tokens, pack.offset, pack.document, pack.position, anchors]
        if draw.rare is not None:
            arrays.append(rng.choice(draw.rare, draw.others, replace=False))
        pin = self._device.type == "cuda"
        return [tensor.pin_memory() if pin else tensor for tensor in map(torch.from_numpy, arrays)]

    def _put(self, item: tuple[Pack, list[Tensor]] | BaseException) -> None:
        while not self._closed.is_set():
            try:
                return self._queue.put(item, timeout=0.1)
            except queue.Full:
                continue

    def _to_device(self, pack: Pack, arrays: list[Tensor]) -> Batch:
        moved = [tensor.to(self._device, non_blocking=True) for tensor in arrays]
        tokens, offset, document, position, anchors = (tensor[None] for tensor in moved[:5])
        layout = TrainingLayout(document, position, anchors, self._draw.block_size)
        return Batch(pack, tokens, offset, layout, moved[5] if len(moved) > 5 else None)
