"""Key/value slots for batched decoding and the attention over them; knows no sampling, no prompts and no files.

Every row of the batch owns one slot of `capacity` positions and stands at its own position: a prompt fills the slot
from position 0, each decoded token writes the next one. What a former owner left beyond that is never seen.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from dflash_core.errors import TrainingError
from dflash_core.training import slot_kernel

ATTENTION = "slots"  # a name with "flash" in it would be taken for a downloadable kernel


class Slots:
    """The decode-time cache that a model takes as its cache, per layer [rows, kv_heads, capacity, D]."""

    is_compileable = False

    def __init__(self, rows: int, capacity: int, position: Tensor) -> None:
        """`position` [rows]: where each row's current token belongs; the owner advances it in place."""
        self.rows, self.capacity, self.position = rows, capacity, position
        self._row = torch.arange(rows, device=position.device)
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def layer(self, index: int, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """The slots of one layer, made at first use after the shape of `keys` and `values` [.., kv_heads, .., D]."""
        if index not in self._layers:
            # Zeros, not garbage: a masked NaN would still poison the weighted sum of values.
            shapes = ((self.rows, new.shape[1], self.capacity, new.shape[3]) for new in (keys, values))
            self._layers[index] = tuple(keys.new_zeros(shape) for shape in shapes)  # type: ignore[assignment]
        return self._layers[index]

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Write one token per row [rows, kv_heads, 1, D]; returns the whole layer."""
        stored = self.layer(layer_idx, keys, values)
        for store, new in zip(stored, (keys, values), strict=True):
            store[self._row, :, self.position] = new[:, :, 0]
        return stored

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


class Fill:
    """The prefill-time cache: right-padded prompts of some rows see only themselves and are copied into slots."""

    is_compileable = False

    def __init__(self, slots: Slots, rows: Tensor) -> None:
        self._slots, self._rows = slots, rows

    def update(self, keys: Tensor, values: Tensor, layer_idx: int, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Store [n, kv_heads, width, D] at positions 0..width-1; returns what came in."""
        for store, new in zip(self._slots.layer(layer_idx, keys, values), (keys, values), strict=True):
            store[self._rows, :, : new.shape[2]] = new
        return keys, values

    def get_seq_length(self, layer_idx: int = 0) -> int:
        return 0


def slot_attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    slot_position: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """The attention interface of transformers. With `slot_position` [B] a row sees keys 0..its position, else causally.

    query [B, heads, Q, D], key and value [B, kv_heads, K, D] -> [B, Q, heads, D].
    """
    if softcap is not None or s_aux is not None:
        kind = "soft-capped attention" if softcap is not None else "attention sinks"
        raise TrainingError(
            "This target cannot generate data with the local back end.",
            f"It uses {kind}.",
            "Serve it with vLLM or SGLang and use --server.",
        )
    scaling = scaling if scaling is not None else query.shape[-1] ** -0.5
    attend = _prefill if slot_position is None else _decode
    return attend(query, key, value, scaling, slot_position, sliding_window).transpose(1, 2), None


def _prefill(query: Tensor, key: Tensor, value: Tensor, scaling: float, _: None, window: int | None) -> Tensor:
    width, mask = query.shape[2], None
    assert width == key.shape[2], "a target switched to slots decodes through its engine only"
    if window is not None and window < width:
        step = torch.arange(width, device=query.device)
        behind = step[:, None] - step[None]
        mask = (behind >= 0) & (behind < window)
    return F.scaled_dot_product_attention(
        query, key, value, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=True
    )


def _decode(query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor, window: int | None) -> Tensor:
    if slot_kernel.usable(query, key, value):
        return slot_kernel.attend(query, key, value, position, scaling, window)
    return plain_decode(query, key, value, scaling, position, window)


def plain_decode(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, position: Tensor, window: int | None
) -> Tensor:
    """Decode attention by masked SDPA over the full capacity; the kernel's fallback and oracle."""
    step = torch.arange(key.shape[2], device=key.device)
    seen = step[None] <= position[:, None]
    if window is not None:
        seen &= step[None] > position[:, None] - window
    # The heads that share a key/value head become its queries, so that nothing is repeated in memory.
    grouped = query.reshape(query.shape[0], key.shape[1], -1, query.shape[3])
    out = F.scaled_dot_product_attention(grouped, key, value, attn_mask=seen[:, None, None], scale=scaling)
    return out.reshape(*query.shape[:3], value.shape[3])


def use_slots(model: Any) -> None:
    """Let `model` attend over slots. Raises `TrainingError` for a target whose layers do not allow it."""
    from transformers import AttentionInterface

    config = model.config.get_text_config()
    other = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if other:
        raise TrainingError(
            "This target cannot generate data with the local back end.",
            f"It has {min(other)} layers.",
            "Serve it with vLLM or SGLang and use --server.",
        )
    AttentionInterface.register(ATTENTION, slot_attention)
    model.set_attn_implementation(ATTENTION)
    if config._attn_implementation != ATTENTION:
        raise TrainingError(
            "This target cannot generate data with the local back end.",
            f"{type(model).__name__} does not let its attention be replaced.",
            "Serve it with vLLM or SGLang and use --server.",
        )
