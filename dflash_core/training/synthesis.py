"""Lets the target write prompts, its chat template opened at the user turn; knows no files but the pool."""

import random
import re
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from dflash_core.errors import TrainingError
from dflash_core.training.engine import Job, Reply
from dflash_core.training.openers import Opener, Openers
from dflash_core.training.prompts import Prompt, Template, Unique, append_prompts, user_prompt

PROMPT_TOKENS = 128
LEAST_TOKENS = 8
TEMPERATURES = (0.6, 1.0)
TRIES_PER_PROMPT = 3
BATCH = 512
_SENTENCE_END = re.compile(r".*[.?!)\]`\"]", re.DOTALL)


class Writer:
    """Turns openers into jobs and their replies into prompts."""

    def __init__(self, template: Template, openers: Openers, capacity: int, seed: int) -> None:
        self._template, self._openers, self._capacity = template, openers, capacity
        self._head = template.open_user_turn()
        self._head_text = self._decode(template.ids([self._head])[0])
        self._random = random.Random(seed)
        self._begun: dict[int, tuple[Opener, list[int]]] = {}
        self.tries = 0

    def jobs(self) -> Iterator[Job]:
        """Endless. Raises `TrainingError` when the rows are too short for the template."""
        while True:
            drawn = [self._openers.draw() for _ in range(BATCH)]
            encoded = self._template.ids([self._head + opener.text for opener in drawn])
            for opener, ids in zip(drawn, encoded, strict=True):
                room = min(PROMPT_TOKENS, self._capacity - len(ids))
                if room < LEAST_TOKENS:
                    raise TrainingError(
                        "There is no room to write prompts.",
                        f"The template and an opener take {len(ids)} of {self._capacity} tokens.",
                        "Raise --max-prompt or --max-reply.",
                    )
                self.tries += 1
                self._begun[self.tries] = opener, ids
                yield Job(self.tries, ids, self._random.uniform(*TEMPERATURES), room, opener.category)

    def prompt(self, reply: Reply) -> Prompt | None:
        """The prompt that an opener and the target's words make; None if it is not worth asking."""
        opener, ids = self._begun.pop(reply.job.key)
        text = self._decode([*ids, *reply.tokens.tolist()]).removeprefix(self._head_text).strip()
        if not reply.stopped:
            cut = _SENTENCE_END.match(text)
            text = cut.group() if cut else ""
        wrote_something = len(text) >= len(opener.text.strip()) + 8
        return user_prompt(text, opener.category) if wrote_something and "<|" not in text else None

    def _decode(self, ids: list[int]) -> str:
        return str(self._template.tokenizer.decode(ids, skip_special_tokens=True))


def synthesize(
    generate: Callable[[Iterable[Job]], Iterator[Reply]],
    writer: Writer,
    count: int,
    unique: Unique,
    pool: Path,
    on_prompt: Callable[[int, Any], None],
    stop: Callable[[], bool],
) -> list[Prompt]:
    """Up to `count` new prompts, each appended to `pool` (JSONL) soon after it is written.

    Ends early when `stop()` says so or the target repeats itself: `TRIES_PER_PROMPT` tries a prompt are made at most.
    """
    made: list[Prompt] = []
    saved = 0

    def needed() -> Iterator[Job]:
        for job in writer.jobs():
            if len(made) >= count or writer.tries > TRIES_PER_PROMPT * count + BATCH or stop():
                return
            yield job

    try:
        for reply in generate(needed()):
            prompt = writer.prompt(reply)
            if prompt is not None and len(made) < count and unique.take(prompt):
                made.append(prompt)
            if len(made) - saved >= BATCH:
                append_prompts(pool, made[saved:])
                saved = len(made)
            on_prompt(len(made), reply)
    finally:
        append_prompts(pool, made[saved:])
    return made
