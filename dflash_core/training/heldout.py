"""Prompts that training never sees and the target's greedy replies to them, made once and kept; knows no draft."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dflash_core.errors import TrainingError
from dflash_core.loading import Pair
from dflash_core.training.shards import TokenShards
from dflash_core.training.walk import Replies

BATCH = 256
Prompt = tuple[str, list[int]]


def read_prompts(path: Path, pair: Pair) -> list[Prompt]:
    """(category, token ids) of each line of a chat JSONL file. Raises `TrainingError`."""
    prompts = []
    try:
        lines = path.read_text("utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise TrainingError("A prompt file cannot be read.", f"{path}: {error}.", "Check the path.") from error
    for number, line in enumerate(lines, 1):
        if line.strip():
            prompts.append(_read_line(line, f"{path}, line {number}", path.stem, pair))
    if not prompts:
        raise TrainingError("A prompt file is empty.", f"{path}.", 'Give one {"messages": [...]} a line.')
    return prompts


def _read_line(line: str, where: str, category: str, pair: Pair) -> Prompt:
    try:
        row = json.loads(line)
        messages = row["messages"]
        while messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        ids = pair.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, tokenize=True, return_dict=False, **pair.chat_template_kwargs
        )
        return str(row.get("category", category)), [int(i) for i in ids]
    except (ValueError, KeyError, TypeError, IndexError) as error:
        raise TrainingError(
            "A prompt cannot be read.", f"{where}: {type(error).__name__} {error}.", 'Write {"messages": [...]} a line.'
        ) from error


def data_prompts(shards: TokenShards, ids: Sequence[int]) -> list[Prompt]:
    """The prompts of some of the data's own sequences, which then must not be trained on."""
    found = []
    for index in ids:
        tokens, prompt_length = shards[index]
        found.append((shards.category(index) or "held-out", tokens[:prompt_length].astype(int).tolist()))
    return found


@torch.no_grad()
def greedy_replies(pair: Pair, prompts: Sequence[Prompt], max_new_tokens: int) -> Replies:
    """The target's greedy reply to each prompt, cut after a stop token; batched, padded on the left."""
    model, padding = pair.target.model, pair.stop_token_ids[0] if pair.stop_token_ids else 0
    model.set_attn_implementation("sdpa")
    sequences: list[Any] = [None] * len(prompts)
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i][1]))
    for first in range(0, len(order), BATCH):
        chosen = order[first : first + BATCH]
        width = max(len(prompts[i][1]) for i in chosen)
        ids = torch.full((len(chosen), width), padding)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(chosen):
            ids[row, width - len(prompts[i][1]) :] = torch.tensor(prompts[i][1])
            mask[row, width - len(prompts[i][1]) :] = 1
        output = model.generate(
            ids.to(pair.target.device),
            attention_mask=mask.to(pair.target.device),
            max_new_tokens=max_new_tokens,
            do_sample=False,
            eos_token_id=list(pair.stop_token_ids) or None,
            pad_token_id=padding,
        )[:, width:].cpu()
        for row, i in enumerate(chosen):
            sequences[i] = np.array(prompts[i][1] + _cut(output[row].tolist(), pair.stop_token_ids), np.int64)
    lengths = np.array([len(ids) for _, ids in prompts], np.int32)
    return Replies(sequences, lengths, [category for category, _ in prompts])


def _cut(reply: list[int], stops: Sequence[int]) -> list[int]:
    ends = [i for i, token in enumerate(reply) if token in stops]
    return reply[: ends[0] + 1] if ends else reply


def cached_replies(pair: Pair, prompts: Sequence[Prompt], max_new_tokens: int, path: Path) -> Replies:
    """`greedy_replies`, kept in an .npz file and made again only for other prompts, lengths or targets."""
    what = json.dumps([pair.name, pair.dtype, max_new_tokens, list(pair.stop_token_ids), list(prompts)])
    key = hashlib.sha256(what.encode()).hexdigest()
    if path.exists():
        with np.load(path, allow_pickle=False) as kept:
            if str(kept["key"]) == key:
                sequences = np.split(kept["tokens"], np.cumsum(kept["length"])[:-1])
                return Replies(sequences, kept["prompt_length"], kept["category"].tolist())
    replies = greedy_replies(pair, prompts, max_new_tokens)
    fresh = path.with_name("." + path.name)
    np.savez(
        fresh,
        key=np.array(key),
        tokens=np.concatenate(replies.sequences),
        length=replies.lengths,
        prompt_length=replies.prompt_lengths,
        category=np.array(replies.categories),
    )
    fresh.replace(path)
    return replies
