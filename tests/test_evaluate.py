"""The evaluation command: the real loop's numbers add up, and teacher forcing finds the same."""

import json

import pytest
import torch

from dflash_core import SamplingParams, load_pair
from dflash_core.training import evaluate
from dflash_core.training.evaluate import Reply, decode_reply, teacher_forced
from dflash_core.training.evaluate_report import measured, with_teacher_forcing
from dflash_core.training.walk import Score, Tally
from tests.progressions import cases, prompt_ids, trained, world
from tests.tiny import tiny_draft, tiny_gemma3, tiny_pair


@pytest.fixture(scope="module")
def pair():
    return load_pair(target=world() / "target", draft=trained() / "last", dtype="float32", device="cpu")


def command(*arguments: str) -> int:
    pair = ["--target", world() / "target", "--draft", trained() / "last", "--dtype", "float32", "--device", "cpu"]
    return evaluate.main([*map(str, pair), "--prompts", str(world() / "prompts.jsonl"), *arguments])


# The command.


def test_the_command_reports_every_setting_twice(tmp_path, capsys):
    path = tmp_path / "numbers.json"
    settings = ["--temperature", "0", "0.7", "--block-size", "6", "3", "--max-new-tokens", "72", "--limit", "10"]
    assert command(*settings, "--json", str(path)) == 0
    report, shown = json.loads(path.read_text()), capsys.readouterr().out
    assert report["version"] == 1 and report["dtype"] == "float32" and report["prompts"] == 10
    found = [(result["temperature"], result["block_size"]) for result in report["results"]]
    assert found == [(0.0, 6), (0.0, 3), (0.7, 6), (0.7, 3)]
    for result in report["results"]:
        check_sums(result)
        assert len(result["accepted_by_position"]) == result["block_size"] - 1
        assert ("teacher_forced" in result) == (result["temperature"] == 0.0)
        assert f"temperature {result['temperature']:g}, blocks of {result['block_size']}" in shown
        assert f"{result['tau']:.3f}" in shown
    assert "step 7" in shown and "first 64" in shown and "given all before it" in shown
    assert "one of them is wrong" not in shown


def check_sums(result):
    entries = result["by_category"]
    assert set(entries) == {"step 1", "step 3", "step 5", "step 7"}
    for name in ("prompts", "passes", "new_tokens", "accepted", "drafted"):
        assert result[name] == sum(entry[name] for entry in entries.values())
    # The first token of each reply comes from the prompt's own pass.
    assert result["tau"] * result["passes"] == pytest.approx(result["new_tokens"] - result["prompts"])
    assert 1.0 <= result["tau_later"] < result["tau"] < result["tau_opening"] <= result["block_size"]
    assert 0 < result["tau_error"] < 0.5
    rates, given = result["accepted_by_position"], result["accepted_given_earlier"]
    assert rates == sorted(rates, reverse=True) and given[0] == rates[0]
    assert all(own >= rate for own, rate in zip(given, rates, strict=True))


def test_prompts_without_a_category_get_their_files_name(tmp_path):
    path, numbers = tmp_path / "questions.jsonl", tmp_path / "numbers.json"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "A3"}]}))
    more = str(world() / "prompts.jsonl")
    assert command("--prompts", str(path), more, "--limit", "5", "--max-new-tokens", "6", "--json", str(numbers)) == 0
    assert "questions" in json.loads(numbers.read_text())["results"][0]["by_category"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--limit", "0"], "'limit' is 0."),
        (["--temperature", "0", "-1"], "'temperature' is -1.0."),
        (["--block-size", "7"], "It is 7, the draft was trained for 6."),
        (["--draft", "none"], "This pair cannot draft."),
        (["--prompts", "/nowhere.jsonl"], "The prompt file cannot be read."),
        (["--limit", "1", "--max-new-tokens", "2", "--json", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_a_users_error_is_one_clean_message(capsys, arguments, message):
    assert command(*arguments) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_an_interrupt_keeps_the_complete_settings(pair, monkeypatch):
    calls = []

    def reply(pair, ids, params):
        calls.append((params.temperature, params.seed))
        if len(calls) == 4:
            raise KeyboardInterrupt
        return Reply()

    monkeypatch.setattr(evaluate, "decode_reply", reply)
    settings = [evaluate.Setting(temperature, 4) for temperature in (0.5, 1.0)]
    found = evaluate.decode_all(pair, [[1], [2]], settings, SamplingParams(), seed=7)
    assert list(found) == settings[:1] and calls == [(0.5, 7), (0.5, 8), (1.0, 7), (1.0, 8)]
    calls[:] = [None] * 3
    with pytest.raises(KeyboardInterrupt):
        evaluate.decode_all(pair, [[1], [2]], settings, SamplingParams(), seed=7)


# The two ways of counting.


@pytest.mark.parametrize("block_size", [2, 4, 6])
def test_the_loop_and_teacher_forcing_count_the_same_passes(pair, block_size):
    """Every pass but a reply's last, which the length limit shortens in the loop; replies of all lengths."""
    chosen = list(cases())[::5]
    prompts = [prompt_ids(*case) for case in chosen]
    lengths = [1 + 7 * number for number in range(len(chosen))]
    replies = [
        decode_reply(pair, ids, SamplingParams(max_new_tokens=length, block_size=block_size))
        for ids, length in zip(prompts, lengths, strict=True)
    ]
    categories = [str(number) for number in range(len(chosen))]
    walked = teacher_forced(pair, prompts, replies, categories, block_size)
    for number, reply in enumerate(replies):
        if lengths[number] > 1:
            tally = walked.categories[str(number)]
            assert abs(tally.passes - reply.tally.steps) <= 1 and tally.tokens == reply.tally.committed
    steps = sum(reply.tally.steps for reply in replies)
    assert walked.overall.passes == pytest.approx(steps, rel=0.01) and walked.overall.tau > 1.3
    assert abs(walked.opening.passes - sum(reply.opening.steps for reply in replies)) <= 2


def test_teacher_forcing_that_is_wrong_is_told(pair):
    """The check can fail: another draft's walk differs from this loop by far more than 2 %."""
    prompts = [prompt_ids(*case) for case in list(cases())[:4]]
    replies = [decode_reply(pair, ids, SamplingParams(max_new_tokens=24)) for ids in prompts]
    result = measured(replies) | {"by_category": {}}
    right = with_teacher_forcing(result, teacher_forced(pair, prompts, replies, "abcd", 6))["teacher_forced"]
    with torch.no_grad():
        pair.draft.fc.weight.neg_()
        wrong = with_teacher_forcing(result, teacher_forced(pair, prompts, replies, "abcd", 6))["teacher_forced"]
        pair.draft.fc.weight.neg_()
    assert right["agrees"] and not wrong["agrees"] and wrong["difference_percent"] < -20.0


def test_disagreement_is_written_under_the_table():
    result = measured([Reply()]) | {"temperature": 0.0, "block_size": 4, "by_category": {}, "tau": 2.0}
    walked = Score({"a": Tally(30, 10)}, Tally(30, 10), Tally(), (0.5,), (0.5,))
    report = {"pair": "p", "device": "cpu", "dtype": "float32", "prompts": 1, "max_new_tokens": 9}
    lines = list(evaluate.table(report | {"results": [with_teacher_forcing(result, walked)]}))
    assert "+50.00 %" in "".join(lines) and "one of them is wrong" in lines[-1]


def test_a_target_that_cannot_be_walked_is_still_decoded(tmp_path, capsys):
    model = tiny_gemma3()
    pair = tiny_pair(model, tiny_draft(model.config))
    replies = [decode_reply(pair, [5, 9, 17], SamplingParams(max_new_tokens=8, stop_token_ids=()))]
    result = next(evaluate._results(pair, [[5, 9, 17]], ["a"], {evaluate.Setting(0.0, 4): replies}))
    assert result["tau"] >= 1.0 and "sliding_attention" in result["not_teacher_forced"]
