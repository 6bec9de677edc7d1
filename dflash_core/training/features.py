"""What the frozen target thinks of a packed row: tapped hidden states and its own choices, live or cached; knows no draft.

| --features | where | when |
|---|---|---|
| online | nowhere: one target forward per step | any amount of data; about a quarter of a step for a small target |
| gpu | device memory, bfloat16, once per sequence | the data fits (taps x hidden x 2 bytes a token) |
| cpu | main memory, pinned | as above, host transfer per step |
| disk | one memory-mapped file in the output folder | as above, survives restarts |
"""

import json
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

HEAD_CHUNK = 4096



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


class ChoiceTable:
    """The target's choice after every token of the data, worked out once, when a sequence is first seen."""

    def __init__(self, reader: TargetReader, data: PackedData, device: torch.device) -> None:
        self._reader = reader
        # One more place than tokens, where padding reads and writes.
        self._table = torch.zeros(int(data.starts[-1]) + 1, dtype=torch.int32, device=device)
        self._known = np.zeros(len(data.shards), bool)

    def known(self, documents: Sequence[int]) -> bool:
        return bool(self._known[list(documents)].all())

    def learn(self, documents: Sequence[int], offset: Tensor, hidden: Tensor) -> None:
        """Note the choices of a pack: offsets [S] in the data, final hidden states [S, H]."""
        self._table[offset] = self._reader.choices(hidden).to(torch.int32)
        self._known[list(documents)] = True

    def look_up(self, offset: Tensor) -> Tensor:
        return self._table[offset].long()


class FeatureStore:
    """Features of all the data in one place, filled sequence by sequence; bfloat16 on GPUs, the target's dtype else."""

    def __init__(self, place: str, data: PackedData, width: int, dtype: torch.dtype, device: torch.device, folder: Path) -> None:
        self.place, self._device = place, device
        self._known = np.zeros(len(data.shards), bool)
        tokens = int(data.starts[-1]) + 1
        needed = tokens * width * dtype.itemsize
        self._path = folder / "features.bin"
        _check_room(place, needed, device, folder, self._path)
        if place == "disk":
            self._store = torch.from_file(str(self._path), shared=True, size=tokens * width, dtype=dtype).view(tokens, width)
            self._read_known({"tokens": tokens, "width": width, "dtype": str(dtype)})
        else:
            where = device if place == "gpu" else torch.device("cpu")
            self._store = torch.empty(tokens, width, dtype=dtype, device=where)

    def known(self, documents: Sequence[int]) -> bool:
        return bool(self._known[list(documents)].all())

    def learn(self, documents: Sequence[int], offset: Tensor, features: Tensor) -> None:
        self._store[offset.to(self._store.device)] = features.to(self._store.device, self._store.dtype)
        self._known[list(documents)] = True

    def look_up(self, offset: Tensor) -> Tensor:
        return self._store[offset.to(self._store.device)].to(self._device, non_blocking=True)

    def flush(self) -> None:
        """On disk: note which sequences are there, so that a restart does not read them again."""
        if self.place == "disk":
            np.save(self._path.with_suffix(".known.npy"), self._known)

    def _read_known(self, shape: dict[str, object]) -> None:
        note, known = self._path.with_suffix(".json"), self._path.with_suffix(".known.npy")
        if note.exists() and known.exists() and json.loads(note.read_text()) == shape:
            self._known = np.load(known, allow_pickle=False)
        note.write_text(json.dumps(shape))


def _check_room(place: str, needed: int, device: torch.device, folder: Path, path: Path) -> None:
    """Raises `TrainingError` with the amount needed where it is not free."""
    if place == "disk":
        free, where = shutil.disk_usage(folder).free + (path.stat().st_size if path.exists() else 0), "on the disk"
    elif place == "gpu" and device.type == "cuda":
        free, where = torch.cuda.mem_get_info(device)[0], "on the GPU"
    else:
        return
    if needed > free:
        raise TrainingError(
            "The feature cache does not fit.",
            f"It needs {needed / 1e9:.1f} GB, {free / 1e9:.1f} GB are free {where}.",
            "Use --features online or less data.",
        )
