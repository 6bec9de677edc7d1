"""What a draft checkpoint says of itself and how one reply is sampled; refuses to open files or touch tensors."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

from dflash_core.errors import LoadError, PromptError

LayerType: TypeAlias = Literal["full_attention", "sliding_attention"]
Acceptance: TypeAlias = Literal["match", "rejection"]

SUPPORTED_ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Marks of published variants whose tensors or arithmetic differ from the plain draft this package implements.
DFLASH2_FIELDS = ("conv_kernel_size", "conv_group_size", "selector_rank", "selector_top_k")
UNSUPPORTED_SWITCHES = ("attention_bias", "mlp_bias", "fused_qkv", "use_own_embeddings")


def default_target_layer_ids(target_layers: int, features: int) -> tuple[int, ...]:
    """Evenly spread taps from layer 1 to layer N-3 (DFlash §4.1); 36 layers and 5 features give 1, 9, 17, 25, 33."""
    if features == 1:
        return (target_layers // 2,)
    return tuple(round(1 + i * (target_layers - 4) / (features - 1)) for i in range(features))


@dataclass(frozen=True, slots=True)
class DraftConfig:
    """The draft model's shape, validated once. Field names follow the public checkpoints' config.json.

    is_causal               within a block: None means sliding layers only, as the public code reads a missing entry
    input_embedding_scale   on the raw rows of the target's embedding; None takes what the target itself sees
    conv_*                  DFlash 2's convolution around every sublayer, 0 for none
    selector_*              DFlash 2's candidate selector, 0 for none
    """

    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    vocab_size: int
    block_size: int
    mask_token_id: int
    target_layer_ids: tuple[int, ...]
    num_target_layers: int
    layer_types: tuple[LayerType, ...] = ()
    sliding_window: int | None = None
    is_causal: bool | None = False
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    rope_parameters: Mapping[str, Any] = field(default_factory=lambda: {"rope_type": "default", "rope_theta": 10000.0})
    input_embedding_scale: float | None = None
    conv_kernel_size: int = 0
    conv_group_size: int = 0
    selector_rank: int = 0
    selector_top_k: int = 0

    def __post_init__(self) -> None:
        if not self.layer_types:
            object.__setattr__(self, "layer_types", ("full_attention",) * self.num_hidden_layers)
        if self.is_causal is None and "sliding_attention" not in self.layer_types:
            object.__setattr__(self, "is_causal", False)
        _check_draft_config(self)

    @property
    def is_dflash2(self) -> bool:
        return bool(self.conv_kernel_size or self.selector_rank)

    @property
    def kind(self) -> str:
        """The architecture for people to read."""
        return "DFlash 2" if self.is_dflash2 else "DFlash"

    @property
    def fits_transformers(self) -> bool:
        """Whether transformers' own class has a place for this draft: not for DFlash 2's parts nor for causal slots."""
        return not (self.is_dflash2 or any(self.attention_rule(kind)[1] for kind in self.layer_types))

    def attention_rule(self, kind: LayerType) -> tuple[int | None, bool]:
        """Window and causality of one kind of layer."""
        sliding = kind == "sliding_attention"
        causal = sliding if self.is_causal is None else self.is_causal
        return self.sliding_window if sliding else None, causal

    @classmethod
    def from_dict(cls, raw: Mapping[str, Any]) -> "DraftConfig":
        """Read a public `config.json` (Qwen3 fields, `block_size`, `dflash_config`). Raises `LoadError`."""
        nested = raw.get("dflash_config") or {}

        def found(key: str) -> Any:
            return nested.get(key, raw.get(key))

        def need(key: str) -> Any:
            value = found(key)
            if value is None:
                raise LoadError(
                    "This is not a DFlash draft configuration.",
                    f"Its config.json has no '{key}' (model type '{raw.get('model_type', 'unknown')}').",
                    "Give a draft checkpoint with block_size, mask_token_id and target_layer_ids.",
                )
            return value

        for switch in UNSUPPORTED_SWITCHES:
            if found(switch):
                raise LoadError(
                    "This draft is a variant that is not supported.",
                    f"Its config.json sets '{switch}'.",
                    "Use a draft in the plain DFlash layout.",
                )
        if raw.get("hidden_act", "silu") != "silu":
            raise LoadError(
                "This draft is a variant that is not supported.",
                f"Its activation is '{raw['hidden_act']}'.",
                "Use a draft with hidden_act 'silu'.",
            )
        block_size, mask_token_id = need("block_size"), need("mask_token_id")
        target_layer_ids, num_target_layers = need("target_layer_ids"), need("num_target_layers")
        heads, layers, scale = need("num_attention_heads"), need("num_hidden_layers"), found("input_embedding_scale")
        try:
            return cls(
                hidden_size=int(need("hidden_size")),
                intermediate_size=int(need("intermediate_size")),
                num_hidden_layers=int(layers),
                num_attention_heads=int(heads),
                num_key_value_heads=int(raw.get("num_key_value_heads") or heads),
                head_dim=int(raw.get("head_dim") or need("hidden_size") // heads),
                vocab_size=int(need("vocab_size")),
                block_size=int(block_size),
                mask_token_id=int(mask_token_id),
                target_layer_ids=tuple(int(i) for i in target_layer_ids),
                num_target_layers=int(num_target_layers),
                layer_types=tuple((raw.get("layer_types") or ())[: int(layers)]),
                sliding_window=raw.get("sliding_window"),
                is_causal=raw.get("is_causal"),
                rms_norm_eps=float(raw.get("rms_norm_eps", 1e-6)),
                max_position_embeddings=int(raw.get("max_position_embeddings", 32768)),
                rope_parameters=_rope_parameters(raw),
                input_embedding_scale=None if scale is None else float(scale),
                **{name: int(found(name) or 0) for name in DFLASH2_FIELDS},
            )
        except (TypeError, ValueError) as error:
            raise LoadError(
                "This draft's config.json holds a value of the wrong kind.",
                f"Reading it failed with: {error}.",
                "Fix the file or download the draft again.",
            ) from error

    def to_dict(self) -> dict[str, Any]:
        """The public `config.json` of this draft; `from_dict` reads it back unchanged."""
        rope = dict(self.rope_parameters)
        nested: dict[str, Any] = {"mask_token_id": self.mask_token_id, "target_layer_ids": list(self.target_layer_ids)}
        if self.input_embedding_scale is not None:
            nested["input_embedding_scale"] = self.input_embedding_scale
        if self.is_dflash2:
            nested |= {"block_size": self.block_size} | {name: getattr(self, name) for name in DFLASH2_FIELDS}
        return {
            "architectures": ["DFlash2DraftModel" if self.is_dflash2 else "DFlashDraftModel"],
            "model_type": "qwen3",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "block_size": self.block_size,
            "dflash_config": nested,
            "dtype": "bfloat16",
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "is_causal": self.is_causal,
            "layer_types": list(self.layer_types),
            "max_position_embeddings": self.max_position_embeddings,
            "num_attention_heads": self.num_attention_heads,
            "num_hidden_layers": self.num_hidden_layers,
            "num_key_value_heads": self.num_key_value_heads,
            "num_target_layers": self.num_target_layers,
            "rms_norm_eps": self.rms_norm_eps,
            "rope_theta": rope["rope_theta"],
            "rope_scaling": None if rope["rope_type"] == "default" else rope,
            "sliding_window": self.sliding_window,
            "tie_word_embeddings": False,
            "use_sliding_window": "sliding_attention" in self.layer_types,
            "vocab_size": self.vocab_size,
        }


def _rope_parameters(raw: Mapping[str, Any]) -> dict[str, Any]:
    """One shape for both spellings: `rope_parameters` (transformers 5) and `rope_theta` + `rope_scaling` (4)."""
    rope = dict(raw.get("rope_parameters") or raw.get("rope_scaling") or {})
    rope["rope_type"] = rope.pop("type", None) or rope.get("rope_type") or "default"
    rope.setdefault("rope_theta", float(raw.get("rope_theta") or 10000.0))
    return rope


def _check_draft_config(config: DraftConfig) -> None:
    def refuse(found: str, do: str) -> None:
        raise LoadError("This draft's configuration cannot work.", found, do)

    for name in (
        "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "vocab_size", "num_target_layers",
    ):  # fmt: skip
        if getattr(config, name) < 1:
            refuse(f"'{name}' is {getattr(config, name)}.", "It must be at least 1.")
    if config.block_size < 2:
        refuse(f"'block_size' is {config.block_size}.", "It must be at least 2: one anchor and one drafted token.")
    if config.num_attention_heads % config.num_key_value_heads:
        refuse(
            f"{config.num_attention_heads} attention heads do not divide into {config.num_key_value_heads} key/value heads.",
            "Fix the head counts.",
        )
    if config.head_dim % 2:
        refuse(f"'head_dim' is {config.head_dim}.", "Rotary embeddings need an even number.")
    if not config.target_layer_ids:
        refuse("'target_layer_ids' is empty.", "Name at least one target layer.")
    bad = [i for i in config.target_layer_ids if not 0 <= i < config.num_target_layers]
    if bad:
        refuse(f"'target_layer_ids' names layer {bad[0]} of a {config.num_target_layers}-layer target.", "Use ids from 0 to layers-1.")
    if config.mask_token_id < 0:
        refuse(f"'mask_token_id' is {config.mask_token_id}.", "It must be a row of the target's embedding.")
    if len(config.layer_types) != config.num_hidden_layers or set(config.layer_types) - {"full_attention", "sliding_attention"}:
        refuse(f"'layer_types' is {list(config.layer_types)}.", "Give full_attention or sliding_attention once per layer.")
    if "sliding_attention" in config.layer_types and not (config.sliding_window and config.sliding_window > 0):
        refuse(f"A sliding layer has window {config.sliding_window}.", "Set 'sliding_window' to a positive number.")
    if config.conv_kernel_size and (config.conv_group_size < 1 or config.hidden_size % config.conv_group_size):
        refuse(
            f"'conv_group_size' is {config.conv_group_size} for hidden size {config.hidden_size}.",
            "It must divide the hidden size.",
        )
    if config.selector_rank and not 1 <= config.selector_top_k <= config.vocab_size:
        refuse(f"'selector_top_k' is {config.selector_top_k}.", "It must be from 1 to the size of the vocabulary.")
    if min(getattr(config, name) for name in DFLASH2_FIELDS) < 0:
        refuse("A convolution or selector size is below 0.", "Use 0 to leave it out.")
    if config.rope_parameters["rope_type"] not in SUPPORTED_ROPE_TYPES:
        refuse(
            f"Its rotary embedding type is '{config.rope_parameters['rope_type']}'.",
            f"Supported are {', '.join(SUPPORTED_ROPE_TYPES)}.",
        )


LogitsProcessor: TypeAlias = Callable[[Sequence[int], Any], Any]


@dataclass(frozen=True, slots=True)
class SamplingParams:
    """How one reply is sampled and when it ends; validated once. Raises `PromptError`.

    temperature        0 is greedy
    top_p, top_k       1.0 and 0 switch them off
    seed               None draws a fresh one; the same seed gives the same reply on the same device
    max_new_tokens     the first token and a stop token count
    stop_token_ids     None takes the pair's own; () never stops at a token
    stop_strings       the reply ends with the token that completes one of them
    block_size         slots per block, anchor included; None takes the draft's; never above it
    acceptance         "match": argmax draft, the target samples, compare; "rejection": Leviathan et al. 2023.
                       Greedy decoding always compares.
    processors         functions (tokens so far, logits [V]) -> logits [V], applied to the target's logits of
                       every slot, in order, before temperature
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    seed: int | None = None
    max_new_tokens: int = 512
    stop_token_ids: tuple[int, ...] | None = None
    stop_strings: tuple[str, ...] = ()
    block_size: int | None = None
    acceptance: Acceptance = "match"
    processors: tuple[LogitsProcessor, ...] = ()

    def __post_init__(self) -> None:
        def need(ok: bool, name: str, rule: str) -> None:
            if not ok:
                raise PromptError(
                    "A sampling setting is out of range.", f"'{name}' is {getattr(self, name)!r}.", f"It must be {rule}."
                )

        need(0.0 <= self.temperature < float("inf"), "temperature", "0 (greedy) or more")
        need(0.0 < self.top_p <= 1.0, "top_p", "above 0 and at most 1")
        need(self.top_k >= 0, "top_k", "0 (off) or more")
        need(self.max_new_tokens >= 1, "max_new_tokens", "at least 1")
        need(self.block_size is None or self.block_size >= 2, "block_size", "at least 2: one anchor, one drafted token")
        need(self.acceptance in ("match", "rejection"), "acceptance", "'match' or 'rejection'")
        need(all(self.stop_strings), "stop_strings", "non-empty strings")
        need(self.seed is None or 0 <= self.seed < 2**63, "seed", "between 0 and 2^63-1")
