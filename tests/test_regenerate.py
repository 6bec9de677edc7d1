"""Data regeneration end to end on the local device: prompts in, shards out; resumable, honest about what it did."""

import json

import pytest
import torch

from dflash_core.errors import TrainingError
from dflash_core.training import regenerate
from dflash_core.training.meter import Meter, duration
from dflash_core.training.prompts import read_prompts
from dflash_core.training.regenerate import main, parse, run
from dflash_core.training.shards import TokenShards
from tests.tiny import tiny_llama, tiny_tokenizer, write_target

QUESTIONS = [f"what is {n} and {n * n} or so{' and so on' * (n % 5)}" for n in range(24)]


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    return write_target(tmp_path_factory.mktemp("targets") / "tiny", tiny_llama())


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.jsonl"
    rows = [
        {"messages": [{"role": "user", "content": text}], "category": "ab"[i % 2]} for i, text in enumerate(QUESTIONS)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def arguments(target, output, *more):
    return parse(
        ["--target", str(target), "--output", str(output), "--batch", "5", "--max-reply", "20", *map(str, more)]
    )


def stored(output):
    """{prompt tokens: (reply tokens, category)}"""
    shards = TokenShards.open(output)
    sequences = ((*shards[i], shards.category(i)) for i in range(len(shards)))
    return {tuple(t[:p].tolist()): (t[p:].tolist(), category) for t, p, category in sequences}


def greedy_reply(model, ids, limit=20):
    ids = torch.tensor([ids])
    return model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=limit, do_sample=False)[
        0, ids.shape[1] :
    ].tolist()


def test_prompts_become_the_targets_own_replies(target, prompts, tmp_path):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--greedy-fraction", 1))
    tokenizer, model, found = tiny_tokenizer(), tiny_llama(), stored(tmp_path / "out")
    assert len(found) == len(QUESTIONS)
    for index, text in enumerate(QUESTIONS):
        ids = tokenizer(f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n")["input_ids"]
        assert found[tuple(ids)] == (greedy_reply(model, ids), "ab"[index % 2])


def test_the_manifest_tells_how_the_data_was_made(target, prompts, tmp_path):
    facts = run(arguments(target, tmp_path / "out", "--prompts", prompts, "--greedy-fraction", 0.5, "--seed", 3))
    shards = TokenShards.open(tmp_path / "out")
    manifest, (made,) = shards.manifests[0], shards.manifests[0]["runs"]
    assert manifest["target"] == "tiny" and len(manifest["template_sha256"]) == 64 and manifest["revision"] is None
    assert manifest["counts"]["tokens"] == shards.total_tokens and manifest["counts"]["sequences"] == 24
    assert made == json.loads(json.dumps(facts)) and made["by_category"] == {"a": 12, "b": 12}
    assert 4 <= made["greedy"] <= 20 and made["tokens_per_second"] > 0
    assert made["settings"]["temperature"] == 0.8 and made["settings"]["prompts"] == ["prompts.jsonl"]
    assert made["backend"]["kind"] == "local" and made["backend"]["rows"] == 5
    assert str(tmp_path) not in json.dumps(manifest)


def test_an_interrupted_run_goes_on(target, prompts, tmp_path, monkeypatch, capsys):
    """Interrupted after nine replies, then run again: every prompt once, the same data as in one go."""
    whole = ["--target", target, "--prompts", prompts, "--batch", 5, "--max-reply", 20, "--greedy-fraction", 1]
    assert main([*map(str, whole), "--output", str(tmp_path / "one")]) == 0
    real, seen = regenerate.ShardWriter.add, []

    def add(self, sample):
        if len(seen) == 9:
            raise KeyboardInterrupt
        seen.append(sample.key)
        real(self, sample)

    with monkeypatch.context() as patch:
        patch.setattr(regenerate.ShardWriter, "add", add)
        assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 130
    assert len(TokenShards.open(tmp_path / "two")) == 9
    assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 0
    assert stored(tmp_path / "two") == stored(tmp_path / "one")
    assert [made["replies"] for made in TokenShards.open(tmp_path / "two").manifests[0]["runs"]] == [9, 15]
    assert main([*map(str, whole), "--output", str(tmp_path / "two")]) == 0
    assert "0 replies" in capsys.readouterr().out.splitlines()[-1]
    assert len(TokenShards.open(tmp_path / "two")) == 24


def test_several_samples_of_one_prompt_differ(target, prompts, tmp_path):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--limit", 2, "--samples", 4, "--greedy-fraction", 0))
    shards = TokenShards.open(tmp_path / "out")
    assert len(shards) == 8 and len({tuple(shards[i][0].tolist()) for i in range(8)}) > 4


def test_duplicates_held_out_and_long_prompts_are_left_out(target, prompts, tmp_path):
    held_out = tmp_path / "eval.jsonl"
    held_out.write_text(json.dumps({"messages": [{"role": "user", "content": QUESTIONS[3].upper()}]}))
    double = tmp_path / "double.jsonl"
    double.write_text(json.dumps({"messages": [{"role": "user", "content": "  " + QUESTIONS[1].replace(" ", "  ")}]}))
    more = ["--prompts", prompts, double, "--exclude", held_out, "--max-prompt", 50]
    facts = run(arguments(target, tmp_path / "out", *more))
    assert (facts["duplicates"], facts["held_out"]) == (1, 1)
    assert facts["too_long"] > 0 and facts["replies"] == 24 - 1 - facts["too_long"]
    assert all(len(prompt) <= 50 for prompt in stored(tmp_path / "out"))


def test_time_up_ends_the_run_with_what_there_is(target, prompts, tmp_path, monkeypatch):
    calls = iter(range(1000))
    monkeypatch.setattr(regenerate.Clock, "past", lambda self, share=1.0: next(calls) > 10)
    facts = run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-minutes", 1))
    assert 8 <= facts["replies"] < 24 and len(stored(tmp_path / "out")) == facts["replies"]


def test_the_target_writes_prompts_and_answers_them(target, tmp_path, prompts):
    """A random target writes noise, but unique noise; a second run uses the same prompts again."""
    more = ["--synthesize", 6, "--mix", "maths=1,code=1", "--max-prompt", 200]
    facts = run(arguments(target, tmp_path / "out", *more))
    pool = list(read_prompts(tmp_path / "out" / "prompts.jsonl"))
    assert len(pool) == 6 == len({prompt.normalised for prompt in pool}) and {p.category for p in pool} <= {
        "maths",
        "code",
    }
    assert facts["replies"] + facts["too_long"] == 6
    again = run(arguments(target, tmp_path / "out", *more, "--prompts", prompts))
    assert again["replies"] == 24 and len(list(read_prompts(tmp_path / "out" / "prompts.jsonl"))) == 6


@pytest.mark.parametrize(
    "content, message",
    [
        (b"", "There are no prompts"),
        (b"\n \n", "There are no prompts"),
        (b'{"messages": [{"role": "user", "content": "a"}]}\n{"messages": oh}', r"line 2"),
        (b'{"prompt": "a"}', "line 1.*no list 'messages'"),
        (b'{"messages": [{"role": "user"}]}', "line 1.*lacks"),
        (b'{"messages": [{"role": "assistant", "content": "a"}]}', "line 1.*no user message"),
        (b"\xff\xfe\n", "cannot be read"),
        (None, "cannot be read"),
    ],
)
def test_bad_prompt_files_are_named_before_a_model_loads(tmp_path, content, message, monkeypatch):
    path = tmp_path / "bad.jsonl"
    if content is not None:
        path.write_bytes(content)
    monkeypatch.setattr(regenerate, "open_backend", lambda args: pytest.fail("loaded"))
    with pytest.raises(TrainingError, match=message) as caught:
        run(arguments("nowhere", tmp_path / "out", "--prompts", path))
    assert "bad.jsonl" in str(caught.value)


def test_settings_that_cannot_work_are_refused(target, prompts, tmp_path, capsys):
    for bad in (
        ["--samples", 0],
        ["--greedy-fraction", 2],
        ["--temperature", 0],
        ["--max-minutes", 0],
        ["--template-args", "[1"],
    ):
        assert main(["--output", str(tmp_path), "--prompts", str(prompts), *map(str, bad)]) == 1
    assert main(["--output", str(tmp_path)]) == 1
    assert capsys.readouterr().err.count("error: ") == 6
    with pytest.raises(TrainingError, match="longer than the target's context.*512"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-prompt", 500))
    with pytest.raises(TrainingError, match="Every prompt is too long"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--max-prompt", 3))


def test_a_folder_of_other_data_and_a_full_disk_are_refused(target, prompts, tmp_path, monkeypatch):
    run(arguments(target, tmp_path / "out", "--prompts", prompts, "--limit", 1))
    with pytest.raises(TrainingError, match="holds other data.*template_sha256"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts, "--template-args", '{"enable_thinking": false}'))
    monkeypatch.setattr(regenerate.shutil, "disk_usage", lambda path: type("Usage", (), {"free": 10_000}))
    with pytest.raises(TrainingError, match="disk is full.*0 MB are needed"):
        run(arguments(target, tmp_path / "out", "--prompts", prompts))


def test_the_meter_says_how_fast_and_how_long(capsys):
    with Meter("Replies", 10) as meter:
        meter.show(5, 1234)
        assert meter.line().startswith("Replies: 5 of 10 · 1,234 tokens · ") and "tokens/s" in meter.line()
    assert capsys.readouterr().err.count("\n") == 1
    assert [duration(s) for s in (5, 65, 3665)] == ["0:05", "1:05", "1:01:05"]
