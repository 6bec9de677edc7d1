"""Makes a pipeline's `Pair` of loaded models and keeps it in a folder; runs no model."""

import json
from pathlib import Path
from typing import Any

from dflash_core.draft_files import write_draft
from dflash_core.errors import LoadError
from dflash_core.loading import Pair, check_fit
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.target_files import context_length, stop_token_ids

INDEX = "model_index.json"
TARGET_FOLDER, DRAFT_FOLDER = "target_model", "draft_model"


def pair_of(name: str, model: Any, draft: DFlashDraftModel | None, tokenizer: Any) -> Pair:
    """A `Pair` of loaded models, proven to fit. Raises `LoadError`."""
    target = model if isinstance(model, Target) else Target(model)
    if draft is not None:
        check_fit(draft.config, target.config)
    return Pair(
        name=name,
        target=target,
        draft=None if draft is None else draft.eval().to(target.device, target.dtype),
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(target, tokenizer),
        context_length=context_length(target, tokenizer),
    )


def save_pair(pair: Pair, folder: Path, scheduler: dict[str, Any]) -> None:
    """Write target and tokenizer, draft, and an index with the scheduler's settings."""
    pair.target.model.save_pretrained(folder / TARGET_FOLDER)
    if pair.tokenizer is not None:
        pair.tokenizer.save_pretrained(folder / TARGET_FOLDER)
    if pair.draft is not None:
        (folder / DRAFT_FOLDER).mkdir(parents=True, exist_ok=True)
        write_draft(folder / DRAFT_FOLDER, pair.draft.config, pair.draft.state_dict())
    index = {"_class_name": "DFlashPipeline", "draft_model": pair.draft is not None, "scheduler": scheduler}
    (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def read_index(folder: Path) -> dict[str, Any] | None:
    """The index of a folder that `save_pair` wrote, None for any other folder. Raises `LoadError`."""
    path = folder / INDEX
    if not path.is_file():
        return None
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
        return {"draft_model": bool(index["draft_model"]), "scheduler": dict(index["scheduler"])}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise LoadError("The saved pipeline cannot be read.", f"'{path}': {error!r}.", "Save it again.") from error
