"""Prompts: what a file asks, what the target writes itself, and where its openers come from."""

import json
from collections import Counter

import numpy as np
import pytest

from dflash_core.errors import TrainingError
from dflash_core.training.engine import Reply
from dflash_core.training.openers import OPENERS, SHARES, Openers, parse_mix, read_openers
from dflash_core.training.prompts import Template, Unique, read_prompts, user_prompt
from dflash_core.training.synthesis import Writer, synthesize
from tests.tiny import STOP_TOKEN_ID, tiny_tokenizer


def scripted(texts):
    """A `generate` whose replies are given; they end with the stop token unless they end with '…'."""
    supply = iter(texts)

    def generate(jobs):
        for job in jobs:
            text = next(supply)
            ids = tiny_tokenizer()(text.rstrip("…"))["input_ids"]
            stopped = not text.endswith("…")
            yield Reply(job, np.array([*ids, STOP_TOKEN_ID] if stopped else ids, np.int32), stopped)

    return generate


def test_written_prompts_are_whole_unique_and_kept(tmp_path):
    template = Template(tiny_tokenizer())
    writer = Writer(template, Openers({"maths": ["Tom has 3"]}, {"maths": 1.0}, seed=0), capacity=400, seed=0)
    texts = [
        " red hats.",
        " RED   hats.",
        "",
        " tall trees. How many? And then he…",
        " words without an end…",
        " new <|im caps.",
        " cats and dogs!",
    ]
    made = synthesize(scripted(texts), writer, 3, Unique(), tmp_path / "pool", lambda *_: None, lambda: False)
    assert [prompt.messages[0]["content"] for prompt in made] == [
        "Tom has 3 red hats.",
        "Tom has 3 tall trees. How many?",
        "Tom has 3 cats and dogs!",
    ]
    assert list(read_prompts(tmp_path / "pool")) == made and {p.category for p in made} == {"maths"}


def test_a_target_that_repeats_itself_does_not_write_forever(tmp_path):
    writer = Writer(Template(tiny_tokenizer()), Openers({"free": [""]}, {"free": 1.0}, seed=0), capacity=400, seed=0)
    made = synthesize(
        scripted(["the same thing."] * 9999), writer, 5, Unique(), tmp_path / "pool", lambda *_: None, lambda: False
    )
    assert len(made) == 1 and writer.tries < 600


def test_openers_come_by_their_share_with_filled_slots():
    openers = Openers(OPENERS, SHARES, seed=1)
    drawn = [openers.draw() for _ in range(4000)]
    assert not [opener for opener in drawn if "{" in opener.text]
    shares = Counter(opener.category for opener in drawn)
    assert set(shares) == set(OPENERS) and abs(sum(SHARES.values()) - 1) < 1e-9
    assert all(abs(shares[name] / 4000 - share) < 0.03 for name, share in SHARES.items())
    assert len({opener.text for opener in drawn if opener.category == "maths"}) > 400


def test_own_openers_and_mixes(tmp_path):
    path = tmp_path / "seeds.txt"
    path.write_text("law\tIs it legal to\nWhat\\nnext\n\n")
    assert read_openers(path) == {"law": ["Is it legal to"], "other": ["What\nnext"]}
    assert parse_mix("law=3, other=1", ["law", "other"]) == {"law": 3.0, "other": 1.0}
    for bad in ("law", "laws=1", "law=-1", "law=0", "law=x"):
        with pytest.raises(TrainingError, match="mix cannot be used"):
            parse_mix(bad, ["law", "other"])
    path.write_text("\n")
    with pytest.raises(TrainingError, match="empty"):
        read_openers(path)


def test_only_the_last_user_turn_waits_for_a_reply(tmp_path):
    path = tmp_path / "chat.jsonl"
    talk = [("system", "be kind"), ("user", "hi"), ("assistant", "hello"), ("user", "why"), ("assistant", "because")]
    path.write_text(json.dumps({"messages": [{"role": role, "content": text, "extra": 1} for role, text in talk]}))
    (prompt,) = read_prompts(path)
    assert [(m["role"], m["content"]) for m in prompt.messages] == talk[:4] and prompt.category == "other"
    assert prompt.key() == prompt.key(0) != prompt.key(1) and prompt.key() != user_prompt("why").key()
