"""A pair that says what a test tells it to, at a set pace, for tests of the app; knows no weights and no widget."""

import itertools
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

from dflash_core import DFlashError, Finish, Prefill, SamplingParams, Step

SPECIAL = ("<|im_start|>", "<|im_end|>")
TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
MERGES = "t h|th e|i n|e r|o n|Ġ a|Ġ the|r e|a n|an d|Ġ and|e s|o r|l l|w o|wo r|wor d|Ġ word"
DEFAULT_REPLY = "The sea is wide and the wind is cold, and the word of the day is patience. " * 4


def full_tokenizer() -> Any:
    """Byte-level BPE over all 256 bytes, so that every text there is survives the trip."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    merges = [tuple(merge.split(" ")) for merge in MERGES.split("|")]
    words = [*SPECIAL, *sorted(pre_tokenizers.ByteLevel.alphabet()), *("".join(merge) for merge in merges)]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=merges))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(word, special=True) for word in SPECIAL])
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, eos_token="<|im_end|>", bos_token="<|im_start|>", chat_template=TEMPLATE,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip


class Stage:
    """Stands in for `load_pair` and `decode`. A message "say X" is answered with X, any other with `reply`.

    Counts what a test may ask of: `live` decodes now, `most_live` ever at once, `events` of the last one.
    """

    def __init__(self, *, steps_per_second: float = 80.0, block_size: int = 8, load_seconds: float = 0.0) -> None:
        self.tokenizer = full_tokenizer()
        self.steps_per_second, self.block_size, self.load_seconds = steps_per_second, block_size, load_seconds
        self.reply = DEFAULT_REPLY
        self.load_error: DFlashError | None = None
        self.loadable: set[str] = set()
        self.step_error: tuple[int, DFlashError] | None = None
        self.loads: list[tuple[str, Any, Any]] = []
        self.events: list[Any] = []
        self.prompts: list[str] = []
        self.live = self.most_live = 0
        self.finished_at: float | None = None
        self._lock = threading.Lock()

    def load(self, name: str, *, target: Any = None, draft: Any = None, progress: Any = None, **_: Any) -> Any:
        self.loads.append((name, target, draft))
        for part in range(1, 5):
            progress("Reading weights", part / 4)
            time.sleep(self.load_seconds / 4)
        if self.load_error is not None and name not in self.loadable:
            raise self.load_error
        return SimpleNamespace(
            name=name, tokenizer=self.tokenizer, draft=SimpleNamespace(), block_size=self.block_size, draft_kind="DFlash",
            fits_transformers=True, place="cpu", dtype="float32", context_length=100_000, chat_template_kwargs={}, stop_token_ids=(1,),
        )  # fmt: skip

    def decode(self, pair: Any, ids: Sequence[int], params: SamplingParams, *, drafting: bool = True) -> Iterator[Any]:
        text = self.tokenizer.decode(list(ids))
        self.prompts.append(text)
        question = text.rsplit("<|im_start|>user\n", 1)[-1].split("<|im_end|>")[0]
        reply = question.removeprefix("say ") if question.startswith("say ") else self.reply
        tokens = self.tokenizer(reply, add_special_tokens=False)["input_ids"] + [1]
        k = (params.block_size or self.block_size) - 1 if drafting else 0
        # The engine's own warm-up is no run of anybody.
        warming = "Count to ten." in text
        with self._lock:
            self.live += not warming
            self.most_live = max(self.most_live, self.live)
        try:
            yield from self._play(tokens[: params.max_new_tokens], k, len(ids), warming)
        finally:
            with self._lock:
                self.live -= not warming

    def _play(self, tokens: list[int], k: int, prompt_tokens: int, warming: bool) -> Iterator[Any]:
        self.events = []
        yield self._seen(Prefill(prompt_tokens, tokens[0], 0.02))
        start, position, index = time.perf_counter(), 1, 0
        while position < len(tokens):
            step = scripted_step(tokens, position, min(k, len(tokens) - position - 1), index)
            if self.step_error is not None and index == self.step_error[0] and not warming:
                raise self.step_error[1]
            pause = start + (index + 1) / self.steps_per_second - time.perf_counter()
            if pause > 0 and not warming:
                time.sleep(pause)
            yield self._seen(step)
            position, index = position + len(step.committed), index + 1
        self.finished_at = time.time()
        reason = "stop" if tokens[-1] == 1 else "length"
        yield self._seen(Finish(reason, len(tokens), index, time.perf_counter() - start + 0.02))

    def _seen(self, event: Any) -> Any:
        self.events.append(event)
        return event


_ACCEPTED = (3, 5, 0, 7, 2, 4, 1, 6)


def scripted_step(tokens: Sequence[int], position: int, k: int, index: int) -> Step:
    """The step that commits `tokens[position:]`, with a varied number of drafted tokens accepted."""
    future = list(itertools.islice(itertools.chain(tokens[position:], itertools.repeat(0)), k + 1))
    accepted = min(_ACCEPTED[index % len(_ACCEPTED)], k)
    drafted = [token if i < accepted else (token + 7) % 200 + 2 for i, token in enumerate(future[:k])]
    committed = tuple(tokens[position : position + accepted + 1])
    return Step(
        index=index, position=position, anchor=tokens[position - 1], drafted=tuple(drafted), posterior=tuple(future),
        accepted=accepted, correction=future[accepted], committed=committed,
        draft_confidence=tuple(round(0.9 * 0.9**i, 3) for i in range(k)),
        target_confidence=tuple(round(0.95 * 0.95**i, 3) for i in range(k + 1)),
        draft_seconds=0.004 if k else 0.0, verify_seconds=0.009,
    )  # fmt: skip


@contextmanager
def paced(stage: Stage, steps_per_second: float) -> Iterator[None]:
    """The stage decodes at another pace for a while."""
    before, stage.steps_per_second = stage.steps_per_second, steps_per_second
    try:
        yield
    finally:
        stage.steps_per_second = before
