"""`python -m dflash_core.training.evaluate`: how many tokens a draft gets accepted, by the real loop; trains nothing.

Greedy replies are walked once more by teacher forcing, as the trainer does while it runs. The two count the same passes
up to a reply's last one, which the loop shortens at the length limit; more than that means that one of them is wrong.
"""

import argparse
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass, field, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tqdm.auto import tqdm

from dflash_core.bench import carry_out, check_lengths, device_name
from dflash_core.config import SamplingParams
from dflash_core.decode import decode, default_drafter
from dflash_core.errors import PromptError, TrainingError
from dflash_core.events import Prefill, Step
from dflash_core.generate import add_pair_arguments, load_from
from dflash_core.loading import Pair
from dflash_core.masks import TILE
from dflash_core.prompts import ChatPrompt, chat_ids, read_prompts, spread
from dflash_core.tally import Tally
from dflash_core.training.evaluate_report import VERSION, measured, table, with_teacher_forcing
from dflash_core.training.features import TargetReader
from dflash_core.training.walk import OPENING, Replies, Score, score

# Above so many slots a dense mask costs too much memory.
DENSE_SLOTS = 16384


@dataclass(frozen=True, slots=True)
class Setting:
    """What the same prompts are decoded with."""

    temperature: float
    block_size: int


@dataclass(slots=True)
class Reply:
    """One decoded reply.

    opening, later  its passes, split by whether the anchor is one of its first 64 tokens
    reached_at      for each drafted slot, in how many blocks all slots before it were accepted
    """

    ids: list[int] = field(default_factory=list)
    tally: Tally = field(default_factory=Tally)
    opening: Tally = field(default_factory=Tally)
    later: Tally = field(default_factory=Tally)
    reached_at: Counter[int] = field(default_factory=Counter)


def parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        "python -m dflash_core.training.evaluate", description="Measure a draft's acceptance length on prompts."
    )
    add_pair_arguments(parser)
    add = parser.add_argument_group("the evaluation").add_argument
    add("--prompts", required=True, nargs="+", metavar="FILE", help="JSONL: 'messages' and perhaps 'category' per line")
    add("--limit", type=int, metavar="N", help="so many prompts, taken in turn from each category")
    add("--max-new-tokens", type=int, default=256, metavar="N", help="default: %(default)s")
    add("--temperature", type=float, nargs="+", default=[0.0], metavar="T", help="one or several; default: 0, greedy")
    add("--block-size", type=int, nargs="+", default=[], metavar="K", help="one or several (default: the draft's)")
    add("--acceptance", choices=("match", "rejection"), default="match", help="the rule above temperature 0")
    add("--seed", type=int, default=0, help="for temperatures above 0; the n-th prompt adds n (default: %(default)s)")
    add("--json", metavar="FILE", help="also write the numbers here")
    return parser


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns its exit code: 0, 1 after an error of the user's, 130 after Ctrl-C before any result."""
    return carry_out(run, table, parser().parse_args(arguments), "setting")


def run(options: argparse.Namespace) -> dict[str, Any]:
    """Decode, walk and report as the options say. Raises `DFlashError`."""
    if options.limit is not None and options.limit < 1:
        raise PromptError("A setting is out of range.", f"'limit' is {options.limit}.", "It must be at least 1.")
    temperatures = dict.fromkeys(options.temperature)
    params = SamplingParams(max_new_tokens=options.max_new_tokens, acceptance=options.acceptance)
    for temperature in temperatures:
        replace(params, temperature=temperature, seed=options.seed)
    prompts = spread([prompt for path in options.prompts for prompt in _categorised(path)], options.limit)
    pair = load_from(options)
    sizes = _checked_sizes(pair, options.block_size)
    ids = [chat_ids(pair.tokenizer, prompt.messages, **pair.chat_template_kwargs) for prompt in prompts]
    check_lengths(pair, ids)
    settings = [Setting(*values) for values in product(temperatures, sizes)]
    found = decode_all(pair, ids, settings, params, options.seed)
    return {
        "version": VERSION,
        "pair": pair.name,
        "draft": options.draft,
        "device": str(pair.target.device),
        "device_name": device_name(pair),
        "dtype": pair.dtype,
        "prompts": len(ids),
        "max_new_tokens": params.max_new_tokens,
        "acceptance": params.acceptance,
        "seed": options.seed,
        "results": list(_results(pair, ids, [str(prompt.category) for prompt in prompts], found)),
    }


def _categorised(path: str) -> list[ChatPrompt]:
    """A file's prompts; those without a category get the file's name."""
    return [replace(prompt, category=prompt.category or Path(path).stem) for prompt in read_prompts(path)]


def _checked_sizes(pair: Pair, wanted: Sequence[int]) -> list[int]:
    """Block sizes without repeats, the draft's own where none is asked for. Raises `PromptError`."""
    for size in wanted or [None]:
        default_drafter(pair, SamplingParams(block_size=size), drafting=True)
    assert pair.block_size is not None
    return list(dict.fromkeys(wanted)) or [pair.block_size]


def decode_all(
    pair: Pair, prompts: Sequence[Sequence[int]], settings: Sequence[Setting], params: SamplingParams, seed: int
) -> dict[Setting, list[Reply]]:
    """A reply to each prompt under each setting. Ctrl-C keeps the settings that are complete, if there are any."""
    done: dict[Setting, list[Reply]] = {}
    with tqdm(total=len(settings) * len(prompts), unit="reply", leave=False, disable=None) as bar:
        for setting in settings:
            own = replace(params, temperature=setting.temperature, block_size=setting.block_size)
            replies, total = [], Tally()
            try:
                for number, ids in enumerate(prompts):
                    replies.append(decode_reply(pair, ids, replace(own, seed=seed + number)))
                    total.merge([replies[-1].tally])
                    bar.set_postfix_str("" if total.tau is None else f"τ {total.tau:.2f}")
                    bar.update()
            except KeyboardInterrupt:
                if not done:
                    raise
                break
            done[setting] = replies
    return done


def decode_reply(pair: Pair, ids: Sequence[int], params: SamplingParams) -> Reply:
    """One reply by the real loop."""
    reply = Reply()
    with closing(decode(pair, ids, params)) as events:
        for event in events:
            reply.tally.add(event)
            match event:
                case Prefill():
                    reply.ids.append(event.first_token)
                case Step():
                    # The anchor is the token before those committed.
                    (reply.opening if event.position - 1 < OPENING else reply.later).add(event)
                    reply.reached_at.update(range(min(event.accepted + 1, len(event.drafted))))
                    reply.ids.extend(event.committed)
    return reply


def teacher_forced(
    pair: Pair, prompts: Sequence[Sequence[int]], replies: Sequence[Reply], categories: Sequence[str], block_size: int
) -> Score:
    """Walk the same replies without decoding them. Raises `TrainingError` for a target that cannot be walked."""
    assert pair.draft is not None
    sequences = [np.array([*ids, *reply.ids], np.int64) for ids, reply in zip(prompts, replies, strict=True)]
    walked = Replies(sequences, np.array([len(ids) for ids in prompts], np.int32), categories)
    longest_reply = max(len(reply.ids) for reply in replies)
    device = pair.draft.fc.weight.device
    use_flex = device.type == "cuda" and longest_reply * block_size > DENSE_SLOTS
    context_tokens = -(-int(walked.lengths.max()) // TILE) * TILE
    reader = TargetReader(pair.target, pair.draft.config.target_layer_ids, use_flex, compile=False)
    try:
        return score(pair.draft, reader, walked, context_tokens, longest_reply, use_flex, block_size)
    except torch.OutOfMemoryError as error:
        raise TrainingError(
            "Teacher forcing does not fit into memory.", f"The longest reply has {longest_reply} tokens.", ""
        ) from error
    finally:
        reader.close()


def _results(
    pair: Pair, prompts: Sequence[Sequence[int]], categories: Sequence[str], found: dict[Setting, list[Reply]]
) -> Iterator[dict[str, Any]]:
    for setting, replies in found.items():
        result = {"temperature": setting.temperature, "block_size": setting.block_size} | measured(replies)
        result["by_category"] = {
            name: measured([reply for reply, own in zip(replies, categories, strict=True) if own == name])
            for name in sorted(set(categories))
        }
        # Sampled replies cannot be walked: what the target would say elsewhere is not known.
        if setting.temperature == 0.0 and result["passes"]:
            try:
                walked = teacher_forced(pair, prompts, replies, categories, setting.block_size)
                result = with_teacher_forcing(result, walked)
            except TrainingError as error:
                result["not_teacher_forced"] = str(error)
        yield result


if __name__ == "__main__":
    sys.exit(main())
