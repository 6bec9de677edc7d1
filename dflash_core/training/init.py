"""A draft's first weights, taken from the target; knows no training loop.

The draft's last norm is the target's, its layers are the target's last ones and `fc` averages the taps. Two things
differ between a target layer and a draft layer, and both are folded away so that the first forward already speaks the
target's language:

- The draft's context skips `input_layernorm`, so norm weights move into the projections that read them and every norm
  that both streams pass starts at one.
- A draft layer normalises each head's queries and keys. Qwen3 targets do too and hand over their weights; for others
  the norms start at the root mean square that the target's own queries and keys have on the data, which keeps the
  attention as sharp as it was.
"""

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from dflash_core.config import DraftConfig, default_target_layer_ids
from dflash_core.dflash2 import CandidateSelector, DynamicConv
from dflash_core.errors import TrainingError
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.training.features import TargetReader

MLP = ("gate_proj", "up_proj", "down_proj")


def draft_config(
    target: Target, layers: int, block_size: int, mask_token_id: int, taps: Sequence[int] | None, features: int,
    **changes: int,
) -> DraftConfig:  # fmt: skip
    """A draft shaped like the target's layers but for `changes`. Raises `TrainingError` where taps or mask do not fit."""
    config = target.config
    ids = tuple(taps) if taps else default_target_layer_ids(target.num_layers, features)
    if not all(0 <= tap < target.num_layers for tap in ids):
        raise TrainingError(
            "The taps do not fit the target.",
            f"Layers {list(ids)} of {target.num_layers}.",
            "Use ids from 0 to layers - 1.",
        )
    if not 0 <= mask_token_id < target.vocab_size:
        raise TrainingError(
            "The mask token does not fit the target.",
            f"Id {mask_token_id}, vocabulary {target.vocab_size}.",
            "Use an id the replies never hold.",
        )
    heads = config.num_attention_heads
    shape = dict(
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=getattr(config, "num_key_value_heads", None) or heads,
        head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
        vocab_size=target.vocab_size,
        block_size=block_size,
        mask_token_id=mask_token_id,
        target_layer_ids=ids,
        num_target_layers=target.num_layers,
        rms_norm_eps=getattr(config, "rms_norm_eps", 1e-6),
        max_position_embeddings=config.max_position_embeddings,
        rope_parameters=_rope(config),
    )
    return DraftConfig(**(shape | changes))


def _rope(config: Any) -> dict[str, Any]:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    rope.setdefault("rope_type", "default")
    rope.setdefault("rope_theta", 10000.0)
    return rope


@torch.no_grad()
def grown(trained: DFlashDraftModel, changes: Mapping[str, int]) -> DFlashDraftModel:
    """A trainable draft that starts as a trained one in a changed shape.

    A narrower MLP keeps its strongest units; what joins of DFlash 2 changes nothing at first.
    Raises `TrainingError` for a change that trained weights cannot follow.
    """
    old = trained.config
    for name, size in changes.items():
        narrower = name == "intermediate_size" and size <= old.intermediate_size
        if not narrower and getattr(old, name) not in (0, size):
            raise TrainingError(
                "The first draft cannot take this shape.",
                f"Its {name} is {getattr(old, name)}, asked for is {size}.",
                "Cut an MLP or add what the draft lacks; for any other shape train without --init-from.",
            )
    draft = DFlashDraftModel(replace(old, **changes)).to(trained.fc.weight.device)
    weights = trained.state_dict()
    for index, layer in enumerate(trained.layers):
        cut = strongest_units(layer.mlp, draft.config.intermediate_size)
        weights |= {f"layers.{index}.mlp.{name}.weight": weight for name, weight in cut.items()}
    draft.load_state_dict(draft.state_dict() | weights)
    return draft


def strongest_units(mlp: Any, count: int) -> dict[str, Tensor]:
    """A gated MLP's projections cut to the `count` units with the largest product of weights in and out, in order."""
    gate, up, down = (getattr(mlp, name).weight for name in MLP)
    strength = gate.norm(dim=1) * up.norm(dim=1) * down.norm(dim=0)
    kept = strength.float().topk(count).indices.sort().values
    return dict(zip(MLP, (gate[kept], up[kept], down[:, kept]), strict=True))


@torch.no_grad()
def initialise(draft: DFlashDraftModel, target: Target, measured: "Measured", from_target: bool) -> str:
    """Fill the draft's weights in place; returns one sentence that says what was taken from where."""
    std = getattr(target.config, "initializer_range", 0.02)
    for module in draft.modules():
        if isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=std)
    for module in draft.modules():
        if isinstance(module, DynamicConv | CandidateSelector):
            module.reset()
    size, taps = draft.config.hidden_size, len(draft.config.target_layer_ids)
    draft.fc.weight.copy_(torch.eye(size).repeat(1, taps) / taps)
    if not from_target:
        return "Layers start from random weights."
    base = getattr(target.model, target.model.base_model_prefix)
    draft.norm.weight.copy_(_gain(base.norm, size))
    copied = [
        _copy_layer(mine, theirs, scale, draft.config)
        for mine, theirs, scale in zip(draft.layers, base.layers[-len(draft.layers) :], measured.head_rms, strict=True)
    ]
    names = ", ".join(sorted(set().union(*copied)))
    return f"Layers start from the target's last {len(copied)}: {names or 'nothing fitted'}."


def _copy_layer(mine: Any, theirs: Any, scale: tuple[float, float], config: DraftConfig) -> set[str]:
    """Copy the projections that have the same shape, the norms before them folded in; returns their names.

    Of a wider MLP the strongest units are taken.
    """
    copied = set()
    groups = (
        ("self_attn", ("q_proj", "k_proj", "v_proj"), "input_layernorm"),
        ("self_attn", ("o_proj",), None),
        ("mlp", ("gate_proj", "up_proj"), "post_attention_layernorm"),
        ("mlp", ("down_proj",), None),
    )
    mlp = getattr(theirs, "mlp", None)
    gated = all(isinstance(getattr(mlp, name, None), nn.Linear) for name in MLP)
    narrower = gated and config.intermediate_size < mlp.gate_proj.weight.shape[0]
    cut = strongest_units(mlp, config.intermediate_size) if narrower else {}
    for part, names, norm in groups:
        gain = _gain(getattr(theirs, norm), config.hidden_size) if norm else 1.0
        for name in names:
            source = getattr(getattr(theirs, part, None), name, None)
            goal = getattr(getattr(mine, part), name).weight
            if not isinstance(source, nn.Linear):
                continue
            weight = cut.get(name, source.weight)
            if weight.shape == goal.shape:
                goal.copy_(weight.float() * gain)
                copied.add(name)
    for name, rms in zip(("q_norm", "k_norm"), scale, strict=True):
        source = getattr(theirs.self_attn, name, None)
        goal = getattr(mine.self_attn, name).weight
        if source is not None and source.weight.shape == goal.shape:
            goal.copy_(_gain(source, config.head_dim))
            copied.add(name)
        else:
            goal.fill_(rms)
    return copied


def _gain(norm: nn.Module, size: int) -> Tensor:
    """A norm's effective weight [size], whether it is stored as w or as w - 1: an RMS norm maps ones to its weight."""
    weight = norm.weight  # type: ignore[union-attr]
    return norm(torch.ones(1, size, dtype=weight.dtype, device=weight.device))[0].float()


class Measured:
    """What the data says of the target: the scale of its taps and of its last layers' queries and keys.

    tap_rms   median over tokens of each tap's root mean square
    head_rms  root mean squares of (queries, keys) in each of the last `layers` layers
    """

    def __init__(self, tap_rms: Sequence[float], head_rms: Sequence[tuple[float, float]]) -> None:
        self.tap_rms, self.head_rms = tuple(tap_rms), tuple(head_rms)

    @property
    def tap_scale(self) -> tuple[float, ...]:
        """The power of two nearest to 1/RMS of each tap: exact in every float format, so folding it into fc is free."""
        return tuple(2.0 ** -round(torch.tensor(rms).log2().item()) for rms in self.tap_rms)


@torch.no_grad()
def measure(reader: TargetReader, tokens: Tensor, document: Tensor, position: Tensor, layers: int) -> Measured:
    """Run packed rows [1, S] once, uncompiled, and note the scales."""
    base = getattr(reader.target.model, reader.target.model.base_model_prefix)
    found: dict[tuple[int, str], float] = {}
    real = document[0] >= 0

    def note(key: tuple[int, str]) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Tensor) -> None:
            found[key] = output[0][real].float().pow(2).mean().sqrt().item()

        return hook

    with ExitStack() as hooks:
        for index, layer in enumerate(base.layers[-layers:]):
            for name in ("q_proj", "k_proj"):
                projection = getattr(layer.self_attn, name, None)
                if projection is not None:
                    hooks.callback(projection.register_forward_hook(note((index, name))).remove)
        features, _ = reader.read(tokens, document, position)
    taps = features[0][real].float().unflatten(-1, (len(reader.taps), -1)).pow(2).mean(-1).sqrt().median(0).values
    heads = [(found.get((i, "q_proj"), 1.0), found.get((i, "k_proj"), 1.0)) for i in range(layers)]
    return Measured(taps.tolist(), heads)
