"""Writes token shards atomically and goes on where a killed run stopped; knows no model and no text."""

import errno
import json
import os
import shutil
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import save

from dflash_core.errors import TrainingError
from dflash_core.training.shards import MANIFEST, TokenShards, read_manifest, shard_files

SHARD_BYTES = 15 * 2**20
SAVE_SECONDS = 60.0


def no_space(path: Path, need_bytes: int | None = None) -> TrainingError:
    free_bytes = shutil.disk_usage(path).free
    need = f"; {need_bytes / 1e6:.0f} MB are needed" if need_bytes else ""
    return TrainingError(
        "The disk is full.",
        f"{free_bytes / 1e6:.0f} MB are free at {path}{need}.",
        "Free some space and run the same command again.",
    )


def replace_file(path: Path, write: Callable[[Path], object]) -> None:
    """Let `write(temporary path)` make a file, then move it to `path` in one step. Raises `TrainingError`."""
    temporary = path.with_name(f".{path.name}.partial")
    try:
        write(temporary)
        with temporary.open("rb+") as file:
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise no_space(path.parent) from error
        raise TrainingError(
            "The data cannot be written.", f"{path}: {error.strerror}.", "Choose another output folder."
        ) from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


@dataclass(frozen=True, slots=True)
class Sample:
    """One finished sequence: prompt and reply tokens, and where it came from."""

    tokens: Sequence[int] | NDArray[Any]
    prompt_length: int
    key: int = 0
    category: str = "other"
    temperature: float = 0.0


@dataclass
class ShardWriter:
    """Appends sequences to a folder. A kill loses at most what was added since the last save.

    A shard is saved when it is full and every `save_seconds` on the way; each save replaces the file in one step.
    Opening a folder again keeps its shards and starts a new one; `done` names the prompts they answer.

    folder          created if need be
    vocab_size      tokens are uint16 when it fits, int32 otherwise
    identity        what must not change between runs into one folder (target, template, ...); goes into the manifest
    """

    folder: Path
    vocab_size: int
    identity: Mapping[str, Any]
    shard_bytes: int = SHARD_BYTES
    save_seconds: float = SAVE_SECONDS
    manifest: dict[str, Any] = field(init=False)
    done: set[int] = field(init=False, default_factory=set)

    def __post_init__(self) -> None:
        self.folder = Path(self.folder)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise TrainingError(
                "The output folder cannot be made.", f"{self.folder}: {error.strerror}.", "Choose another --output."
            ) from error
        self._dtype = np.dtype(np.uint16 if self.vocab_size <= 2**16 else np.int32)
        self.manifest = read_manifest(self.folder)
        self._refuse_other_data()
        for leftover in self.folder.glob(".*.partial"):
            leftover.unlink()
        self.manifest = {"format": "dflash-token-shards", "version": 1, "categories": [], "runs": [], **self.manifest}
        self.manifest.update({"vocab_size": self.vocab_size, "dtype": self._dtype.name, **self.identity})
        self._sealed = {"sequences": 0, "tokens": 0, "prompt_tokens": 0, "reply_tokens": 0}
        files = shard_files(self.folder)
        if files:
            old = TokenShards.open(*files)
            self._count(self._sealed, old.lengths, old.prompt_lengths)
            self.done |= old.keys()
        self._index = 1 + max((int(file.stem.rpartition("-")[2]) for file in files), default=-1)
        self._start_shard()

    def add(self, sequence: Sample) -> None:
        """Take one sequence. Raises `TrainingError` when a save meets a full disk."""
        tokens = np.asarray(sequence.tokens, dtype=self._dtype)
        assert 1 <= sequence.prompt_length <= len(tokens)
        names = self.manifest["categories"]
        if sequence.category not in names:
            names.append(sequence.category)
        self._tokens.append(tokens)
        row = (len(tokens), sequence.prompt_length, sequence.key, names.index(sequence.category), sequence.temperature)
        self._rows.append(row)
        self._bytes += tokens.nbytes + 24
        self.done.add(sequence.key)
        if self._bytes >= self.shard_bytes:
            self.save()
            self._seal()
        elif time.monotonic() - self._saved_at > self.save_seconds:
            self.save()

    def save(self) -> None:
        """Put everything added so far on disk, manifest included."""
        self._saved_at = time.monotonic()
        if self._rows and self._unsaved != len(self._rows):
            arrays = self._arrays()
            if shutil.disk_usage(self.folder).free < self._bytes + 2**20:
                raise no_space(self.folder, self._bytes)
            replace_file(
                self.folder / f"shard-{self._index:05d}.safetensors", lambda path: path.write_bytes(save(arrays))
            )
            self._unsaved = len(self._rows)
        self._save_manifest()

    def record_run(self, **facts: Any) -> None:
        """Append one run's facts (seconds, tokens per second, ...) to the manifest and save."""
        self.manifest["runs"].append(facts)
        self.save()

    def counts(self) -> dict[str, int]:
        """Sequences and tokens in the folder and in memory."""
        counts = dict(self._sealed)
        if self._rows:
            length, prompt = (np.array(column) for column in list(zip(*self._rows, strict=True))[:2])
            self._count(counts, length, prompt)
        return counts

    def _arrays(self) -> dict[str, NDArray[Any]]:
        length, prompt, key, category, temperature = zip(*self._rows, strict=True)
        return {
            "tokens": np.concatenate(self._tokens),
            "length": np.array(length, np.int32),
            "prompt_length": np.array(prompt, np.int32),
            "key": np.array(key, np.int64),
            "category": np.array(category, np.int32),
            "temperature": np.array(temperature, np.float32),
        }

    def _start_shard(self) -> None:
        self._tokens: list[NDArray[Any]] = []
        self._rows: list[tuple[int, int, int, int, float]] = []
        self._bytes = self._unsaved = 0
        self._saved_at = time.monotonic()

    def _seal(self) -> None:
        self._sealed = self.counts()
        self._index += 1
        self._start_shard()

    def _save_manifest(self) -> None:
        self.manifest["counts"] = self.counts()
        text = json.dumps(self.manifest, indent=1, ensure_ascii=False)
        replace_file(self.folder / MANIFEST, lambda path: path.write_text(text, "utf-8"))

    def _refuse_other_data(self) -> None:
        for name, value in {"vocab_size": self.vocab_size, **self.identity}.items():
            found = self.manifest.get(name, value)
            if found != value:
                raise TrainingError(
                    "The output folder holds other data.",
                    f"Its {name} is {found!r}, this run's is {value!r}.",
                    "Choose another --output or the same settings as before.",
                )

    @staticmethod
    def _count(counts: dict[str, int], length: NDArray[Any], prompt: NDArray[Any]) -> None:
        tokens, prompt_tokens = int(length.sum(dtype=np.int64)), int(prompt.sum(dtype=np.int64))
        for name, value in (
            ("sequences", len(length)), ("tokens", tokens), ("prompt_tokens", prompt_tokens),
            ("reply_tokens", tokens - prompt_tokens),
        ):  # fmt: skip
            counts[name] += value


def write_all(folder: Path, sequences: Iterable[Sample], vocab_size: int, **identity: Any) -> None:
    """Write a whole folder at once (tests, conversions)."""
    writer = ShardWriter(folder, vocab_size, identity)
    for sequence in sequences:
        writer.add(sequence)
    writer.save()
