"""What the frozen target thinks of a packed row: tapped hidden states and its choices, live or cached; knows no draft.

| --feature-cache | where | when |
|---|---|---|
| online | nowhere: one target forward per step | any amount of data; about a quarter of a step for a small target |
| gpu | device memory, in the target's dtype | the data fits (taps x hidden x 2 bytes a token in bfloat16) |
| cpu | main memory | as above, one transfer per step |
| disk | memory-mapped files in the output folder | as above, survives restarts |
"""

import json
import math
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from dflash_core.errors import TrainingError
from dflash_core.masks import packed_causal
from dflash_core.target import Target
from dflash_core.training.data import PackedData
from dflash_core.training.report import shown_bytes

HEAD_CHUNK = 4096
FEATURES = "features.bin"


class TargetReader:
    """One forward of the target over packed documents that never see each other."""

    def __init__(self, target: Target, taps: tuple[int, ...], use_flex: bool, compile: bool) -> None:
        kinds = set(getattr(target.config, "layer_types", None) or ["full_attention"])
        if kinds != {"full_attention"}:
            raise TrainingError(
                "This target cannot be trained for.",
                f"It has layers of type {', '.join(sorted(kinds - {'full_attention'}))}.",
                "Use a target with full attention in every layer.",
            )
        self.target, self.taps, self._use_flex = target, taps, use_flex
        self._base = getattr(target.model, target.model.base_model_prefix)
        self._taken: dict[int, Tensor] | None = None
        # Hooks of our own: the model's way to return hidden states keeps global state that compiled calls upset.
        self._hooks = [self._base.layers[tap].register_forward_hook(self._note(tap)) for tap in sorted(set(taps))]
        self._forward = torch.compile(self._run, dynamic=False) if compile else self._run
        self._choose = torch.compile(self._argmax, dynamic=False) if compile else self._argmax

    @torch.no_grad()
    def read(self, tokens: Tensor, document: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
        """Features [R, S, taps * H] and final hidden states [R, S, H] of packed rows [R, S]."""
        mask = packed_causal(document, position, self._use_flex)
        kind = "flex_attention" if self._use_flex else "sdpa"
        if self.target.config._attn_implementation != kind:
            self.target.model.set_attn_implementation(kind)
        return self._forward(tokens, position, mask)

    @torch.no_grad()
    def choices(self, hidden: Tensor) -> Tensor:
        """The target's most likely next token [N] after each of the final hidden states [N, H]."""
        return torch.cat([self._choose(part) for part in hidden.split(HEAD_CHUNK)])

    @torch.no_grad()
    def top(self, hidden: Tensor, count: int) -> tuple[Tensor, Tensor]:
        """The `count` highest logits [N, count] and their tokens [N, count]."""
        parts = [self.target.head(part).topk(count, dim=-1) for part in hidden.split(HEAD_CHUNK)]
        return torch.cat([part.values for part in parts]), torch.cat([part.indices for part in parts])

    def _run(self, tokens: Tensor, position: Tensor, mask: object) -> tuple[Tensor, Tensor]:
        self._taken = {}
        output = self._base(input_ids=tokens, attention_mask=mask, position_ids=position, use_cache=False)
        features = torch.cat([self._taken[tap] for tap in self.taps], dim=-1)
        self._taken = None
        return features, output.last_hidden_state

    def _note(self, tap: int) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: object, output: Any) -> None:
            if self._taken is not None:
                self._taken[tap] = output[0] if isinstance(output, tuple) else output

        return hook

    def close(self) -> None:
        """Leave the target as it was."""
        for hook in self._hooks:
            hook.remove()

    def _argmax(self, hidden: Tensor) -> Tensor:
        return self.target.head(hidden).argmax(-1)


class _Kept:
    """Values [tokens + 1, ...] of all the data, filled pack by pack, and which sequences are in.

    The last place is where padding reads and writes. With a `path` the values are a memory-mapped file.
    """

    def __init__(
        self, data: PackedData, shape: tuple[int, ...], dtype: torch.dtype, where: torch.device, path: Path | None
    ) -> None:
        self._path, self._known = path, np.zeros(len(data.shards), bool)
        full = (int(data.starts[-1]) + 1, *shape)
        if path is None:
            self._values = torch.empty(full, dtype=dtype, device=where)
        else:
            self._values = torch.from_file(str(path), shared=True, size=math.prod(full), dtype=dtype).view(full)
            self._read_known({"shape": list(full), "dtype": str(dtype)})
        self._values[-1] = 0

    def known(self, documents: Sequence[int]) -> bool:
        return bool(self._known[list(documents)].all())

    def learn(self, documents: Sequence[int], offset: Tensor, values: Tensor) -> None:
        """Note a pack: values of the tokens at offsets [S] in the data."""
        self._values[offset.to(self._values.device)] = values.to(self._values.device, self._values.dtype)
        self._known[list(documents)] = True

    def look_up(self, offset: Tensor) -> Tensor:
        """Values of the tokens at offsets [S], on the offsets' device."""
        return self._values[offset.to(self._values.device)].to(offset.device, non_blocking=True)

    def flush(self) -> None:
        """On disk: note which sequences are there, so that a restart does not read them again."""
        if self._path is not None:
            # Whole or not at all: a kill may come in the middle.
            fresh = self._path.with_suffix(".fresh.npy")
            np.save(fresh, self._known)
            fresh.replace(self._path.with_suffix(".known.npy"))

    def _read_known(self, shape: dict[str, object]) -> None:
        assert self._path is not None
        note, known = self._path.with_suffix(".json"), self._path.with_suffix(".known.npy")
        if note.exists() and known.exists() and json.loads(note.read_text()) == shape:
            self._known = np.load(known, allow_pickle=False)
        else:
            known.unlink(missing_ok=True)
            note.write_text(json.dumps(shape))


class ChoiceTable(_Kept):
    """The target's choice after every token of the data, worked out once, when a sequence is first seen."""

    def __init__(self, reader: TargetReader, data: PackedData, device: torch.device, folder: Path | None) -> None:
        """`folder` keeps it on disk."""
        self._reader = reader
        super().__init__(data, (), torch.int32, device, folder and folder / "choices.bin")

    def learn(self, documents: Sequence[int], offset: Tensor, values: Tensor) -> None:
        """`values` are final hidden states [S, H]."""
        super().learn(documents, offset, self._reader.choices(values))

    def look_up(self, offset: Tensor) -> Tensor:
        return super().look_up(offset).long()


class FeatureStore(_Kept):
    """Features of all the data in one place, in the target's dtype."""

    def __init__(
        self, place: str, data: PackedData, width: int, dtype: torch.dtype, device: torch.device, folder: Path
    ) -> None:
        check_room(place, data, width, dtype, device, folder)
        path = folder / FEATURES if place == "disk" else None
        super().__init__(data, (width,), dtype, device if place == "gpu" else torch.device("cpu"), path)


def check_room(
    place: str, data: PackedData, width: int, dtype: torch.dtype, device: torch.device, folder: Path
) -> None:
    """Raises `TrainingError` with the amount needed where a cache of features [tokens, width] finds no room."""
    needed = (int(data.starts[-1]) + 1) * width * dtype.itemsize
    if place == "disk":
        old = folder / FEATURES
        free, where = shutil.disk_usage(folder).free + (old.stat().st_size if old.exists() else 0), "on the disk"
    elif place == "gpu" and device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        return
    if needed > free:
        raise TrainingError(
            "The feature cache does not fit.",
            f"It needs {shown_bytes(needed)}, {shown_bytes(free)} are free {where}.",
            "Use --feature-cache online or less data.",
        )
