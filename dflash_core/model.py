"""The draft model in plain PyTorch, parameter names as in the public checkpoints; knows no tokens and no vocabulary.

It fills a block: hidden states of [anchor, MASK x k] in, hidden states of the k+1 slots out (DFlash, arXiv 2602.06036).
The embedding before it and the head after it are the target's.
"""

from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_core.config import DraftConfig
from dflash_core.dflash2 import CandidateSelector, DynamicConv
from dflash_core.masks import inference_mask

# A mask a layer type can use: None (attend to everything), bool [.., Q, K] for SDPA, or a flex BlockMask.
Masks: TypeAlias = Mapping[str, Any]


class RMSNorm(nn.Module):
    def __init__(self, size: int, eps: float) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        # float32 statistics, then the weight in the input's dtype: the order the public checkpoints were trained with.
        wide = x.float()
        return self.weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class MLP(nn.Module):
    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


def rope_frequencies(config: DraftConfig) -> tuple[Tensor, float]:
    """Inverse frequencies `[head_dim / 2]` and the factor on cos and sin; scaled types as transformers computes them."""
    rope = dict(config.rope_parameters)
    if rope["rope_type"] == "default":
        steps = torch.arange(0, config.head_dim, 2, dtype=torch.float32)
        return 1.0 / (rope["rope_theta"] ** (steps / config.head_dim)), 1.0
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    shape = SimpleNamespace(
        rope_parameters=rope,
        head_dim=config.head_dim,
        hidden_size=config.hidden_size,
        num_attention_heads=config.num_attention_heads,
        max_position_embeddings=config.max_position_embeddings,
        standardize_rope_params=lambda: None,
    )
    return ROPE_INIT_FUNCTIONS[rope["rope_type"]](shape, torch.device("cpu"))


def rotate(x: Tensor, rotary: tuple[Tensor, Tensor]) -> Tensor:
    """Apply rotary embeddings to `[B, heads, S, head_dim]` with cos and sin `[B, 1, S, head_dim]`."""
    cos, sin = rotary
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


class DraftCache:
    """Keys and values of the context, one pair per layer, `[1, kv_heads, capacity, head_dim]`, grown by doubling.

    It holds committed tokens only, so it is never rolled back; a block's own keys never enter it.
    """

    def __init__(self, config: DraftConfig) -> None:
        self.length = 0
        self._keys: list[Tensor | None] = [None] * config.num_hidden_layers
        self._values: list[Tensor | None] = [None] * config.num_hidden_layers

    def next_positions(self, count: int, device: torch.device) -> Tensor:
        """Absolute positions [1, count] of what follows the cached context."""
        return torch.arange(self.length, self.length + count, device=device)[None]

    def extend(self, layer: int, keys: Tensor, values: Tensor) -> None:
        """Append `[1, kv_heads, n, head_dim]` to one layer. Call `advance(n)` once after the last layer."""
        end = self.length + keys.shape[2]
        for store, new in ((self._keys, keys), (self._values, values)):
            old = store[layer]
            if old is None or old.shape[2] < end:
                room = max(256, 1 << (end - 1).bit_length())
                grown = new.new_empty(*new.shape[:2], room, new.shape[3])
                if old is not None:
                    grown[:, :, : self.length] = old[:, :, : self.length]
                store[layer] = old = grown
            old[:, :, self.length : end] = new

    def advance(self, count: int) -> None:
        self.length += count

    def read(self, layer: int) -> tuple[Tensor, Tensor]:
        keys, values = self._keys[layer], self._values[layer]
        assert keys is not None and values is not None
        return keys[:, :, : self.length], values[:, :, : self.length]

    def key_positions(self, device: torch.device) -> tuple[Tensor, Tensor | None]:
        """Positions [1, S] of the keys that `read` gives, and which of them hold context (None: all)."""
        return torch.arange(self.length, device=device)[None], None


class Attention(nn.Module):
    """Queries from the block only; keys and values from [context ; block] through the same projections."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        width, kv_width = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, kv_width, bias=False)
        self.o_proj = nn.Linear(width, config.hidden_size, bias=False)
        self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
        self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def split(self, x: Tensor) -> Tensor:
        """`[B, S, heads * head_dim]` -> `[B, heads, S, head_dim]`."""
        return x.unflatten(-1, (-1, self.head_dim)).transpose(1, 2)

    def keys_values(self, x: Tensor, rotary: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        return rotate(self.k_norm(self.split(self.k_proj(x))), rotary), self.split(self.v_proj(x))

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor] | None, mask: Any) -> Tensor:
        """`x` [B, Q, H], `context` keys and values [B, kv_heads, S, head_dim] or None; returns [B, Q, H]."""
        queries = rotate(self.q_norm(self.split(self.q_proj(x))), rotary)
        keys, values = self.keys_values(x, rotary)
        if context is not None:
            keys, values = torch.cat((context[0], keys), dim=2), torch.cat((context[1], values), dim=2)
        return self.o_proj(attend(queries, keys, values, mask).transpose(1, 2).flatten(2))


def attend(queries: Tensor, keys: Tensor, values: Tensor, mask: Any) -> Tensor:
    """Grouped-query attention over a dense boolean mask, none, or a flex BlockMask."""
    if mask is None or isinstance(mask, Tensor):
        return F.scaled_dot_product_attention(queries, keys, values, attn_mask=mask, enable_gqa=True)
    from dflash_core.masks import flex

    return flex(queries, keys, values, mask)


class Layer(nn.Module):
    """A Qwen3 block whose context passes through neither the input norm nor the MLP.

    In DFlash 2 a convolution over the block's slots stands around each of its two sublayers.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.self_attn = Attention(config)
        self.mlp = MLP(config)
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        convolved = config.conv_kernel_size > 0
        self.attention_conv = DynamicConv(config) if convolved else None
        self.mlp_conv = DynamicConv(config) if convolved else None

    def forward(
        self, x: Tensor, rotary: tuple[Tensor, Tensor], context: tuple[Tensor, Tensor] | None, mask: Any, slots: int
    ) -> Tensor:
        """`x` [B, Q, H] holds blocks of `slots` slots end to end."""
        attend = lambda inner: self.self_attn(inner, rotary, context, mask)  # noqa: E731
        x = x + _convolved(self.attention_conv, attend, self.input_layernorm(x), slots)
        return x + _convolved(self.mlp_conv, self.mlp, self.post_attention_layernorm(x), slots)


def _convolved(conv: DynamicConv | None, sublayer: Callable[[Tensor], Tensor], x: Tensor, slots: int) -> Tensor:
    if conv is None:
        return sublayer(x)
    x, kernel = conv.before(x, slots)
    return conv.after(sublayer(x), kernel, slots)


class DFlashDraftModel(nn.Module):
    """The block-diffusion draft model of DFlash. `state_dict()` has exactly the public checkpoints' keys."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self.config = config
        self.fc = nn.Linear(len(config.target_layer_ids) * config.hidden_size, config.hidden_size, bias=False)
        self.hidden_norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.candidate_selector = CandidateSelector(config) if config.selector_rank else None
        with torch.device("cpu"):  # the module itself may be built on "meta"
            self._frequencies, self._rope_factor = rope_frequencies(config)

    def new_cache(self) -> DraftCache:
        return DraftCache(self.config)

    def project(self, features: Tensor) -> Tensor:
        """Context feature of tapped hidden states: [B, S, taps * H] -> [B, S, H] (DFlash §4.1)."""
        return self.hidden_norm(self.fc(features))

    def rotary(self, positions: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """cos and sin [B, 1, S, head_dim] for positions [B, S]; angles are computed in float32."""
        # Not a module buffer: a cast of the model to bfloat16 would round the frequencies.
        if self._frequencies.device != positions.device:
            self._frequencies = self._frequencies.to(positions.device)
        angles = (positions[..., None].float() * self._frequencies).repeat(1, 1, 2)[:, None]
        return (angles.cos() * self._rope_factor).to(dtype), (angles.sin() * self._rope_factor).to(dtype)

    def forward(
        self,
        block: Tensor,
        context: Tensor,
        block_positions: Tensor,
        context_positions: Tensor,
        masks: Masks | None = None,
        slots: int | None = None,
    ) -> Tensor:
        """Fill blocks in one pass without a cache (training, tests).

        block              [B, Q, H] embeddings of one or many blocks laid end to end
        context            [B, S, H] from `project`
        block_positions    [B, Q], context_positions [B, S], absolute
        masks              per layer type, over the S + Q keys; None lets every slot see everything (one block)
        slots              slots per block; None for one block
        Returns the slots' hidden states [B, Q, H]; the target's head turns them into logits.
        """
        rotary = self.rotary(block_positions, block.dtype)
        context_rotary = self.rotary(context_positions, block.dtype)
        if masks is None:
            masks = self._inference_masks(block_positions, context_positions)
        for layer, kind in zip(self.layers, self.config.layer_types, strict=True):
            past = layer.self_attn.keys_values(context, context_rotary)
            block = layer(block, rotary, past, masks[kind], slots or block.shape[1])
        return self.norm(block)

    def extend(self, cache: DraftCache, features: Tensor, count: Any = None) -> None:
        """Feed committed tokens' tapped hidden states [1, n, taps * H] into the cache, each token exactly once.

        `count` (default n) tells how many of the n rows are real when a fixed-size buffer is padded at its end.
        """
        context = self.project(features)
        rotary = self.rotary(cache.next_positions(features.shape[1], features.device), context.dtype)
        for index, layer in enumerate(self.layers):
            cache.extend(index, *layer.self_attn.keys_values(context, rotary))
        cache.advance(features.shape[1] if count is None else count)

    def fill(self, cache: DraftCache, block: Tensor) -> Tensor:
        """Fill one block [1, k+1, H] that starts right after the cached context; the cache is only read."""
        positions = cache.next_positions(block.shape[1], block.device)
        rotary = self.rotary(positions, block.dtype)
        masks = self._inference_masks(positions, *cache.key_positions(block.device))
        for index, (layer, kind) in enumerate(zip(self.layers, self.config.layer_types, strict=True)):
            block = layer(block, rotary, cache.read(index), masks[kind], block.shape[1])
        return self.norm(block)

    def _inference_masks(self, block_positions: Tensor, context_positions: Tensor, visible: Tensor | None = None) -> Masks:
        """One block at the end of its context: full layers see everything, sliding ones |q - k| < window."""
        masks: dict[str, Any] = {}
        for kind in set(self.config.layer_types):
            window, causal = self.config.attention_rule(kind)
            free = visible is None and window is None and not causal
            masks[kind] = None if free else inference_mask(block_positions, context_positions, window, causal, visible)
        return masks
