"""`python -m dflash_core.training.regenerate`: prompts in, the target's own replies out; knows nothing of training.

Replies come from the local device or an OpenAI-compatible server and end in token shards. Interrupt it at any time: the
same command goes on, skips the prompts that are answered and has lost a minute's work or one shard at most.
"""

import argparse
import random
import shutil
import signal
import sys
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from dflash_core.errors import DFlashError, TrainingError
from dflash_core.training.arguments import parse
from dflash_core.training.backends import Backend, open_backend
from dflash_core.training.engine import Job, Reply
from dflash_core.training.meter import Meter
from dflash_core.training.openers import OPENERS, SHARES, Openers, parse_mix, read_openers
from dflash_core.training.prompts import Prompt, Template, Unique, encode, mend_tail, read_prompts
from dflash_core.training.shard_writer import Sample, ShardWriter, no_space
from dflash_core.training.synthesis import Writer, synthesize

SYNTHESIS_SHARE = 0.4
POOL = "prompts.jsonl"


@dataclass
class Tally:
    """What one run did, for the manifest."""

    replies: int = 0
    reply_tokens: int = 0
    greedy: int = 0
    stopped: int = 0
    too_long: int = 0
    by_category: Counter[str] = field(default_factory=Counter)
    tokens_by_category: Counter[str] = field(default_factory=Counter)

    def add(self, reply: Reply) -> None:
        self.replies += 1
        self.reply_tokens += len(reply.tokens)
        self.greedy += reply.job.temperature == 0
        self.stopped += reply.stopped
        self.by_category[reply.job.category] += 1
        self.tokens_by_category[reply.job.category] += len(reply.tokens)


class Clock:
    """Time since the command began and whether its time is up."""

    def __init__(self, max_minutes: float | None) -> None:
        self._start = time.monotonic()
        self._limit_seconds = None if max_minutes is None else 60.0 * max_minutes

    def past(self, share: float = 1.0) -> bool:
        return self._limit_seconds is not None and time.monotonic() - self._start > share * self._limit_seconds


def read_all(paths: Sequence[Path], unique: Unique) -> list[Prompt]:
    """The distinct prompts of some files. Raises `TrainingError` if a file is unreadable or they hold none."""
    prompts = [prompt for path in paths for prompt in read_prompts(path) if unique.take(prompt)]
    if paths and not prompts and not unique.held_out:
        raise TrainingError(
            "There are no prompts.", f"{', '.join(map(str, paths))} is empty.", "Give a file with prompts."
        )
    return prompts


def written_prompts(
    args: argparse.Namespace, backend: Backend, template: Template, clock: Clock, unique: Unique
) -> list[Prompt]:
    """What `--synthesize` asks for; prompts that an earlier run wrote into the output folder are used again."""
    pool = args.output / POOL
    mend_tail(pool)
    written = [prompt for prompt in read_prompts(pool) if unique.take(prompt)] if pool.exists() else []
    missing = args.synthesize - len(written)
    if missing > 0:
        openers = read_openers(args.seed_prompts) if args.seed_prompts else OPENERS
        usual = {name: 1.0 for name in openers} if args.seed_prompts else SHARES
        shares = parse_mix(args.mix, list(openers)) if args.mix else usual
        seed = args.seed + len(written)
        writer = Writer(template, Openers(openers, shares, seed), backend.capacity, seed)
        with Meter("Writing prompts", missing) as meter:
            written += synthesize(
                backend.generate, writer, missing, unique, pool,
                lambda made, reply: meter.show(made, len(reply.tokens)), lambda: clock.past(SYNTHESIS_SHARE),
            )  # fmt: skip
    return written[: args.synthesize]


def mixed(prompts: list[Prompt], args: argparse.Namespace) -> list[Prompt]:
    """Shuffled by the seed, so that a run that ends early still holds every kind."""
    return random.Random(args.seed).sample(prompts, len(prompts))[: args.limit]


def temperature_of(key: int, args: argparse.Namespace) -> float:
    """Greedy or not, decided by the prompt's name so that a resumed run decides alike."""
    return 0.0 if random.Random(f"{args.seed} {key}").random() < args.greedy_fraction else args.temperature


def plan(
    prompts: Sequence[Prompt], template: Template, args: argparse.Namespace, done: set[int], tally: Tally, window: int
) -> Iterator[Job]:
    """Jobs for what is not answered yet, encoded as they are drawn, similar lengths together."""

    def too_long(tokens: int) -> bool:
        tally.too_long += tokens > args.max_prompt
        return tokens > args.max_prompt

    for start in range(0, len(prompts), window):
        part = prompts[start : start + window]
        unanswered = [p for p in part if any(p.key(sample) not in done for sample in range(args.samples))]
        encoded = [e for e in encode(unanswered, template, args.samples, too_long) if e.key not in done]
        for prompt in sorted(encoded, key=lambda e: len(e.ids)):
            yield Job(prompt.key, prompt.ids, temperature_of(prompt.key, args), args.max_reply, prompt.category)


def until(clock: Clock, jobs: Iterable[Job]) -> Iterator[Job]:
    for job in jobs:
        if clock.past():
            return
        yield job


def answer(backend: Backend, jobs: Iterable[Job], total: int, writer: ShardWriter, tally: Tally) -> None:
    """Generate and store; whatever ends this, what was generated is saved."""
    try:
        with Meter("Replies", total) as meter:
            for reply in backend.generate(jobs):
                if len(reply.tokens):
                    tokens = [*reply.job.prompt, *reply.tokens.tolist()]
                    writer.add(
                        Sample(tokens, len(reply.job.prompt), reply.job.key, reply.job.category, reply.job.temperature)
                    )
                    tally.add(reply)
                meter.show(tally.replies, len(reply.tokens))
    finally:
        writer.save()


def need_space(args: argparse.Namespace, sequences: int, token_bytes: int) -> None:
    """Raises `TrainingError` when the longest possible outcome does not fit on the disk."""
    need_bytes = sequences * ((args.max_prompt + args.max_reply) * token_bytes + 28)
    if shutil.disk_usage(args.output).free < need_bytes:
        raise no_space(args.output, need_bytes)


def settings(args: argparse.Namespace) -> dict[str, Any]:
    names = (
        "greedy_fraction",
        "temperature",
        "max_prompt",
        "max_reply",
        "samples",
        "synthesize",
        "mix",
        "limit",
        "seed",
    )
    return {name: getattr(args, name) for name in names} | {"prompts": [path.name for path in args.prompts]}


def run(args: argparse.Namespace) -> dict[str, Any]:
    """The whole command; returns the run's facts as the manifest keeps them."""
    clock, unique, tally = Clock(args.max_minutes), Unique(), Tally()
    unique.excluded = frozenset(prompt.normalised for path in args.exclude for prompt in read_prompts(path))
    prompts = read_all(args.prompts, unique)
    backend = open_backend(args)
    template = Template(backend.tokenizer, backend.template_options)
    identity = {"target": backend.target, "revision": args.revision, "template_sha256": template.sha256}
    writer = ShardWriter(args.output, backend.vocab_size, identity, shard_bytes=int(args.shard_mb * 2**20))
    prompts = mixed(prompts + written_prompts(args, backend, template, clock, unique), args)
    open_jobs = sum(prompt.key(sample) not in writer.done for prompt in prompts for sample in range(args.samples))
    need_space(args, open_jobs, 2 if backend.vocab_size <= 2**16 else 4)
    began = time.monotonic()
    try:
        answer(
            backend,
            until(clock, plan(prompts, template, args, writer.done, tally, backend.window)),
            open_jobs,
            writer,
            tally,
        )
    finally:
        seconds = time.monotonic() - began
        facts = {
            "seconds": round(seconds, 2), "tokens_per_second": round(tally.reply_tokens / max(seconds, 1e-9)),
            **vars(tally), "duplicates": unique.duplicates, "held_out": unique.held_out, "settings": settings(args),
            "backend": backend.facts(),
        }  # fmt: skip
        writer.record_run(**facts)
    if tally.too_long and not tally.replies and tally.too_long == open_jobs // args.samples:
        raise TrainingError(
            "Every prompt is too long.", f"None has {args.max_prompt} tokens or fewer.", "Raise --max-prompt."
        )
    report(writer, facts)
    return facts


def report(writer: ShardWriter, facts: dict[str, Any]) -> None:
    counts = writer.counts()
    print(
        f"{facts['replies']:,} replies, {facts['reply_tokens']:,} tokens in {facts['seconds']:.0f} s "
        f"({facts['tokens_per_second']:,} tokens/s); {facts['too_long']} prompts were too long. "
        f"{writer.folder} now holds {counts['sequences']:,} sequences, {counts['tokens']:,} tokens."
    )


def main(argv: Sequence[str] | None = None) -> int:
    try:
        run(parse(argv))
    except DFlashError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("Interrupted; what was generated is saved. The same command goes on.", file=sys.stderr)
        return 130
    return 0


def _interrupt(*_: Any) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, _interrupt)
    sys.exit(main())
