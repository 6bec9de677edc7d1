"""Provenance runs and detokenisation: whole characters only, and nothing lost."""

import random

import pytest

from app.spans import Detokeniser, Span, committed_kind, spans
from dflash_core import Finish, Prefill, Step
from tests.xray_script import STOP, WordTokenizer, byte_fallback_tokenizer, byte_level_tokenizer, run_events

NASTY = "naïve 😀👩‍👩‍👧 العربية 漢字\x00\n\tend"


def decoded(tokenizer, ids):
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def byte_ids(tokenizer, text):
    """One id per UTF-8 byte."""
    ids = tokenizer(text, add_special_tokens=False).input_ids
    assert len(ids) == len(text.encode())
    return ids


@pytest.mark.parametrize("make", [byte_level_tokenizer, byte_fallback_tokenizer])
@pytest.mark.parametrize("seed", range(8))
def test_pieces_join_to_the_tokenizers_decode_for_any_ids(make, seed):
    tokenizer = make()
    chance = random.Random(seed)
    ids = [chance.randrange(len(tokenizer)) for _ in range(200)]
    detokeniser = Detokeniser(tokenizer)
    pieces = detokeniser.feed(ids)
    assert len(pieces) == len(ids)
    assert "".join(pieces) + detokeniser.flush() == decoded(tokenizer, ids)


def test_feeding_in_chunks_changes_nothing():
    tokenizer = byte_level_tokenizer()
    ids = byte_ids(tokenizer, NASTY)
    whole, chunked = Detokeniser(tokenizer), Detokeniser(tokenizer)
    pieces = [piece for start in range(0, len(ids), 3) for piece in chunked.feed(ids[start : start + 3])]
    assert pieces == whole.feed(ids)
    assert "".join(pieces) == NASTY and whole.flush() == ""


def test_a_character_of_four_tokens_comes_with_its_last_token():
    tokenizer = byte_level_tokenizer()
    detokeniser = Detokeniser(tokenizer)
    assert detokeniser.feed(byte_ids(tokenizer, "😀")) == ["", "", "", "😀"]


def test_half_a_character_at_the_end_is_flushed_not_lost():
    tokenizer = byte_level_tokenizer()
    ids = byte_ids(tokenizer, "a😀")[:-1]
    detokeniser = Detokeniser(tokenizer)
    assert "".join(detokeniser.feed(ids)) == "a"
    assert detokeniser.flush() == "\N{REPLACEMENT CHARACTER}" == decoded(tokenizer, ids)[1:]


def test_byte_fallback_runs_wait_until_they_can_no_longer_change():
    tokenizer = byte_fallback_tokenizer()
    ids = tokenizer.convert_tokens_to_ids(["▁the", "<0xF0>", "<0x9F>", "<0x98>", "<0x80>", "▁a"])
    assert Detokeniser(tokenizer).feed(ids) == ["the", "", "", "", "", "😀 a"]


def test_labels_name_specials_show_bytes_and_keep_the_blank_before_a_word():
    byte_level, fallback = byte_level_tokenizer(), byte_fallback_tokenizer()
    detokeniser = Detokeniser(byte_level)
    assert detokeniser.label(byte_level.eos_token_id) == STOP
    assert detokeniser.label(byte_ids(byte_level, "😀")[0]) == "⟨f0⟩"
    assert detokeniser.label(byte_level.convert_tokens_to_ids("Ġthe")) == " the"
    assert Detokeniser(fallback).label(fallback.convert_tokens_to_ids("▁the")) == " the"
    assert Detokeniser(fallback).label(fallback.convert_tokens_to_ids("<0x9F>")) == "⟨9f⟩"


def step(accepted, drafted=(1, 2), committed=None):
    posterior = (*drafted[:accepted], *[3] * (len(drafted) + 1 - accepted))
    committed = posterior[: accepted + 1] if committed is None else committed
    return Step(0, 1, 1, drafted, posterior, accepted, posterior[accepted], committed,
                (0.5,) * len(drafted), (0.5,) * (len(drafted) + 1), 0.1, 0.1)  # fmt: skip


def test_who_wrote_a_token():
    assert [committed_kind(step(1), i) for i in (0, 1)] == ["accepted", "correction"]
    assert committed_kind(step(2), 2) == "bonus"
    assert committed_kind(step(0, drafted=()), 0) == "plain"


def test_spans_are_runs_of_one_kind_and_step():
    tokenizer = WordTokenizer(["Once", " upon", " a", " time", "."])
    events = list(run_events([*tokenizer.sequence, 0], accepted=(2, 1), k=3))
    assert list(spans(events, Detokeniser(tokenizer))) == [
        Span("Once", "first", None),
        Span(" upon a", "accepted", 0),
        Span(" time", "correction", 0),
        Span(".", "accepted", 1),
        Span("", "correction", 1),
    ]


def test_a_step_cut_inside_its_accepted_tokens_has_no_correction():
    tokenizer = WordTokenizer(["a", "b", "c"])
    events = [Prefill(1, 1, 0.1), step(2, committed=(1,)), Finish("length", 2, 1, 0.3)]
    assert [span.kind for span in spans(events, Detokeniser(tokenizer))] == ["first", "accepted"]


@pytest.mark.parametrize("k, accepted", [(0, (0,)), (3, (0, 1, 2, 3)), (7, (7,))])
def test_spans_join_to_the_reply_even_when_steps_cut_characters(k, accepted):
    tokenizer = byte_level_tokenizer()
    ids = [*byte_ids(tokenizer, NASTY * 3), tokenizer.eos_token_id]
    joined = "".join(span.text for span in spans(run_events(ids, accepted, k), Detokeniser(tokenizer)))
    assert joined == NASTY * 3 == decoded(tokenizer, ids)
