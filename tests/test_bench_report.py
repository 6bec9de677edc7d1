"""The bench's arithmetic, its table, and the prompt files it reads."""

import pytest

from dflash_core import DFlashError, SamplingParams, bench
from dflash_core.bench_methods import Method, Run, logit_gap, make_methods
from dflash_core.bench_report import Difference, first_difference, method_report, table
from dflash_core.prompts import ChatPrompt, read_prompts, spread
from dflash_core.tally import Tally
from tests.tiny import tiny_draft, tiny_llama, tiny_pair

PROMPT = [5, 9, 17, 33, 40]


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    return tiny_pair(model, tiny_draft(model.config))


def test_the_numbers_follow_from_the_runs():
    ar = [[Run((1,) * 10, s, 0.1, (1,) * 10), Run((1,) * 10, s, 0.3, (1,) * 10)] for s in (1.0, 2.0, 4.0)]
    account = Tally(
        accepted=6, drafted=12, steps=3, committed=9, prefill_seconds=0.05, draft_seconds=0.1, verify_seconds=0.2,
        drafted_at=[3, 3], accepted_at=[3, 1],
    )  # fmt: skip
    fast = [[Run((1,) * 10, s / 2, 0.1, (1, 4, 4, 1), account) for _ in range(2)] for s in (1.0, 2.0, 4.0)]
    found = [Difference(1, 3, 7, 8, 0.1)]
    entry = method_report(Method("dflash", "dflash", lambda ids: None), {"ar": ar, "dflash": fast}, ["x", "y"], found)
    assert (
        entry["tokens_per_second"] == 10.0
        and entry["tokens_per_second_low"] == 5.0
        and entry["tokens_per_second_high"] == 20.0
    )
    assert (
        entry["speedup_vs_ar"] == 2.0
        and entry["speedup_vs_hf_generate"] is None
        and entry["first_token_seconds"] == 0.1
    )
    assert (
        entry["tau"] == 3.0
        and entry["passes"] == 6
        and entry["accepted"] == 12
        and entry["accepted_per_drafted"] == 0.5
    )
    assert entry["acceptance_by_position"] == [1.0, pytest.approx(1 / 3)]
    assert (
        entry["draft_seconds"] == 0.2
        and entry["verify_seconds"] == 0.4
        and entry["other_seconds"] == pytest.approx(2.0 - 0.7)
    )
    assert (entry["identical"], entry["compared"]) == (1, 2)
    assert entry["by_category"]["x"]["identical"] == 1 and entry["by_category"]["y"]["identical"] == 0
    assert entry["differences"] == [
        {"prompt": 1, "position": 3, "ar_token": 7, "token": 8, "logit_gap": 0.1, "verdict": "rounding"}
    ]


@pytest.mark.parametrize(
    "reference, other, expected",
    [
        ([1, 2, 3], [1, 2, 3], None),
        ([1, 2, 3], [1, 5, 3], Difference(4, 1, 2, 5)),
        ([1, 2, 3], [1, 2], Difference(4, 2, 3, None)),
        ([1], [1, 2], Difference(4, 1, None, 2)),
    ],
)
def test_the_first_difference(reference, other, expected):
    assert first_difference(4, reference, other) == expected


def test_a_difference_is_judged_by_its_gap():
    verdicts = [Difference(0, 0, 1, 2, gap).verdict for gap in (0.0, 0.25, 0.4, 0.6, 3.0, None)]
    assert verdicts == ["rounding", "rounding", "unclear", "suspect", "suspect", "length differs"]


def test_differences_are_measured_and_shown(pair):
    truth = make_methods(pair, ["ar"], SamplingParams(max_new_tokens=6, stop_token_ids=()), [])[0].run(PROMPT)
    wrong = (*truth.ids[:3], (truth.ids[3] + 1) % 100, *truth.ids[4:])
    other = Run(wrong, 1.0, 0.1, (1, 5))
    found = list(bench._differences(pair, [truth], [other], [PROMPT], SamplingParams()))
    assert found[0].position == 3 and found[0].token == wrong[3]
    assert (
        found[0].logit_gap == pytest.approx(logit_gap(pair, [*PROMPT, *truth.ids[:3]], truth.ids[3], wrong[3]))
        and found[0].logit_gap > 0
    )
    entry = method_report(
        Method("prompt-lookup", "prompt-lookup", lambda ids: None), {"prompt-lookup": [[other]]}, [None], found
    )
    report = {
        "pair": "p",
        "device": "cpu",
        "dtype": "float32",
        "prompts": 1,
        "repeats": 1,
        "max_new_tokens": 6,
        "temperature": 0.0,
    }
    shown = "\n".join(table(report | {"peak_memory_bytes": None, "methods": {"prompt-lookup": entry}}))
    assert "prompt-lookup: prompt 0 leaves ar at token 3" in shown and "logit gap" in shown and "0/1" in shown


def test_a_few_prompts_stand_for_all_categories():
    prompts = [ChatPrompt(({"role": "user", "content": str(i)},), "aabbbc"[i]) for i in range(6)]
    assert [p.category for p in spread(prompts, 4)] == ["a", "b", "c", "a"]
    assert spread(prompts, None) == spread(prompts, 6) == prompts


@pytest.mark.parametrize(
    "text, message",
    [
        ("", "is empty"),
        ("{", "Line 1 is not JSON"),
        ("[]", "Line 1 has no 'messages'"),
        ('\n{"messages": []}', "Line 2 has no 'messages'"),
        ('{"messages": ["hi"]}', "a message without"),
        ('{"messages": [{"role": "user"}]}', "a message without"),
    ],
)
def test_a_bad_prompt_file_is_named_by_its_line(tmp_path, text, message):
    path = tmp_path / "prompts.jsonl"
    path.write_text(text)
    with pytest.raises(DFlashError, match=message):
        read_prompts(path)
