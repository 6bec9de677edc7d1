"""Pipelines around tiny pairs and short ways to ask them; knows no test."""

from dflash_core import DFlashPipeline, SamplingParams, decode
from tests.scripted import reply_of
from tests.tiny import tiny_draft, tiny_llama, tiny_tokenizer

PROMPT = [5, 9, 17, 33]


def make_pipe() -> DFlashPipeline:
    """A draft that guesses almost nothing right."""
    model = tiny_llama()
    return DFlashPipeline(tiny_draft(model.config), model, tiny_tokenizer())


def make_parrot() -> DFlashPipeline:
    """A target that always says token 0, and a draft that guesses so: every block is accepted whole."""
    model = tiny_llama()
    model.lm_head.weight.data.zero_()
    return DFlashPipeline(tiny_draft(model.config), model, tiny_tokenizer())


def baseline(pipe, ids=PROMPT, **params) -> list[int]:
    return reply_of(decode(pipe.pair, ids, SamplingParams(**{"stop_token_ids": ()} | params), drafting=False))


def ids_of(pipe, **options) -> list[int]:
    return pipe(input_ids=PROMPT, **{"stop_token_ids": [], "max_new_tokens": 24} | options).sequences[0].tolist()
