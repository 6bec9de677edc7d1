"""CUDA graphs for targets with full attention: fixed buffers, lengths as tensors, one replay per forward.

Launching a small model's kernels one by one costs more than running them. Here a whole forward is recorded once per
block width and replayed. It refuses to decide when that pays: `Target.session` does.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from transformers import cache_utils
from transformers.cache_utils import DynamicCache, StaticCache

from dflash_core.drafter import DFlashDrafter, Proposal
from dflash_core.model import DFlashDraftModel, DraftCache

# Capacities are rounded up so that similar runs use alike shapes.
_ROUND = 256
_WARM_UPS = 2


def rounded(tokens: int) -> int:
    return -(-tokens // _ROUND) * _ROUND


def can_graph(model: Any) -> bool:
    """Whether every forward of this model launches the same kernels: one CUDA device, full attention, no experts."""
    config = model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=model.config).layers
    return (
        model.device.type == "cuda"
        and len({parameter.device for parameter in model.parameters()}) == 1
        and all(type(layer) is cache_utils.DynamicLayer for layer in layers)
        and not getattr(model, "is_quantized", False)
        # Experts pick their tokens by data, which a recorded graph cannot.
        and not any(getattr(config, name, None) for name in ("num_experts", "num_local_experts", "n_routed_experts"))
    )


class Recorded:
    """A function of tensors, recorded as a CUDA graph at its first call and replayed after that.

    Inputs are copied into fixed buffers; outputs are overwritten by the next call. Without CUDA it calls the function on
    the same buffers, so that everything but the recording itself is the same.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        self._function = function
        self._buffers: list[Tensor] = []
        self._graph: torch.cuda.CUDAGraph | None = None
        self._outputs: Any = None

    def __call__(self, *inputs: Tensor) -> Any:
        if not self._buffers:
            self._buffers = [value.clone() for value in inputs]
            if inputs[0].is_cuda:
                self._record()
        else:
            for buffer, value in zip(self._buffers, inputs, strict=True):
                buffer.copy_(value)
        if self._graph is None:
            return self._function(*self._buffers)
        self._graph.replay()
        return self._outputs

    def _record(self) -> None:
        # Libraries allocate at their first use, which must happen outside a recording and on another stream.
        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UPS):
                self._function(*self._buffers)
        torch.cuda.current_stream().wait_stream(stream)
        self._graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(self._graph):
            self._outputs = self._function(*self._buffers)


class GraphedSession:
    """A `TargetSession` over a static cache. Rolling back is moving the length: rows beyond it are overwritten."""

    def __init__(self, target: Any, taps: tuple[int, ...], capacity: int) -> None:
        self._model, self._device, self._cache_argument = target.model, target.device, target.cache_argument
        self._wanted: list[int] | bool = [i + 1 for i in taps] if taps else False
        self._cache: StaticCache | None = StaticCache(config=target.model.config, max_cache_len=rounded(capacity))
        self._forwards: dict[int, Recorded] = {}
        self._width = 0
        self.length = 0

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the prompt [1, n]; returns the last position's logits [V] and the tapped features [1, n, taps * H]."""
        logits, features = self._run(ids, torch.zeros((), dtype=torch.long, device=self._device), logits_to_keep=1)
        self.length = ids.shape[1]
        return logits[-1], features

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run a block [1, q]; returns logits [q, V] and features [1, q, taps * H], valid until the next forward."""
        self._width = ids.shape[1]
        step = self._forwards.setdefault(self._width, Recorded(self._run))
        output = step(ids, torch.tensor(self.length, device=self._device))
        self.length += self._width
        return output

    def rollback(self, keep: int) -> None:
        """Keep the first `keep` (1..q) tokens of the last `forward` and forget the rest."""
        assert 1 <= keep <= self._width
        self.length -= self._width - keep

    def close(self) -> None:
        """Drop cache and recordings; the session cannot be used again."""
        self._cache = None
        self._forwards = {}

    def _run(self, ids: Tensor, start: Tensor, logits_to_keep: int = 0) -> tuple[Tensor, Tensor | None]:
        for layer in self._cache.layers:
            if layer.is_initialized:
                layer.cumulative_length.copy_(start)
        output = self._model(
            ids,
            use_cache=True,
            output_hidden_states=self._wanted,
            logits_to_keep=logits_to_keep,
            **{self._cache_argument: self._cache},
        )
        if not self._wanted:
            return output.logits[0], None
        return output.logits[0], torch.cat([output.hidden_states[i] for i in self._wanted], dim=-1)


class FixedDraftCache(DraftCache):
    """A draft cache of fixed capacity whose length is a tensor, so that a recorded graph can extend and read it."""

    def __init__(self, draft: DFlashDraftModel, capacity: int) -> None:
        super().__init__(draft.config)
        weight = draft.fc.weight
        shape = (1, draft.config.num_key_value_heads, capacity, draft.config.head_dim)
        self._keys = [weight.new_zeros(shape) for _ in self._keys]
        self._values = [weight.new_zeros(shape) for _ in self._values]
        self._slots = torch.arange(capacity, device=weight.device)[None]
        self.length: Any = torch.zeros((), dtype=torch.long, device=weight.device)

    def copy_from(self, smaller: "FixedDraftCache", length: int) -> None:
        for mine, theirs in zip((*self._keys, *self._values), (*smaller._keys, *smaller._values), strict=True):
            mine[:, :, :length] = theirs[:, :, :length]
        self.length = smaller.length

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        return self._slots[:, :count] + self.length

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> None:
        rows = self.next_positions(keys.shape[2], keys.device)[0]
        self._keys[layer].index_copy_(2, rows, keys)
        self._values[layer].index_copy_(2, rows, values)

    def advance(self, count: Any) -> None:
        self.length = self.length + count

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        return self._keys[layer], self._values[layer]

    def key_positions(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        return self._slots, self._slots < self.length


class GraphedDrafter(DFlashDrafter):
    """A `DFlashDrafter` that takes a step's features and fills the next block in one recorded graph."""

    def __init__(self, *drafter: Any, **options: Any) -> None:
        super().__init__(*drafter, **options)
        self.reset()

    def reset(self) -> None:
        self._capacity = self._length = 0
        self._pending: Tensor | None = None
        self._fills: dict[int, Recorded] = {}

    def commit(self, features: Tensor) -> None:
        assert self._pending is None, "propose between two commits"
        # Features are padded to a whole block, so the last rows may reach past what will ever be committed.
        self._reserve(self._length + features.shape[1] + self._masks.shape[1])
        if self._length == 0:
            super().commit(features)
            self._length = features.shape[1]
        else:
            self._pending = features

    def propose(self, anchor: int, k: int) -> Proposal:
        ids = self._block(anchor, k)
        if self._pending is None:
            return self._fill(ids)
        count = self._pending.shape[1]
        padded = self._pending.new_zeros(1, self._masks.shape[1], self._pending.shape[2])
        padded[:, :count] = self._pending
        start = torch.tensor(self._length, device=ids.device)
        self._length, self._pending = self._length + count, None
        step = self._fills.setdefault(k, Recorded(self._extend_and_fill))
        return step(ids, padded, start, torch.tensor(count, device=ids.device))

    def _extend_and_fill(self, ids: Tensor, features: Tensor, start: Tensor, count: Tensor) -> Proposal:
        self._cache.length = start
        self._draft.extend(self._cache, features, count)
        return self._fill(ids)

    def _reserve(self, tokens: int) -> None:
        """Have room for so many tokens; a recording points at the buffers, so new buffers need new recordings."""
        if tokens <= self._capacity:
            return
        self._capacity = rounded(max(2 * self._capacity, tokens + _ROUND))
        grown = FixedDraftCache(self._draft, self._capacity)
        if self._length:
            grown.copy_from(self._cache, self._length)
        self._cache, self._fills = grown, {}
