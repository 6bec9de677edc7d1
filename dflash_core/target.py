"""The target behind one narrow door: forward a block, tap layers, take tokens back; knows nothing of drafting or text."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding, linear
from transformers import cache_utils
from transformers.cache_utils import DynamicCache

from dflash_core.errors import LoadError
from dflash_core.graphed import GraphedSession, can_graph

# Exact types: a subclass may keep more state than the rollback below knows.
_ATTENTION = (cache_utils.DynamicLayer, cache_utils.DynamicSlidingWindowLayer)
_LINEAR = (
    cache_utils.LinearAttentionLayer,
    cache_utils.LinearAttentionAndFullAttentionLayer,
    cache_utils.LinearAttentionAndSlidingWindowAttentionLayer,
)
_STATELESS = (cache_utils.DummyLayer,)


def cache_argument(model: Any) -> str:
    """What a forward of this model calls its cache: `cache` from transformers 5.24 on, `past_key_values` before."""
    return "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"


class Target:
    """A loaded transformers causal language model and the traits that drafting needs to know of it."""

    def __init__(self, model: Any, graphs: bool | None = None) -> None:
        """`graphs` records forwards as CUDA graphs; None does so where the model allows it."""
        self.model = model.eval().requires_grad_(False)
        self.graphs = can_graph(model) if graphs is None else graphs
        self.config = model.config.get_text_config(decoder=True)
        self.cache_argument = cache_argument(model)
        self._embedding, self._head = model.get_input_embeddings(), model.get_output_embeddings()
        if self._embedding is None or self._head is None:
            raise LoadError(
                "This target cannot be drafted for.",
                f"{type(model).__name__} has no token embedding or no output head.",
                "Use a causal language model.",
            )
        self._check_cache()
        self._embedding_scale, self._logit_scale = self._measure_traits()

    @property
    def device(self) -> torch.device:
        return self._head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.model.dtype

    @property
    def hidden_size(self) -> int:
        return self.config.hidden_size

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @property
    def vocab_size(self) -> int:
        """Rows of the embedding: mask ids may lie beyond the tokenizer's length but not beyond this."""
        return self._embedding.weight.shape[0]

    def embed(self, ids: Tensor, scale: float | None = None) -> Tensor:
        """Token embeddings [B, S, H] of ids [B, S] as the target's first layer sees them, or the raw ones times `scale`."""
        if scale is not None:
            return embedding(ids.to(self._embedding.weight.device), self._embedding.weight) * scale
        embeds = self._embedding(ids.to(self._embedding.weight.device))
        return embeds if self._embedding_scale == 1.0 else embeds * self._embedding_scale

    def head(self, hidden: Tensor) -> Tensor:
        """Logits [..., V] of hidden states [..., H] that already went through a final norm."""
        return self._shape_logits(self._head(hidden.to(self._head.weight.device)))

    def head_rows(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """Logits [..., C] of only the tokens `ids` [C]; they may differ from `head` by rounding."""
        bias = getattr(self._head, "bias", None)
        return self._shape_logits(linear(hidden, self._head.weight[ids], None if bias is None else bias[ids]))

    def head_of(self, hidden: Tensor, ids: Tensor) -> Tensor:
        """One float32 logit [M] for each of the hidden states [M, H]: that of its own token in `ids` [M]."""
        logits = (hidden.float() * self._head.weight[ids].float()).sum(-1)
        bias = getattr(self._head, "bias", None)
        return self._shape_logits(logits if bias is None else logits + bias[ids].float())

    def _shape_logits(self, logits: Tensor) -> Tensor:
        if self._logit_scale != 1.0:
            logits = logits * self._logit_scale
        cap = getattr(self.config, "final_logit_softcapping", None)
        return logits if cap is None else (logits / cap).tanh() * cap

    def session(self, taps: tuple[int, ...] = (), capacity: int | None = None) -> "TargetSession | GraphedSession":
        """A fresh, empty run; sessions share the weights and nothing else.

        `capacity` is the most tokens it will ever hold, blocks included; without it nothing is recorded in advance.
        """
        if self.graphs and capacity is not None:
            return GraphedSession(self, taps, capacity)
        return TargetSession(self, taps)

    def _check_cache(self) -> None:
        for layer in DynamicCache(config=self.model.config).layers:
            if type(layer) not in _ATTENTION + _LINEAR + _STATELESS:
                raise LoadError(
                    "This target keeps a cache that cannot be rolled back.",
                    f"{type(self.model).__name__} uses {type(layer).__name__}.",
                    "Use a target with full, sliding-window or linear attention.",
                )

    @torch.inference_mode()
    def _measure_traits(self) -> tuple[float, float]:
        """Scalars the model applies after its embedding and after its head; measured, since every family names them otherwise."""
        ids = torch.arange(4, device=self._embedding.weight.device)[None]
        output = self.model(ids, use_cache=False, output_hidden_states=[0, self.num_layers])
        embedding_scale = _ratio(output.hidden_states[0], self._embedding(ids))
        logits, raw = output.logits.float(), self._head(output.hidden_states[-1]).float()
        cap = getattr(self.config, "final_logit_softcapping", None)
        if cap is not None:
            logits = (logits / cap).clamp(-0.999, 0.999).atanh() * cap
        return embedding_scale, _ratio(logits, raw)


def _ratio(scaled: Tensor, plain: Tensor) -> float:
    """The scalar between two tensors, 1.0 when they agree to within rounding."""
    scaled, plain = scaled.double().flatten().cpu(), plain.double().flatten().cpu()
    ratio = float((scaled @ plain) / (plain @ plain).clamp_min(1e-30))
    return 1.0 if abs(ratio - 1.0) < 0.02 or not 0.0 < ratio < float("inf") else ratio


class TargetSession:
    """One run through the target: a cache that grows by what is forwarded and shrinks by what is rolled back.

    Full attention is cropped. Sliding windows record their past and are cropped. Linear attention has no past to crop:
    its states are copied before a block and, when part of the block is taken back, restored and the kept tokens run
    again, which is exact.
    """

    def __init__(self, target: Target, taps: tuple[int, ...]) -> None:
        self._model, self._device, self._cache_argument = target.model, target.device, target.cache_argument
        self._embedding_device = target.model.get_input_embeddings().weight.device
        # hidden_states[0] is the embedding, so layer i's output is hidden_states[i + 1].
        self._wanted: list[int] | bool = [i + 1 for i in taps] if taps else False
        self._cache: DynamicCache | None = DynamicCache(config=target.model.config)
        layers = self._cache.layers
        self._linear = [layer for layer in layers if type(layer) in _LINEAR]
        self._sliding = any(getattr(layer, "is_sliding", False) for layer in layers)
        self._recording = False
        self._last: Tensor | None = None
        self._states: list[dict[str, Any]] = []
        self.length = 0

    def prefill(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run the prompt [1, n]; returns the last position's logits [V] and the tapped features [1, n, taps * H]."""
        logits, features = self._run(ids, logits_to_keep=1)
        return logits[-1], features

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor | None]:
        """Run a block [1, q] on top of the cache; returns logits [q, V] and features [1, q, taps * H]."""
        if ids.shape[1] > 1:
            if not self._recording:
                self._record_past()
            self._states = [_snapshot(layer) for layer in self._linear]
        self._last = ids
        return self._run(ids, logits_to_keep=0)

    def rollback(self, keep: int) -> None:
        """Keep the first `keep` (1..q) tokens of the last `forward` and forget the rest."""
        assert self._cache is not None and self._last is not None and 1 <= keep <= self._last.shape[1]
        drop = self._last.shape[1] - keep
        if drop and self._linear:
            self._replay(keep)
        elif drop or (self._recording and self._sliding):
            # Sliding layers that record their past shrink to the window only when cropped, by 0 at least.
            self._crop(drop)
        self._states = []

    def close(self) -> None:
        """Drop the cache; the session cannot be used again."""
        self._cache = self._last = None
        self._states = []

    def _run(self, ids: Tensor, logits_to_keep: int) -> tuple[Tensor, Tensor | None]:
        output = self._model(
            ids.to(self._embedding_device),
            use_cache=True,
            output_hidden_states=self._wanted,
            logits_to_keep=logits_to_keep,
            **{self._cache_argument: self._cache},
        )
        self.length += ids.shape[1]
        if not self._wanted:
            return output.logits[0], None
        return output.logits[0], torch.cat([output.hidden_states[i].to(self._device) for i in self._wanted], dim=-1)

    def _record_past(self) -> None:
        for layer in self._cache.layers:
            if getattr(layer, "is_sliding", False):
                cache_utils.DynamicSlidingWindowLayer.activate_past_recording(layer)
        self._recording = True

    def _crop(self, drop: int) -> None:
        for layer in self._cache.layers:
            if isinstance(layer, cache_utils.DynamicSlidingWindowLayer):
                cache_utils.DynamicSlidingWindowLayer.crop(layer, -drop)
            elif isinstance(layer, cache_utils.DynamicLayer):
                cache_utils.DynamicLayer.crop(layer, -drop)
        self.length -= drop

    def _replay(self, keep: int) -> None:
        for layer, state in zip(self._linear, self._states, strict=True):
            _restore(layer, state)
        ids, wanted = self._last, self._wanted
        self._crop(ids.shape[1])
        self._wanted = False
        self._run(ids[:, :keep], logits_to_keep=1)
        self._wanted = wanted
        if self._sliding:
            self._crop(0)


_STATE_FIELDS = ("conv_states", "recurrent_states", "has_previous_state")


def _snapshot(layer: Any) -> dict[str, Any]:
    """A deep copy of a linear layer's states; forwards write them in place."""
    return {
        name: {key: value.clone() if isinstance(value, Tensor) else value for key, value in getattr(layer, name).items()}
        for name in _STATE_FIELDS
    }


def _restore(layer: Any, state: dict[str, Any]) -> None:
    for name in _STATE_FIELDS:
        getattr(layer, name).update(state[name])
