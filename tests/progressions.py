"""A tiny world in which a draft can be trained in seconds: chats that count through letters; proves nothing itself.

The prompt "C3" is answered C F I L O …, sixteen letters in a circle. The next letter needs the step, which only the
prompt tells, so a draft that is blind to its context, sees another document or is a slot off cannot guess.
"""

import functools
import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate.state import AcceleratorState, GradientState

from dflash_core.prompts import chat_ids
from tests.tiny import tiny_llama, tiny_tokenizer, write_target

LETTERS = "ABCDEFGHIJKLMNOP"
STEPS = (1, 3, 5, 7)
REPLY_TOKENS = 24


def prompt(start: int, step: int) -> str:
    return f"{LETTERS[start]}{step}"


def messages(start: int, step: int) -> list[dict[str, str]]:
    return [{"role": "user", "content": prompt(start, step)}]


@functools.cache
def letter_ids() -> tuple[int, ...]:
    return tuple(tiny_tokenizer().convert_tokens_to_ids(list(LETTERS)))


def prompt_ids(start: int, step: int) -> list[int]:
    return chat_ids(tiny_tokenizer(), messages(start, step))


def reply_ids(start: int, step: int, tokens: int = REPLY_TOKENS) -> list[int]:
    return [letter_ids()[(start + step * place) % len(LETTERS)] for place in range(tokens)]


def cases() -> Iterator[tuple[int, int]]:
    for step in STEPS:
        for start in range(len(LETTERS)):
            yield start, step


@functools.cache
def counting_target() -> Any:
    """A Llama of three layers that has learnt to count."""
    rows = torch.tensor([prompt_ids(*case) + reply_ids(*case) for case in cases()])
    first = rows.shape[1] - REPLY_TOKENS
    with torch.random.fork_rng(), one_thread():
        torch.manual_seed(0)
        model = tiny_llama(hidden_size=64, intermediate_size=128, num_hidden_layers=4, head_dim=16).train()
        for weight in model.parameters():
            if weight.dim() > 1:
                torch.nn.init.normal_(weight, std=0.06)
        optimizer = torch.optim.AdamW(model.parameters(), 3e-3)
        for _ in range(200):
            logits = model(rows[:, :-1]).logits[:, first - 1 :]
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), rows[:, first:].flatten())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            if loss.item() < 0.01:
                break
    return model.eval()


def write_world(folder: Path) -> Path:
    """`target/` and `data.npz` under the folder; each counting chat is in the data once."""
    write_target(folder / "target", counting_target())
    sequences = [(prompt_ids(*case), reply_ids(*case)) for case in cases()]
    write_data(folder / "data.npz", sequences)
    return folder


def write_data(path: Path, sequences: list[tuple[list[int], list[int]]]) -> None:
    np.savez(
        path,
        tokens=np.array([token for ids, reply in sequences for token in ids + reply], np.uint16),
        length=np.array([len(ids) + len(reply) for ids, reply in sequences], np.int32),
        prompt_length=np.array([len(ids) for ids, _ in sequences], np.int32),
    )


def write_prompts(path: Path) -> Path:
    """Each chat as a line of a prompt file, its step as the category."""
    lines = [{"messages": messages(*case), "category": f"step {case[1]}"} for case in cases()]
    path.write_text("\n".join(map(json.dumps, lines)))
    return path


@functools.cache
def _folder() -> tempfile.TemporaryDirectory[str]:
    return tempfile.TemporaryDirectory(prefix="counting-")


@functools.cache
def world() -> Path:
    """A folder with `target/`, `data.npz` and `prompts.jsonl`, made once and removed at exit."""
    folder = write_world(Path(_folder().name))
    write_prompts(folder / "prompts.jsonl")
    return folder


def options(output: Path, **changes: Any) -> list[str]:
    """The command line of a short training run in the world; `changes` by the options' own names, None drops one."""
    values = {
        "target": world() / "target", "data": world() / "data.npz", "output": output,
        "device": "cpu", "dtype": "float32", "layers": 2, "features": 2, "block_size": 6, "context_tokens": 256,
        "anchors": 128, "held_out": 8, "held_out_tokens": REPLY_TOKENS, "max_steps": 150,
        "evaluate_every": 50, "save_every": 50, "log_every": 10,
    } | changes  # fmt: skip
    line = []
    for name, value in values.items():
        flag = f"--{name.replace('_', '-')}"
        if value is True:
            line.append(flag)
        elif value is not None:
            line += [flag, *map(str, value if isinstance(value, list | tuple) else [value])]
    return line


@functools.cache
def trained() -> Path:
    """The output folder of one whole training run of the default recipe."""
    from dflash_core.training import train

    output = world() / "trained"
    with one_thread():
        assert train.main(options(output)) == 0
    return output


@contextmanager
def one_thread() -> Iterator[None]:
    """Small matrices gain nothing from more threads, and the order of sums must not depend on the machine."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def fresh_process() -> Iterator[None]:
    """What a new process would start with."""
    AcceleratorState._reset_state(reset_partial_state=True)
    GradientState._reset_state()
    with one_thread():
        yield
