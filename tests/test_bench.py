"""The bench command: every method decodes the same text, in turn, and the numbers come out whole."""

import json

import pytest
import torch

from dflash_core import DFlashError, SamplingParams, bench
from dflash_core.bench_methods import METHODS, Method, Run, logit_gap, make_methods, possible
from tests.tiny import tiny_draft, tiny_llama, tiny_pair, tiny_qwen3_5, write_draft, write_target

PROMPT = [5, 9, 17, 33, 40]


@pytest.fixture(scope="module")
def pair():
    model = tiny_llama()
    return tiny_pair(model, tiny_draft(model.config))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("bench")
    model = tiny_llama()
    write_target(root / "target", model)
    write_draft(root / "draft", tiny_draft(model.config))
    lines = [
        {"category": category, "messages": [{"role": "user", "content": f"{category} {number}"}]}
        for category in ("code", "prose")
        for number in range(3)
    ]
    (root / "prompts.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    return root


def command(folder, *arguments: str) -> int:
    pair = ["--target", str(folder / "target"), "--draft", str(folder / "draft"), "--dtype", "float32"]
    return bench.main([*pair, "--prompts", str(folder / "prompts.jsonl"), *arguments])


# Whole runs on the tiny pair.


def test_the_command_measures_all_methods_and_reports_twice(folder, tmp_path, capsys):
    path = tmp_path / "numbers.json"
    assert command(folder, "--limit", "4", "--repeats", "2", "--max-new-tokens", "12", "--json", str(path)) == 0
    shown = capsys.readouterr().out
    report = json.loads(path.read_text())
    assert report["version"] == 1 and report["prompts"] == 4 and report["repeats"] == 2 and report["device"] == "cpu"
    assert report["dtype"] == "float32" and report["peak_memory_bytes"] > 50 * 2**20
    assert list(report["methods"]) == list(METHODS)
    for name, entry in report["methods"].items():
        assert entry["identical"] == entry["compared"] == 4 and entry["differences"] == []
        assert entry["tokens_per_second_low"] <= entry["tokens_per_second"] <= entry["tokens_per_second_high"]
        assert entry["ms_per_token"] == pytest.approx(1000 / entry["tokens_per_second"])
        assert entry["new_tokens"] == 48 and entry["first_token_seconds"] > 0
        assert {c: e["prompts"] for c, e in entry["by_category"].items()} == {"code": 2, "prose": 2}
        assert entry["speedup_vs_ar"] > 0 and entry["speedup_vs_hf_generate"] > 0
        assert name in shown
    dflash = report["methods"]["dflash"]
    assert report["methods"]["ar"]["speedup_vs_ar"] == 1.0 and "tau" not in report["methods"]["ar"]
    assert 1.0 <= dflash["tau"] <= 4.0 and len(dflash["acceptance_by_position"]) == 3
    assert dflash["passes"] * dflash["tau"] == pytest.approx(44) and 0 <= dflash["accepted"] < dflash["drafted"]
    assert min(dflash[f"{part}_seconds"] for part in ("prefill", "draft", "verify", "other")) >= 0
    assert dflash["by_category"]["code"]["tau"] >= 1.0
    # Theirs drafts full blocks to the end, so only the last pass may differ.
    assert report["methods"]["hf-dflash"]["tau"] == pytest.approx(dflash["tau"], abs=0.1)
    assert "4/4" in shown and "accepted by position" in shown and "peak memory" in shown and "prose" in shown


@pytest.mark.parametrize("shape, left_out", [
    ({}, set()),
    ({"selector_rank": 4, "selector_top_k": 4}, {"hf-dflash"}),
    ({"layer_types": ("sliding_attention",) * 2, "sliding_window": 5, "is_causal": None}, {"hf-dflash"}),
    (None, {"dflash", "hf-dflash"}),
])  # fmt: skip
def test_methods_that_a_pair_does_not_allow_are_left_out(shape, left_out):
    model = tiny_llama()
    draft = None if shape is None else tiny_draft(model.config, **shape)
    assert set(METHODS) - set(possible(tiny_pair(model, draft))) == left_out


def test_several_block_sizes_become_several_methods(folder, tmp_path):
    path = tmp_path / "numbers.json"
    options = [
        "--methods",
        "dflash,hf-dflash",
        "--block-size",
        "2",
        "4",
        "--limit",
        "1",
        "--repeats",
        "1",
        "--max-new-tokens",
        "6",
    ]
    assert command(folder, *options, "--json", str(path)) == 0
    report = json.loads(path.read_text())
    assert list(report["methods"]) == ["dflash-b2", "dflash-b4", "hf-dflash-b2", "hf-dflash-b4"] and report[
        "block_sizes"
    ] == [2, 4]
    assert len(report["methods"]["dflash-b2"]["acceptance_by_position"]) == 1
    for entry in report["methods"].values():  # nothing to compare with
        assert entry["identical"] is None and entry["compared"] is None and entry["speedup_vs_ar"] is None


def test_above_temperature_0_only_our_own_methods_are_compared(folder, tmp_path):
    path = tmp_path / "numbers.json"
    assert (
        command(
            folder, "--temperature", "1", "--limit", "2", "--repeats", "1", "--max-new-tokens", "8", "--json", str(path)
        )
        == 0
    )
    methods = json.loads(path.read_text())["methods"]
    assert methods["dflash"]["identical"] == 2
    assert [name for name, entry in methods.items() if entry["identical"] is None] == [
        "hf-generate",
        "hf-dflash",
        "prompt-lookup",
    ]


def test_without_a_draft_the_default_methods_need_none(folder, tmp_path):
    path = tmp_path / "numbers.json"
    options = ["--draft", "none", "--limit", "1", "--repeats", "1", "--max-new-tokens", "4", "--json", str(path)]
    assert command(folder, *options) == 0
    assert list(json.loads(path.read_text())["methods"]) == ["ar", "hf-generate", "prompt-lookup"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--repeats", "0"], "'repeats' is 0."),
        (["--limit", "0"], "'limit' is 0."),
        (["--block-size", "5"], "The block size is too large for this draft."),
        (["--methods", "hf-dflash", "--block-size", "5"], "The block size is too large for this draft."),
        (["--draft", "none", "--methods", "hf-dflash"], "This pair cannot draft."),
        (["--prompts", "/nowhere.jsonl"], "The prompt file cannot be read."),
        (["--limit", "1", "--max-new-tokens", "1", "--repeats", "1", "--json", "/nowhere/x.json"], "cannot be written"),
    ],
)
def test_a_users_error_is_one_clean_message(folder, capsys, arguments, message):
    assert command(folder, *arguments) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_a_long_prompt_is_found_before_anything_runs(folder, tmp_path, capsys):
    path = tmp_path / "long.jsonl"
    path.write_text(json.dumps({"messages": [{"role": "user", "content": "x" * 600}]}))
    assert command(folder, "--prompts", str(path)) == 1
    assert "Prompt 1 is too long for this target." in capsys.readouterr().err


def test_an_unknown_method_is_refused(folder, capsys):
    with pytest.raises(SystemExit):
        command(folder, "--methods", "ar,magic")
    assert "unknown method 'magic'" in capsys.readouterr().err


# Methods.


@pytest.mark.parametrize("stops", [(), (2,)])
def test_a_checkpoints_generation_settings_do_not_change_what_is_compared(stops):
    model = tiny_llama()
    pair = tiny_pair(model, tiny_draft(model.config))
    model.generation_config.update(
        repetition_penalty=1.8, no_repeat_ngram_size=0, top_k=3, max_length=7, eos_token_id=[85]
    )
    params = SamplingParams(max_new_tokens=30, stop_token_ids=stops)
    replies = {method.name: method.run(PROMPT).ids for method in make_methods(pair, METHODS, params, [])}
    assert len(set(replies.values())) == 1 and len(replies["ar"]) == 30


def test_all_methods_end_at_the_same_stop_token_and_at_the_context(pair):
    plain = make_methods(pair, ["ar"], SamplingParams(max_new_tokens=30, stop_token_ids=()), [])[0].run(PROMPT).ids
    stop = plain[9]
    for method in make_methods(pair, METHODS, SamplingParams(max_new_tokens=30, stop_token_ids=(stop,)), []):
        assert method.run(PROMPT).ids == plain[: plain.index(stop) + 1], method.name
    long = PROMPT * 101
    for method in make_methods(pair, METHODS, SamplingParams(max_new_tokens=30, stop_token_ids=()), []):
        assert len(method.run(long).ids) == pair.context_length - len(long), method.name


def test_runs_tell_their_times_and_commits(pair):
    for method in make_methods(pair, METHODS, SamplingParams(max_new_tokens=20, stop_token_ids=()), []):
        run = method.run(PROMPT)
        assert 0 < run.first_token_seconds < run.seconds and sum(run.commits) == 20, method.name


def test_methods_that_need_cropping_are_refused_on_recurrent_targets():
    model = tiny_qwen3_5()
    pair = tiny_pair(model, tiny_draft(model.config))
    if not model._is_stateful:
        pytest.skip("this transformers crops recurrent targets")
    with pytest.raises(DFlashError, match="'prompt-lookup' cannot run on this target"):
        make_methods(pair, ["ar", "prompt-lookup"], SamplingParams(), [])


def test_the_logit_gap_is_the_targets_own(pair):
    logits = pair.target.model(torch.tensor([PROMPT])).logits[0, -1]
    assert logit_gap(pair, PROMPT, 7, 50) == pytest.approx(abs(float(logits[7] - logits[50])), abs=1e-5)


# Measuring.


def fake(name: str, log: list[str], fail_at: int | None = None) -> Method:
    def run(ids):
        log.append(name)
        if fail_at is not None and len(log) > fail_at:
            raise KeyboardInterrupt
        return Run((1, 2), 1.0, 0.5, (1, 1))

    return Method(name, "ar", run)


def test_methods_take_turns_and_change_their_order():
    log: list[str] = []
    runs = bench.measure([fake(name, log) for name in "abc"], [[1], [2]], repeats=2)
    assert "".join(log) == "abcbcabcacab" and {name: len(r) for name, r in runs.items()} == {"a": 2, "b": 2, "c": 2}


def test_an_interrupt_keeps_the_complete_repeats():
    log: list[str] = []
    runs = bench.measure([fake("a", log, fail_at=5), fake("b", log)], [[1], [2]], repeats=3)
    assert {name: len(r) for name, r in runs.items()} == {"a": 1, "b": 1}
    with pytest.raises(KeyboardInterrupt):
        bench.measure([fake("a", [], fail_at=1)], [[1], [2]], repeats=3)


def test_no_memory_names_the_method():
    def run(ids):
        raise MemoryError

    with pytest.raises(DFlashError, match="'big' broke on a prompt of 3 tokens"):
        bench._guarded(Method("big", "ar", run), [1, 2, 3])
