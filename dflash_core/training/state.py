"""Checkpoints: the draft in the public layout, and a run's state apart from it; knows no loop.

    output/
      last/  best/      config.json, model.safetensors (bfloat16), README.md: what is shipped and loaded
      state/step-N/     weights.safetensors (float32), optimizer.safetensors, state.json: what a resumed run needs

A folder appears whole or not at all: it is written beside its place and renamed.
"""

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from dflash_core.config import DraftConfig
from dflash_core.draft_files import write_draft
from dflash_core.errors import TrainingError
from dflash_core.training.report import shown_bytes

STATE_BYTES_PER_PARAMETER = 16


def save_draft(folder: Path, config: DraftConfig, weights: Mapping[str, Tensor], card: str) -> None:
    """Write a draft checkpoint in the public layout; the weights are rounded to bfloat16. Raises `TrainingError`."""
    with _writing(folder) as fresh:
        write_draft(fresh, config, {name: tensor.detach().to(torch.bfloat16) for name, tensor in weights.items()})
        (fresh / "README.md").write_text(card, "utf-8")


def copy_draft(source: Path, goal: Path) -> None:
    with _writing(goal) as fresh:
        shutil.copytree(source, fresh, dirs_exist_ok=True)


def save_state(
    output: Path, step: int, weights: Mapping[str, Tensor], optimizers: Mapping[str, torch.optim.Optimizer],
    facts: dict[str, Any],
) -> None:  # fmt: skip
    """Write everything a resumed run needs and drop older states. Raises `TrainingError` when the disk is full."""
    goal = output / "state" / f"step-{step:08d}"
    with _writing(goal) as fresh:
        save_file(
            {name: tensor.detach().contiguous() for name, tensor in weights.items()}, fresh / "weights.safetensors"
        )
        moments = {
            f"{name}.{index}.{key}": value.detach().contiguous()
            for name, optimizer in optimizers.items()
            for index, entry in optimizer.state_dict()["state"].items()
            for key, value in entry.items()
        }
        save_file(moments, fresh / "optimizer.safetensors")
        (fresh / "state.json").write_text(json.dumps(facts, indent=2) + "\n", "utf-8")
    for old in _steps(output):
        if old != goal:
            shutil.rmtree(old, ignore_errors=True)


def find_state(output: Path) -> tuple[Path, dict[str, Any]] | None:
    """The newest whole state under the output folder and its facts, None for a fresh run.

    A draft that a kill caught between the two renames of `_put` is put back first.
    """
    for old in output.glob(".*.old"):
        goal = output / old.name.removeprefix(".").removesuffix(".old")
        if not goal.exists():
            # Of several processes one is first.
            with suppress(FileNotFoundError):
                old.rename(goal)
    steps = _steps(output)
    if not steps:
        return None
    return steps[-1], json.loads((steps[-1] / "state.json").read_text("utf-8"))


def load_optimizers(folder: Path, optimizers: Mapping[str, torch.optim.Optimizer]) -> None:
    moments = load_file(folder / "optimizer.safetensors")
    for name, optimizer in optimizers.items():
        entries: dict[int, dict[str, Tensor]] = {}
        for full, value in moments.items():
            owner, index, key = full.split(".", 2)
            if owner == name:
                entries.setdefault(int(index), {})[key] = value
        optimizer.load_state_dict({**optimizer.state_dict(), "state": entries})


def check_space(output: Path, parameters: int) -> None:
    """Raises `TrainingError` when two states and two drafts would not fit on the disk."""
    needed, free = 2 * STATE_BYTES_PER_PARAMETER * parameters, shutil.disk_usage(output).free
    if free < needed:
        raise TrainingError(
            "There is no room for checkpoints.",
            f"{shown_bytes(needed)} are needed, {shown_bytes(free)} are free in {output}.",
            "Free some space or choose another --output.",
        )


def check_same_run(found: Mapping[str, Any], wanted: Mapping[str, Any], output: Path) -> None:
    """Raises `TrainingError` naming the first setting in which the state in the folder differs from this run."""
    for name in sorted(set(found) | set(wanted)):
        if found.get(name) != wanted.get(name):
            raise TrainingError(
                "The output folder holds the checkpoint of another run.",
                f"In {output} '{name}' was {found.get(name)}, now it is {wanted.get(name)}.",
                "Choose another --output, or repeat the first command to resume.",
            )


def check_free(output: Path) -> None:
    """Raises `TrainingError` when the folder holds a draft that a fresh run would overwrite."""
    for name in ("best", "last"):
        if (output / name).exists():
            raise TrainingError(
                "The output folder holds a trained draft without the state that would continue it.",
                f"'{output / name}' would be overwritten.",
                "Choose another --output; --init-from starts from that draft.",
            )


def _steps(output: Path) -> list[Path]:
    return sorted(path for path in (output / "state").glob("step-*") if (path / "state.json").is_file())


@contextmanager
def _writing(goal: Path) -> Iterator[Path]:
    """A fresh folder that takes the goal's place at the end. Raises `TrainingError` when the disk is full."""
    fresh = goal.with_name(f".{goal.name}.writing")
    try:
        shutil.rmtree(fresh, ignore_errors=True)
        fresh.mkdir(parents=True)
        yield fresh
        _put(fresh, goal)
    except (OSError, SafetensorError) as error:
        raise TrainingError(
            "A checkpoint cannot be saved.", f"{goal}: {error}.", "Free some space and run the same command again."
        ) from error


def _put(fresh: Path, goal: Path) -> None:
    for path in fresh.iterdir():
        with path.open("rb") as file:
            os.fsync(file.fileno())
    old = goal.with_name(f".{goal.name}.old")
    shutil.rmtree(old, ignore_errors=True)
    if goal.exists():
        goal.rename(old)
    fresh.rename(goal)
    shutil.rmtree(old, ignore_errors=True)
