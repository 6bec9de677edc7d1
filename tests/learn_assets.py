"""Who attends to whom, from the draft model's own rule: `python -m tests.learn_assets` writes the tour's picture."""

import json
from pathlib import Path
from typing import Any

import torch

from dflash_core.masks import TrainingLayout, inference_mask, packed_causal

FILE = Path(__file__).resolve().parent.parent / "assets" / "learn" / "attention.json"
CONTEXT, SLOTS = 6, 5
TRAINED_CONTEXT, TRAINED_BLOCK, ANCHORS = 8, 3, (2, 5)


def pictures() -> dict[str, Any]:
    """Three masks as rows of 0 and 1: one row per query, one sign per key."""
    return {
        "draft": {"context": CONTEXT, "slots": SLOTS, "rows": _rows(_draft())},
        "target": {"context": CONTEXT, "slots": SLOTS, "rows": _rows(_target())},
        "training": {
            "context": TRAINED_CONTEXT,
            "block": TRAINED_BLOCK,
            "anchors": list(ANCHORS),
            "rows": _rows(_training()),
        },
    }


def _draft() -> torch.Tensor:
    """One block behind its context, as it is drafted."""
    context, slots = torch.arange(CONTEXT)[None], CONTEXT + torch.arange(SLOTS)[None]
    return inference_mask(slots, context, window=None)[0, 0]


def _target() -> torch.Tensor:
    """The same tokens in the target's verify pass; only the block's rows are new."""
    index = torch.arange(CONTEXT + SLOTS)[None]
    return packed_causal(torch.zeros_like(index), index, use_flex=False)[0, 0][CONTEXT:]


def _training() -> torch.Tensor:
    """Two blocks of one text, filled in one pass."""
    index = torch.arange(TRAINED_CONTEXT)[None]
    layout = TrainingLayout(torch.zeros_like(index), index, torch.tensor([ANCHORS]), TRAINED_BLOCK)
    return layout.dense()[0, 0]


def _rows(mask: torch.Tensor) -> list[str]:
    return ["".join("01"[int(cell)] for cell in row) for row in mask]


def text() -> str:
    return json.dumps(pictures(), indent=1) + "\n"


if __name__ == "__main__":
    FILE.parent.mkdir(exist_ok=True)
    FILE.write_text(text(), encoding="utf-8")
