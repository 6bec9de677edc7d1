"""A reply through transformers' own `generate`, told in this package's events; knows no table and no screen."""

from collections.abc import Generator, Iterator, Sequence
from itertools import pairwise
from typing import TYPE_CHECKING

from dflash_core.config import SamplingParams
from dflash_core.errors import PromptError
from dflash_core.events import Event, Finish, FinishReason, Prefill, Step

if TYPE_CHECKING:
    from dflash_core.bench_methods import Run
    from dflash_core.loading import Pair

METHODS = ("hf-generate", "prompt-lookup", "hf-dflash")


def transformers_decode(
    pair: "Pair", prompt_ids: Sequence[int], params: SamplingParams = SamplingParams(), *, method: str = "prompt-lookup"
) -> Generator[Event, None, None]:
    """Decode one reply as transformers does, to compare with `decode`: the same events, once the reply is whole.

    `method` is 'hf-generate' (plain), 'prompt-lookup' (guesses copied from the prompt) or 'hf-dflash' (transformers'
    own DFlash loop on the pair's draft). transformers tells neither what it rejected nor how sure it was, nor how
    a pass divides into drafting and verifying: `drafted` holds the accepted guesses only, confidences are 0.0 and
    `verify_seconds` is the whole pass. Raises `PromptError`; cannot be stopped halfway.
    """
    from dflash_core.bench_methods import make_methods

    if method not in METHODS:
        raise PromptError(
            "There is no such method.", f"'{method}' was asked for.", f"Choose one of {', '.join(METHODS)}."
        )
    if params.stop_strings or params.processors or params.acceptance != "match":
        raise PromptError(
            "transformers' loop cannot take these settings.",
            "Stop strings, processors and other acceptance rules belong to this package's loop.",
            "Leave them out.",
        )
    block_sizes = [] if params.block_size is None else [params.block_size]
    (chosen,) = make_methods(pair, [method], params, block_sizes)
    run = chosen.run(prompt_ids)
    yield Prefill(len(prompt_ids), run.ids[0], run.times[0])
    steps = list(_steps(run))
    yield from steps
    yield Finish(_reason(pair, run, params), len(run.ids), len(steps), run.seconds)


def _steps(run: "Run") -> Iterator[Step]:
    """One step per forward after the first. The first may verify guesses too: they become a step that took no time."""
    commits = (run.commits[0] - 1, *run.commits[1:])
    seconds = (0.0, *(now - before for before, now in pairwise(run.times)))
    position = 1
    index = 0
    for count, took in zip(commits, seconds, strict=True):
        # The last pass may be told longer than what was kept of it.
        committed = run.ids[position : position + count]
        if not committed:
            continue
        count = len(committed)
        yield Step(
            index=index, position=position, anchor=run.ids[position - 1], drafted=committed[:-1], posterior=committed,
            accepted=count - 1, correction=committed[-1], committed=committed,
            draft_confidence=(0.0,) * (count - 1), target_confidence=(0.0,) * count,
            draft_seconds=0.0, verify_seconds=took,
        )  # fmt: skip
        position, index = position + count, index + 1


def _reason(pair: "Pair", run: "Run", params: SamplingParams) -> FinishReason:
    stops = pair.stop_token_ids if params.stop_token_ids is None else params.stop_token_ids
    if run.ids[-1] in stops:
        return "stop"
    return "length" if len(run.ids) >= params.max_new_tokens else "context"
