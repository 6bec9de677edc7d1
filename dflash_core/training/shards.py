"""Token sequences on disk: safetensors shards read by memory map; knows no model, no text and no writing.

A folder holds `manifest.json` and `shard-NNNNN.safetensors`, each with flat `tokens` (uint16 or int32) and, one value
per sequence, `length`, `prompt_length` (int32), `key` (int64, names the prompt), `category` (int32, index into the
manifest's `categories`) and `temperature` (float32). One `.npz` or `.safetensors` file of the first three works, too.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from zipfile import BadZipFile

import numpy as np
from numpy.typing import NDArray

from dflash_core.errors import TrainingError

MANIFEST = "manifest.json"
_DTYPES = {"U16": np.uint16, "I32": np.int32, "I64": np.int64, "F32": np.float32}


def _map_safetensors(path: Path) -> dict[str, NDArray[Any]]:
    """Read-only memory maps of every tensor of a file; nothing is loaded until it is looked at."""
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if not 0 < header_bytes <= path.stat().st_size - 8:
            raise ValueError("its header is cut off")
        header = json.loads(file.read(header_bytes))
    header.pop("__metadata__", None)
    arrays: dict[str, NDArray[Any]] = {}
    for name, entry in header.items():
        begin, end = entry["data_offsets"]
        if 8 + header_bytes + end > path.stat().st_size:
            raise ValueError("it is cut off")
        dtype, shape = np.dtype(_DTYPES[entry["dtype"]]), tuple(entry["shape"])
        empty = begin == end
        arrays[name] = (
            np.zeros(shape, dtype)
            if empty
            else np.memmap(path, dtype, "r", offset=8 + header_bytes + begin, shape=shape)
        )
    return arrays


def _read_arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of one shard file. Raises `TrainingError` for a file that is none."""
    try:
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as archive:
                arrays = {name: archive[name] for name in archive.files}
        else:
            arrays = _map_safetensors(path)
    except (OSError, ValueError, KeyError, TypeError, EOFError, BadZipFile) as error:
        raise TrainingError(
            "A data file cannot be read.", f"{path}: {error}.", "Generate it again or remove it."
        ) from error
    missing = {"tokens", "length", "prompt_length"} - set(arrays)
    if missing:
        raise TrainingError(
            "A data file is not a token shard.",
            f"{path} has no '{min(missing)}'.",
            "Give what the regenerate command wrote.",
        )
    return arrays


@dataclass(frozen=True)
class _Shard:
    """One mapped file. `starts` [n + 1] are offsets into `tokens`."""

    tokens: NDArray[Any]
    length: NDArray[np.int32]
    prompt_length: NDArray[np.int32]
    starts: NDArray[np.int64]
    extra: Mapping[str, NDArray[Any]]
    categories: Sequence[str]

    @classmethod
    def open(cls, path: Path, categories: Sequence[str] = ()) -> "_Shard":
        arrays = _read_arrays(path)
        tokens, length, prompt = (arrays.pop(name) for name in ("tokens", "length", "prompt_length"))
        starts = np.concatenate(([0], np.cumsum(length, dtype=np.int64)))
        whole = len(length) == len(prompt) and starts[-1] == len(tokens)
        if not whole or (len(length) and (prompt.min() < 1 or (length < prompt).any())):
            raise TrainingError(
                "A data file contradicts itself.",
                f"{path}: its lengths do not add up.",
                "Generate it again or remove it.",
            )
        return cls(tokens, length, prompt, starts, arrays, categories)

    def category(self, index: int) -> str | None:
        ids = self.extra.get("category")
        if ids is None or not 0 <= ids[index] < len(self.categories):
            return None
        return self.categories[int(ids[index])]


def read_manifest(folder: Path) -> dict[str, Any]:
    """The folder's manifest, {} where there is none. Raises `TrainingError` for a broken one."""
    try:
        return dict(json.loads((folder / MANIFEST).read_text("utf-8")))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise TrainingError(
            "A data folder's manifest cannot be read.",
            f"{folder / MANIFEST}: {error}.",
            "Restore it or generate the data again.",
        ) from error


class TokenShards(Sequence[tuple[NDArray[Any], int]]):
    """Sequences of one or more shard folders or files, in order; the tokens of shards stay on disk."""

    def __init__(self, shards: Sequence[_Shard], manifests: Sequence[dict[str, Any]]) -> None:
        self._shards = tuple(shards)
        self._first = np.concatenate(([0], np.cumsum([len(shard.length) for shard in shards], dtype=np.int64)))
        self.manifests = tuple(manifests)  # how each source was made, {} where nothing tells
        self.lengths: NDArray[np.int32] = np.concatenate([shard.length for shard in shards])
        self.prompt_lengths: NDArray[np.int32] = np.concatenate([shard.prompt_length for shard in shards])

    @classmethod
    def open(cls, *paths: str | Path) -> "TokenShards":
        """Map every sequence under `paths` (folders of shards, `.safetensors`, `.npz`). Raises `TrainingError`."""
        assert paths
        shards, manifests = [], []
        for path in map(Path, paths):
            if not path.exists():
                raise TrainingError("There is no training data.", f"{path} does not exist.", "Check the path.")
            manifest = read_manifest(path) if path.is_dir() else {}
            files = shard_files(path) if path.is_dir() else [path]
            shards += [_Shard.open(file, manifest.get("categories", ())) for file in files]
            manifests.append(manifest)
        if not sum(len(shard.length) for shard in shards):
            raise TrainingError(
                "There is no training data.",
                f"{', '.join(map(str, paths))} holds no sequence.",
                "Run the regenerate command first.",
            )
        return cls(shards, manifests)

    @property
    def total_tokens(self) -> int:
        return int(self.lengths.sum(dtype=np.int64))

    def __len__(self) -> int:
        return int(self._first[-1])

    def __getitem__(self, index: int) -> tuple[NDArray[Any], int]:  # type: ignore[override]
        """Prompt and reply tokens [length] (a read-only view, uint16 or int32) and the prompt's length."""
        shard, local = self._locate(index)
        return shard.tokens[shard.starts[local] : shard.starts[local + 1]], int(shard.prompt_length[local])

    def category(self, index: int) -> str | None:
        """The prompt's category, None where the data names none."""
        shard, local = self._locate(index)
        return shard.category(local)

    def keys(self) -> set[int]:
        """Names of the prompts that have been answered."""
        return {int(key) for shard in self._shards for key in shard.extra.get("key", ())}

    def _locate(self, index: int) -> tuple[_Shard, int]:
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(index)
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return self._shards[shard], index - int(self._first[shard])


def shard_files(folder: Path) -> list[Path]:
    """The folder's finished shards in order."""
    return sorted(
        path for path in folder.glob("*") if path.suffix in (".safetensors", ".npz") and not path.name.startswith(".")
    )
