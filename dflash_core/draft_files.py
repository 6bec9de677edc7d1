"""Writes a draft model's checkpoint folder, reads one and proves it complete; knows nothing of targets, pairs or the Hub."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_core.checkpoints import weight_errors
from dflash_core.config import DraftConfig
from dflash_core.errors import LoadError
from dflash_core.model import DFlashDraftModel

ARCHITECTURES = ("DFlashDraftModel", "DFlash2DraftModel")
DTYPES = ("F32", "F16", "BF16")


def write_draft(folder: Path, config: DraftConfig, weights: Mapping[str, Tensor]) -> None:
    """Write the public layout: config.json and model.safetensors, in the dtype that the weights have."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    dtype = str(next(iter(tensors.values())).dtype).removeprefix("torch.")
    raw = config.to_dict() | {"dtype": dtype}
    (folder / "config.json").write_text(json.dumps(raw, indent=2) + "\n", encoding="utf-8")


def read_draft_config(raw: dict[str, Any]) -> DraftConfig:
    """Dispatch on `architectures` and `dflash_config`: a plain Qwen3 has the same model type. Raises `LoadError`."""
    names = raw.get("architectures") or []
    is_marked = isinstance(raw.get("dflash_config"), dict)
    if names and not set(ARCHITECTURES) & set(names):
        wrong = "This draft is a variant that is not supported." if is_marked else "This is not a DFlash draft model."
        raise LoadError(
            wrong,
            f"Its config.json declares {', '.join(map(str, names))}.",
            f"Give a checkpoint that declares {' or '.join(ARCHITECTURES)}.",
        )
    if not names and not is_marked:
        raise LoadError(
            "This is not a DFlash draft model.",
            "Its config.json has neither 'architectures' nor 'dflash_config'.",
            f"Give a checkpoint that declares {' or '.join(ARCHITECTURES)}.",
        )
    return DraftConfig.from_dict(raw)


def check_draft_weights(files: list[Path], config: DraftConfig) -> None:
    """Compare the files' headers with what this shape needs: every key, no other, right sizes and types."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        with weight_errors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    expected = {name: tuple(value.shape) for name, value in empty_draft(config).state_dict().items()}
    _check_names(set(found), set(expected))
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise LoadError(
                "The draft's weights do not fit its config.json.",
                f"'{name}' has shape {list(found[name][0])}, expected {list(shape)}.",
                "Use the config.json that belongs to these weights.",
            )
        if found[name][1] not in DTYPES:
            raise LoadError(
                "The draft's weights have a type that is not supported.",
                f"'{name}' is stored as {found[name][1]}.",
                f"Use a checkpoint in {', '.join(DTYPES)}.",
            )


def _check_names(found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if any("qkv" in name for name in extra):
        variant = "fused query, key and value weights"
    elif any("embed_tokens" in name or "lm_head" in name for name in extra):
        variant = "an embedding or head of its own"
    else:
        variant = None
    if variant is not None:
        raise LoadError(
            "This draft is a variant that is not supported.",
            f"It has {variant}.",
            "Use a draft in the plain DFlash layout.",
        )
    if missing or extra:
        raise LoadError(
            "The draft's weights do not fit its config.json.",
            f"{len(missing)} tensors are missing and {len(extra)} unexpected, such as '{(missing or extra)[0]}'.",
            "Use a complete draft in the plain DFlash layout.",
        )


def empty_draft(config: DraftConfig) -> DFlashDraftModel:
    """The draft's shape without memory behind it."""
    with torch.device("meta"):
        return DFlashDraftModel(config)


def load_draft(files: list[Path], config: DraftConfig, device: torch.device, dtype: torch.dtype) -> DFlashDraftModel:
    """Read checked weights into a draft model, frozen, in evaluation mode, on `device` as `dtype`."""
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with weight_errors(path):
            tensors |= {name: value.to(device, dtype) for name, value in load_file(path).items()}
    broken = [name for name, value in tensors.items() if not value.isfinite().all()]
    if broken:
        raise LoadError(
            "The draft's weights hold values that are not numbers.",
            f"'{broken[0]}' has NaN or infinity as {str(dtype).removeprefix('torch.')}.",
            "Use a checkpoint that was saved before its training diverged, or a wider dtype.",
        )
    draft = empty_draft(config)
    draft.load_state_dict(tensors, strict=True, assign=True)
    return draft.eval().requires_grad_(False)
