"""Batched decoding of many prompts on one device; knows token ids only, no text, no files.

A fixed number of rows decode together, one token each per step; a row whose reply ended takes the next prompt. The step
is one captured CUDA graph on a GPU and plain eager code elsewhere, the same code. All of a prompt but its last token is
prefilled; the last one enters as the row's current token, so that every reply token comes from the same step.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dflash_core.errors import TrainingError
from dflash_core.target import cache_argument
from dflash_core.training import slot_kernel
from dflash_core.training.slots import Fill, Slots, use_slots

WIDTH_STEP = 32
PREFILL_TOKENS = 65_536
STEPS_PER_LOOK = 16
MAX_ROWS = 2048


@dataclass(frozen=True, slots=True)
class Job:
    """One reply to make. `key` and `category` are passed through; temperature 0 is greedy."""

    key: int
    prompt: Sequence[int]
    temperature: float
    max_new_tokens: int
    category: str = "other"


@dataclass(frozen=True, slots=True)
class Reply:
    """`tokens` int32, the stop token included; `stopped` is False where the length limit cut it."""

    job: Job
    tokens: NDArray[np.int32]
    stopped: bool


def pick(logits: Tensor, temperature: Tensor) -> Tensor:
    """Sample from softmax(logits / temperature), argmax where it is 0: logits [B, V], temperature [B] -> [B].

    argmax(logits + temperature * Gumbel noise) is exactly that, and the noise vanishes for greedy rows.
    """
    scores = logits.float()
    noise = torch.empty_like(scores).exponential_().clamp_min_(1e-30).log_()
    return torch.addcmul(scores, noise, temperature[:, None], value=-1).argmax(-1)


class Engine:
    """Owns the rows' state on the device. The model is switched to slot attention and stays so."""

    def __init__(
        self, model: Any, stop_token_ids: Sequence[int], rows: int, capacity: int, seed: int = 0, eager: bool = False
    ) -> None:
        """`capacity`: prompt plus reply tokens of a row. Raises `TrainingError` for unsuited targets and no memory.

        The device's default random generator is seeded: it is the one that captured graphs advance.
        """
        assert rows >= 1 and capacity >= 2
        torch.manual_seed(seed)
        self.model, self.device, self.rows = model, model.device, rows
        # SDPA's fast kernels want aligned masks.
        self.capacity = -(-capacity // 16) * 16
        use_slots(model)
        self._cache_argument = cache_argument(model)
        self.attention = slot_kernel.check(self.device, model.dtype, head_size(model))
        self.stop_ids = tuple(stop_token_ids)
        self._stops = torch.tensor(self.stop_ids or (-1,), device=self.device)
        self._token, self._position, self._last = (
            torch.zeros(rows, dtype=torch.long, device=self.device) for _ in range(3)
        )
        self._temperature = torch.zeros(rows, device=self.device)
        self._running = torch.zeros(rows, dtype=torch.bool, device=self.device)
        self._history = torch.zeros((rows, self.capacity), dtype=torch.int32, device=self.device)
        self._slots = Slots(rows, self.capacity, self._position)
        self._owners: list[Job | None] = [None] * rows
        self._graph: Any = None
        self.steps = 0
        with self._memory_errors():
            self._prepare(eager)

    @property
    def device_name(self) -> str:
        return torch.cuda.get_device_name(self.device) if self.device.type == "cuda" else self.device.type

    @property
    def graphed(self) -> bool:
        return self._graph is not None

    def generate(self, jobs: Iterable[Job]) -> Iterator[Reply]:
        """Answer every job, in the order replies end; jobs are drawn as rows come free, so ending them early drains.

        Prompts prefilled together should be alike in length: sort them in windows.
        """
        waiting, ready, replies = iter(jobs), deque[Job](), list[Reply]()
        with self._memory_errors():
            while True:
                free = [row for row, owner in enumerate(self._owners) if owner is None]
                ready.extend(islice(waiting, max(0, len(free) - len(ready))))
                fresh = [ready.popleft() for _ in range(min(len(free), len(ready)))]
                self._fill(free[: len(fresh)], fresh)
                busy = any(owner is not None for owner in self._owners)
                if busy:
                    self._run()
                # A GPU is at work now: the caller's handling and the next prompts' encoding cost no time.
                yield from replies
                if not busy:
                    return
                ready.extend(islice(waiting, max(0, self.rows // 8 - len(ready))))
                replies = self._harvest()

    @torch.inference_mode()
    def _fill(self, rows: Sequence[int], jobs: Sequence[Job]) -> None:
        """Prefill the prompts of `jobs` into `rows`, few enough at a time to bound the memory."""
        for job in jobs:
            assert len(job.prompt) >= 1 and job.max_new_tokens >= 1
            assert len(job.prompt) + job.max_new_tokens <= self.capacity
        while jobs:
            width = min(self.capacity, -(-max(len(job.prompt) for job in jobs) // WIDTH_STEP) * WIDTH_STEP)
            count = max(1, PREFILL_TOKENS // width)
            self._prefill(rows[:count], jobs[:count], width)
            rows, jobs = rows[count:], jobs[count:]

    def _prefill(self, rows: Sequence[int], jobs: Sequence[Job], width: int) -> None:
        ids = np.zeros((len(jobs), self.capacity), np.int64)
        for line, job in zip(ids, jobs, strict=True):
            line[: len(job.prompt)] = job.prompt
        prompts, where = self._tensor(ids), self._tensor(rows)
        self.model(
            input_ids=prompts[:, :width],
            position_ids=torch.arange(width, device=self.device)[None],
            use_cache=True,
            logits_to_keep=1,
            **{self._cache_argument: Fill(self._slots, where)},
        )
        ends = self._tensor([len(job.prompt) - 1 for job in jobs])
        self._history[where] = prompts.int()
        self._token[where] = prompts.gather(1, ends[:, None])[:, 0]
        self._position[where] = ends
        self._last[where] = ends + self._tensor([job.max_new_tokens for job in jobs])
        self._temperature[where] = torch.tensor([job.temperature for job in jobs], device=self.device)
        self._running[where] = True
        for row, job in zip(rows, jobs, strict=True):
            self._owners[row] = job

    def _step(self) -> None:
        """Every running row decodes one token; the others repeat theirs in place, which changes nothing."""
        logits = self.model(
            input_ids=self._token[:, None],
            position_ids=self._position[:, None],
            use_cache=True,
            slot_position=self._position,
            **{self._cache_argument: self._slots},
        ).logits[:, -1]
        token = torch.where(self._running, pick(logits, self._temperature), self._token)
        self._token.copy_(token)
        self._position.add_(self._running)
        self._history.scatter_(1, self._position[:, None], token[:, None].int())
        stopped = (token[:, None] == self._stops).any(1)
        self._running.logical_and_(~stopped & (self._position < self._last))

    @torch.inference_mode()
    def _run(self) -> None:
        """A few steps between two looks at the rows: looking makes a GPU wait."""
        steps = STEPS_PER_LOOK if self.graphed else 1
        for _ in range(steps):
            self._graph.replay() if self.graphed else self._step()
        self.steps += steps

    @torch.inference_mode()
    def _harvest(self) -> list[Reply]:
        """Take the replies of rows that ended and free these rows."""
        running = self._running.tolist()
        ended = [row for row, owner in enumerate(self._owners) if owner is not None and not running[row]]
        if not ended:
            return []
        where = self._tensor(ended)
        history, ends = self._history[where].cpu().numpy(), self._position[where].tolist()
        replies = []
        for row, line, end in zip(ended, history, ends, strict=True):
            job = self._owners[row]
            assert job is not None
            self._owners[row] = None
            tokens = line[len(job.prompt) : end + 1].copy()
            replies.append(Reply(job, tokens, stopped=int(tokens[-1]) in self.stop_ids))
        return replies

    @torch.inference_mode()
    def _prepare(self, eager: bool) -> None:
        """Allocate the slots and, on CUDA, capture the step. No row runs, so nothing of this shows later."""
        self._prefill([0], [Job(0, [0, 0], 0.0, 1)], min(self.capacity, WIDTH_STEP))
        self._owners[0] = None
        self._running.zero_()
        if self.device.type == "cuda" and not eager:
            self._capture()
        else:
            self._step()

    def _capture(self) -> None:
        """Record the step once, so that a replay costs the GPU's time only and not Python's."""
        torch.cuda.set_device(self.device)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(3):
                self._step()
        torch.cuda.current_stream().wait_stream(side)
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._step()
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise TrainingError(
                "This target's decode step cannot be captured as a graph.",
                f"{str(error).splitlines()[0][:200]}",
                "Use --eager.",
            ) from error
        self._graph = graph

    @contextmanager
    def _memory_errors(self) -> Iterator[None]:
        try:
            yield
        except torch.OutOfMemoryError as error:
            raise TrainingError(
                "The device has too little memory for this batch.",
                f"{self.rows} rows of {self.capacity} tokens do not fit.",
                "Lower --batch, --max-prompt or --max-reply.",
            ) from error

    def _tensor(self, values: Any) -> Tensor:
        return torch.as_tensor(values, dtype=torch.long).to(self.device, non_blocking=True)


def head_size(model: Any) -> int:
    config = model.config.get_text_config()
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def slot_bytes(model: Any) -> int:
    """Bytes of keys and values per token and row, by the target's configuration."""
    config = model.config.get_text_config()
    heads = getattr(config, "num_key_value_heads", None) or config.num_attention_heads
    return int(2 * config.num_hidden_layers * heads * head_size(model) * model.dtype.itemsize)


def fitting_rows(model: Any, capacity: int) -> int:
    """A batch size for the device: what fits beside the weights, logits and prefill on CUDA, a handful elsewhere."""
    if model.device.type != "cuda":
        return 16
    free_bytes, _ = torch.cuda.mem_get_info(model.device)
    vocab = model.config.get_text_config().vocab_size
    # Logits in the model's dtype, their float32 copy and the noise, with room for one more.
    row_bytes = capacity * slot_bytes(model) + 14 * vocab
    rows = int(0.8 * free_bytes) // row_bytes
    return max(8, min(MAX_ROWS, rows // 8 * 8))
