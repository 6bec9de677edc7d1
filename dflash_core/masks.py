"""Who may attend to whom in the draft model: one predicate, dense and flex forms derived; knows no weights.

Training lays all blocks of a packed row of documents end to end and fills them in one forward. Keys are the S context
tokens followed by the N * B block slots; queries are the slots. With anchors at 2 and 5, block size 3, one document:

                context 0 1 2 3 4 5 6   block 0   block 1
    block 0 (anchor 2)  # # . . . . .    # # #     . . .
    block 1 (anchor 5)  # # # # # . .    . . .     # # #

A block sees the context strictly before its anchor (the anchor itself is slot 0, its feature is not known yet when
drafting) and all of itself. Padding and other documents are never seen.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

TILE = 128


def may_attend(
    query_block: Any, query_anchor: Any, query_document: Any, query_position: Any,
    key_block: Any, key_index: Any, key_document: Any, key_position: Any,
    window: int | None = None, causal: bool = False,
) -> Any:  # fmt: skip
    """The one rule, on ints or on tensors that broadcast.

    A key of block -1 is a context token. `key_index` and `query_anchor` are indices into the packed row, positions are
    within a document. A block that is padding has anchor -1, so it sees itself alone: a query that sees nothing has no
    softmax. `window` w allows |query - key| < w; `causal` hides a block's later slots.
    """
    in_context = (key_block < 0) & (key_index < query_anchor) & (key_document == query_document)
    allowed = in_context | (key_block == query_block)
    if window is not None:
        allowed = allowed & (abs(query_position - key_position) < window)
    if causal:
        allowed = allowed & (key_position <= query_position)
    return allowed


def inference_mask(
    query_positions: Tensor, context_positions: Tensor, window: int | None, causal: bool = False,
    visible: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """Dense mask [B, 1, Q, S + Q] of one block behind its context.

    `visible` [B, S] hides unused rows of a fixed buffer.
    """
    slots = torch.zeros_like(query_positions)
    unused = torch.zeros_like(context_positions) if visible is None else (~visible).to(slots)
    key_block = torch.cat((torch.full_like(context_positions, -1), slots), dim=1)[:, None]
    key_document = torch.cat((unused, slots), dim=1)[:, None]
    key_position = torch.cat((context_positions, query_positions), dim=1)[:, None]
    query = slots[:, :, None]
    # The block stands behind all of its context, so every context index (0) is before its anchor (1).
    rule = may_attend(
        query, 1, query, query_positions[:, :, None], key_block, 0, key_document, key_position, window, causal
    )
    return rule[:, None]


@dataclass(frozen=True)
class TrainingLayout:
    """All blocks of R packed or padded rows of S context tokens; N blocks a row, in ascending order of their anchors.

    document  [R, S] id of the document each token belongs to, below 0 for padding
    position  [R, S] position within the document, counted from 0 without gaps
    anchor    [R, N] index into the row of each block's slot 0, below 0 for a block that is padding
    """

    document: Tensor
    position: Tensor
    anchor: Tensor
    block_size: int

    @property
    def slots(self) -> int:
        return self.anchor.shape[1] * self.block_size

    @property
    def slot_anchor(self) -> Tensor:
        """[R, Q] anchor of each slot's block."""
        return self.anchor.repeat_interleave(self.block_size, dim=1)

    @property
    def slot_document(self) -> Tensor:
        """[R, Q] document of each slot, below 0 for padding blocks."""
        return self._of_anchor(self.document, -1)

    @property
    def slot_position(self) -> Tensor:
        """[R, Q] anchor's position plus the slot's number: positions span context and blocks."""
        offset = torch.arange(self.block_size, device=self.anchor.device).repeat(self.anchor.shape[1])
        return self._of_anchor(self.position, 0) + offset

    def _of_anchor(self, values: Tensor, padding: int) -> Tensor:
        found = values.gather(1, self.anchor.clamp(min=0).long())
        return torch.where(self.anchor < 0, padding, found).repeat_interleave(self.block_size, dim=1)

    def _keys(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Block [K], index [K], document [R, K] and position [R, K] of the K = S + Q keys."""
        context, device = self.document.shape[1], self.anchor.device
        block = torch.arange(self.slots, device=device) // self.block_size
        index = torch.arange(context + self.slots, device=device)
        block = torch.cat((torch.full((context,), -1, device=device), block))
        document = torch.cat((self.document, self.slot_document), dim=1)
        return block, index, document, torch.cat((self.position, self.slot_position), dim=1)

    def dense(self, window: int | None = None, causal: bool = False) -> Tensor:
        """Boolean mask [R, 1, Q, S + Q] for SDPA."""
        block, index, document, position = self._keys()
        return may_attend(
            block[None, self.document.shape[1] :, None], self.slot_anchor[:, :, None],
            self.slot_document[:, :, None], self.slot_position[:, :, None],
            block[None, None], index[None, None], document[:, None], position[:, None], window, causal,
        )[:, None]  # fmt: skip

    def flex(self, window: int | None = None, causal: bool = False) -> Any:
        """The same mask as a flex BlockMask; tiles come from intervals, so no [Q, K] mask is ever built."""
        block, _, document, position = self._keys()
        query_anchor, query_document, query_position = self.slot_anchor, self.slot_document, self.slot_position
        block_size = self.block_size

        def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
            return may_attend(
                q // block_size, query_anchor[b, q], query_document[b, q], query_position[b, q],
                block[k], k, document[b, k], position[b, k], window, causal,
            )  # fmt: skip

        return _block_mask(self._tiles(window), mask_mod, self.slots, document.shape[1])

    def _tiles(self, window: int | None) -> Tensor:
        """[R, query tiles, key tiles]: a superset of the tiles that hold an allowed pair."""
        context, device = self.document.shape[1], self.anchor.device
        number = torch.arange(self.slots, device=device) % self.block_size
        start = self.slot_anchor - (self.slot_position - number)
        if window is not None:
            start = torch.maximum(start, self.slot_anchor + number - window + 1)
        dead = self.slot_document < 0
        start, end = start.masked_fill(dead, context), self.slot_anchor.masked_fill(dead, 0)
        tiles = _interval_tiles(start, end, context + self.slots)
        own = (torch.arange(self.slots, device=device) - number + context)[None]
        return tiles | _interval_tiles(own, own + self.block_size, context + self.slots)


def packed_causal(document: Tensor, position: Tensor, use_flex: bool) -> Any:
    """The target's own mask over packed rows [R, S]: causal within a document; bool [R, 1, S, S] or a BlockMask.

    Padding counts as one document, so that no query sees nothing.
    """
    index = torch.arange(document.shape[1], device=document.device)
    if not use_flex:
        ahead = index[None, :, None] >= index[None, None]
        return (ahead & (document[:, :, None] == document[:, None]))[:, None]

    def mask_mod(b: Tensor, h: Tensor, q: Tensor, k: Tensor) -> Tensor:
        return (q >= k) & (document[b, q] == document[b, k])

    tiles = _interval_tiles(index - position, index[None] + 1, document.shape[1])
    return _block_mask(tiles, mask_mod, document.shape[1], document.shape[1])


def _interval_tiles(start: Tensor, end: Tensor, keys: int) -> Tensor:
    """Tiles [R, query tiles, key tiles] met by the union of the queries' key intervals [start, end), each [R, Q]."""
    padding = -start.shape[1] % TILE
    low = torch.nn.functional.pad(start, (0, padding), value=keys).unflatten(1, (-1, TILE)).amin(-1)
    high = torch.nn.functional.pad(end, (0, padding), value=0).unflatten(1, (-1, TILE)).amax(-1)
    first = torch.arange(0, keys, TILE, device=start.device)
    return (first < high[..., None]) & (first + TILE > low[..., None])


def _block_mask(tiles: Tensor, mask_mod: Callable[..., Tensor], queries: int, keys: int) -> Any:
    from torch.nn.attention.flex_attention import BlockMask

    counts = tiles.sum(-1, dtype=torch.int32)[:, None]
    order = torch.argsort(tiles.to(torch.int8), dim=-1, descending=True, stable=True).to(torch.int32)[:, None]
    return BlockMask.from_kv_blocks(counts, order, BLOCK_SIZE=TILE, mask_mod=mask_mod, seq_lengths=(queries, keys))


@functools.cache
def _compiled_flex() -> Callable[..., Any]:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention, dynamic=False)


def flex(queries: Tensor, keys: Tensor, values: Tensor, block_mask: Any) -> Tensor:
    """Grouped-query flex attention of [R, heads, Q, d] over [R, kv_heads, K, d]; compiled on first use on a GPU."""
    from torch.nn.attention.flex_attention import flex_attention

    # The CPU kernel has no backward, and inside a compiled region the plain call is what gets compiled.
    plain = torch.compiler.is_compiling() or queries.device.type == "cpu"
    run = flex_attention if plain else _compiled_flex()
    grouped = queries.shape[1] != keys.shape[1]
    return run(queries.to(values.dtype), keys.to(values.dtype), values, block_mask=block_mask, enable_gqa=grouped)
