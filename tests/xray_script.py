"""Scripted runs for the showing side: a word tokenizer, byte tokenizers and events; knows no model."""

import random
from collections.abc import Iterator, Sequence
from typing import Any

from app.trace import Recorder, new_header
from dflash_core import Finish, Prefill, Step

STOP = "<|im_end|>"


class WordTokenizer:
    """Ids for exactly the pieces given, and a special stop token with id 0; decoding is joining."""

    all_special_ids = [0]

    def __init__(self, pieces: Sequence[str]) -> None:
        self.words = [STOP, *dict.fromkeys(pieces)]
        self.ids = {word: index for index, word in enumerate(self.words)}
        self.sequence = [self.ids[piece] for piece in pieces]

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.words[token]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = False, clean_up_tokenization_spaces: bool = False) -> str:
        return "".join(self.words[i] for i in ids if i or not skip_special_tokens)


def byte_level_tokenizer() -> Any:
    """One token per byte, spelled as byte-level tokenizers spell them, plus a merge and a special token."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {word: index for index, word in enumerate([*alphabet, "Ġthe"])}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken(STOP, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP)


def byte_fallback_tokenizer() -> Any:
    """Words with ▁ for the blank and <0x..> for single bytes, as in SentencePiece vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "▁the", "▁a", "s", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    backend = Tokenizer(models.BPE(vocab={word: i for i, word in enumerate(words)}, merges=[], unk_token="<unk>", byte_fallback=True))
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens([AddedToken(STOP, special=True)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=STOP)


def run_events(tokens: Sequence[int], accepted: Sequence[int], k: int, seed: int = 0) -> Iterator[Prefill | Step | Finish]:
    """A reply of these tokens in blocks of k drafted, accepting `accepted[i % n]` of them; times are scripted."""
    chance = random.Random(seed)
    yield Prefill(prompt_tokens=12, first_token=tokens[0], seconds=0.1)
    position, index = 1, 0
    while position < len(tokens):
        kept = min(accepted[index % len(accepted)], k, len(tokens) - position - 1)
        truth = [*tokens[position : position + k + 1], *[tokens[-1]] * k][: k + 1]
        drafted = [*truth[:kept], *(_other(chance, tokens, truth[i]) for i in range(kept, k))]
        yield Step(
            index=index,
            position=position,
            anchor=tokens[position - 1],
            drafted=tuple(drafted),
            posterior=tuple(truth),
            accepted=kept,
            correction=truth[kept],
            committed=tuple(truth[: kept + 1]),
            draft_confidence=tuple(0.9 if i < kept else 0.3 for i in range(k)),
            target_confidence=tuple(0.8 for _ in range(k + 1)),
            draft_seconds=0.01 if k else 0.0,
            verify_seconds=0.03,
        )
        position, index = position + kept + 1, index + 1
    yield Finish(reason="stop", new_tokens=len(tokens), steps=index, seconds=0.1 + index * 0.05)


def _other(chance: random.Random, tokens: Sequence[int], right: int) -> int:
    """A wrong guess, when there is one to make."""
    guesses = (chance.choice(tokens) for _ in range(50))
    return next((token for token in guesses if token != right), right)


def header(**changes: Any) -> dict[str, Any]:
    """A header as the app writes it."""
    usual = {"pair": "scripted", "device": "cpu", "dtype": "float32", "settings": {"temperature": 0.0},
             "messages": [{"role": "user", "content": "Tell me <b>something</b>."}]}  # fmt: skip
    return new_header(**(usual | changes))


def recorded(pieces: Sequence[str], accepted: Sequence[int] = (3, 0, 5, 7), k: int = 7, **changes: Any) -> Recorder:
    """A finished run that wrote these pieces and the stop token."""
    tokenizer = WordTokenizer(pieces)
    recorder = Recorder(header(**changes), tokenizer)
    for event in run_events([*tokenizer.sequence, 0], accepted, k):
        recorder.add(event)
    return recorder
