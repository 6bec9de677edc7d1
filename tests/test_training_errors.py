"""What a training run refuses, with one clear message and before any long work; a loss that stops being a number."""

import json
import math
import resource
import shutil
from collections import namedtuple
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from accelerate.utils import DistributedType
from safetensors.torch import load_file

from dflash_core.errors import TrainingError
from dflash_core.training import machine, state, train
from dflash_core.training.settings import parser
from dflash_core.training.trainer import Progress, Trainer
from tests.progressions import cases, fresh_process, options, prompt_ids, reply_ids, world, write_data
from tests.tiny import tiny_draft, tiny_gemma3, tiny_llama, write_draft, write_target

SHORT = {"max_steps": 6, "evaluate_every": 50, "save_every": 2, "log_every": 1, "held_out_tokens": 12}


pytestmark = pytest.mark.usefixtures("fresh_process")


def refused(output: Path, capsys, *messages: str, **changes) -> None:
    """The command says all of `messages` and has neither asked the target for replies nor trained."""
    assert train.main(options(output, **SHORT | changes)) == 2
    err = capsys.readouterr().err
    assert "Traceback" not in err
    for message in messages:
        assert message in err
    assert not (output / "heldout.npz").exists() and not (output / "state").exists()


def two() -> list[tuple[list[int], list[int]]]:
    return [(prompt_ids(*case), reply_ids(*case)) for case in list(cases())[:2]]


# Data.


@pytest.mark.parametrize(
    "name, content, message",
    [
        ("data.npz", b"PK\x03\x04 no archive", "cannot be read"),
        ("data.npz", b"", "cannot be read"),
        ("data.safetensors", b'{"messages": []}\n' * 9, "cannot be read"),
        ("data.jsonl", b'{"messages": [{"role": "user", "content": "A3"}]}\n' * 9, "cannot be read"),
    ],
)
def test_data_that_is_none_is_refused(tmp_path, capsys, name, content, message):
    (tmp_path / name).write_bytes(content)
    refused(tmp_path / "out", capsys, message, name, data=tmp_path / name)


def test_data_that_is_cut_off_missing_or_empty_is_refused(tmp_path, capsys):
    whole = (world() / "data.npz").read_bytes()
    (tmp_path / "half.npz").write_bytes(whole[: len(whole) // 2])
    refused(tmp_path / "out", capsys, "cannot be read", "half.npz", data=tmp_path / "half.npz")
    refused(tmp_path / "out", capsys, "There is no training data.", "does not exist", data=tmp_path / "none")
    (tmp_path / "folder").mkdir()
    refused(tmp_path / "out", capsys, "There is no training data.", "no sequence", data=tmp_path / "folder")
    np.savez(tmp_path / "nothing.npz", **{n: np.empty(0, np.int32) for n in ("tokens", "length", "prompt_length")})
    refused(tmp_path / "out", capsys, "There is no training data.", data=tmp_path / "nothing.npz")


def test_data_without_anything_to_learn_is_refused(tmp_path, capsys):
    write_data(tmp_path / "short.npz", [(prompt_ids(0, 1), [5])] * 6)
    refused(tmp_path / "out", capsys, "There is nothing to train on.", data=tmp_path / "short.npz")
    write_data(tmp_path / "one.npz", two()[:1])
    refused(tmp_path / "out", capsys, "There is nothing to evaluate on.", "1 sequences", data=tmp_path / "one.npz")
    refused(tmp_path / "out", capsys, "--held-out is 0", held_out=0)


def test_sequences_that_do_not_fit_are_refused(tmp_path, capsys):
    write_data(tmp_path / "long.npz", [*two(), ([5] * 20, [6] * 500)])
    long = {"data": tmp_path / "long.npz", "context_tokens": 1024}
    refused(tmp_path / "out", capsys, "longer than the target's context", "520 tokens, the context 512", **long)
    refused(tmp_path / "out", capsys, "does not fit into a packed row", "41 tokens", "128 or more", context_tokens=40)
    write_data(tmp_path / "foreign.npz", [*two(), ([5, 6], [7, 300, 8])])
    refused(tmp_path / "out", capsys, "does not fit the target", "token 300", "128", data=tmp_path / "foreign.npz")


def test_held_out_prompts_that_cannot_be_used_are_refused(tmp_path, capsys):
    path = tmp_path / "prompts.jsonl"
    for content, message in (
        ("", "is empty"),
        ("{}\n", "line 1"),
        ("no json\n", "line 1"),
        ('{"messages": []}', "line 1"),
    ):
        path.write_text(content)
        refused(tmp_path / "out", capsys, message, str(path), prompts=path)
    refused(tmp_path / "out", capsys, "cannot be read", prompts=tmp_path / "none.jsonl")
    line = {"messages": [{"role": "user", "content": "7" * 240}]}
    path.write_text(json.dumps(line))
    refused(tmp_path / "out", capsys, "A held-out prompt does not fit", "--context-tokens is 256", prompts=path)
    fits = {"context_tokens": 4096, "held_out_tokens": 400}
    refused(tmp_path / "out", capsys, "A held-out prompt does not fit", "context is 512", prompts=path, **fits)


# Target and draft.


@pytest.mark.parametrize(
    "changes, messages",
    [
        ({"taps": [1, 4]}, ["The taps do not fit the target.", "[1, 4] of 4"]),
        ({"mask_token_id": 128}, ["The mask token does not fit the target.", "Id 128, vocabulary 128"]),
        ({"layers": 0}, ["--layers is 0.", "at least 1"]),
        ({"block_size": 1}, ["--block-size is 1."]),
        ({"ema": 1.0}, ["--ema is 1.0."]),
        ({"distil": 0.5, "softmax": "sampled"}, ["Two settings disagree."]),
        ({"distil": 0.5, "feature_cache": "disk"}, ["Two settings disagree."]),
        ({"dtype": "bfloat16"}, ["Two settings disagree.", "--mixed-precision no with --dtype bfloat16."]),
        ({"intermediate_size": 0}, ["--intermediate-size is 0."]),
        ({"selector_rank": -1}, ["--selector-rank is -1."]),
        ({"attention": "flex"}, ["Flex attention cannot train here."]),
        ({"anchors": 100_000}, ["The attention mask does not fit into memory.", "GB", "Lower --anchors"]),
        ({"target": "/nowhere/model"}, ["/nowhere/model"]),
    ],
)
def test_settings_that_cannot_work_are_refused(tmp_path, capsys, changes, messages):
    refused(tmp_path / "out", capsys, *messages, **changes)


def test_targets_and_drafts_that_do_not_fit_are_refused(tmp_path, capsys):
    write_target(tmp_path / "gemma", tiny_gemma3())
    refused(tmp_path / "out", capsys, "sliding_attention", "cannot be trained for", target=tmp_path / "gemma")
    other = tiny_llama(hidden_size=16)
    write_draft(tmp_path / "draft", tiny_draft(other.config))
    refused(tmp_path / "out", capsys, "The first draft does not fit the target.", init_from=tmp_path / "draft")
    refused(tmp_path / "out", capsys, "nowhere", init_from=tmp_path / "nowhere")


# The output folder.


def test_an_output_folder_that_cannot_be_one_is_refused(tmp_path, capsys):
    (tmp_path / "file").write_text("")
    assert train.main(options(tmp_path / "file" / "out", **SHORT)) == 2
    assert "The output folder cannot be used." in capsys.readouterr().err


def test_a_full_disk_is_told_with_what_is_needed(tmp_path, capsys, monkeypatch):
    write_data(tmp_path / "large.npz", two() * 400)
    free = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(0, 0, 1_000_000))
    refused(tmp_path / "out", capsys, "There is no room for checkpoints.", "3 MB are needed, 1 MB are free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: free(0, 0, 5_000_000))
    # 32,801 places of two taps of 64 float32.
    message = "It needs 17 MB, 5 MB are free on the disk."
    refused(tmp_path / "out", capsys, message, feature_cache="disk", data=tmp_path / "large.npz")


@pytest.mark.parametrize(
    "limit_bytes, kept_step, message",
    [(3_000, 2, "A checkpoint cannot be saved."), (600_000, 6, "A file cannot be read or written.")],
)
def test_a_disk_that_fills_up_in_the_middle_keeps_the_last_state(tmp_path, capsys, limit_bytes, kept_step, message):
    """A limit on a file's size stands for the full disk: states fail, or only the plot. With room the run goes on."""
    output = tmp_path / "out"
    assert train.main(options(output, **SHORT | {"max_steps": 2})) == 0
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit_bytes, before[1]))
    try:
        assert train.main(options(output, **SHORT | {"max_steps": 6})) == 2
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capsys.readouterr().err
    assert message in err and "File too large" in err and "run the same command again" in err
    assert state.find_state(output)[1]["progress"]["step"] == kept_step
    assert train.main(options(output, **SHORT | {"max_steps": 6})) == 0
    assert state.find_state(output)[1]["progress"]["step"] == 6


def test_another_runs_state_is_not_overwritten(tmp_path, capsys):
    output = tmp_path / "out"
    assert train.main(options(output, **SHORT)) == 0
    before = (output / "last" / "model.safetensors").read_bytes()
    write_data(tmp_path / "other.npz", two() * 4)
    for changes, message in (
        ({"lr": 0.5}, "'lr' was None, now it is 0.5"),
        ({"block_size": 4}, "'block_size' was 6, now it is 4"),
        ({"data": tmp_path / "other.npz", "held_out": 2}, "'data' was"),
    ):
        capsys.readouterr()
        assert train.main(options(output, **SHORT | changes)) == 2
        err = capsys.readouterr().err
        assert "holds the checkpoint of another run" in err and message in err and str(output) in err
    assert (output / "last" / "model.safetensors").read_bytes() == before
    # What does not change the result may change.
    assert train.main(options(output, **SHORT | {"log_every": 3, "save_every": 5})) == 0


def test_a_draft_without_its_state_is_not_overwritten(tmp_path, capsys):
    output = tmp_path / "out"
    assert train.main(options(output, **SHORT)) == 0
    shutil.rmtree(output / "state")
    before = (output / "last" / "model.safetensors").read_bytes()
    (output / "heldout.npz").unlink()
    refused(output, capsys, "without the state that would continue it", str(output), "--init-from")
    assert (output / "last" / "model.safetensors").read_bytes() == before
    assert train.main(options(tmp_path / "next", **SHORT, init_from=output / "last")) == 0


def test_a_draft_caught_between_two_renames_is_put_back(tmp_path):
    (tmp_path / ".best.old").mkdir()
    (tmp_path / ".best.old" / "config.json").write_text("{}")
    (tmp_path / "last").mkdir()
    (tmp_path / ".last.old").mkdir()
    assert state.find_state(tmp_path) is None
    assert (tmp_path / "best" / "config.json").exists() and (tmp_path / "last").exists()


# A loss that is no number.


def test_a_loss_that_is_no_number_stops_the_run_and_names_the_batch(tmp_path, capsys, monkeypatch):
    seen, inputs = [], train.InputSource.inputs

    def poisoned(self, batch):
        seen.append(batch.pack)
        found = inputs(self, batch)
        if len(seen) == 5:
            found.features[:] = torch.nan
        return found

    monkeypatch.setattr(train.InputSource, "inputs", poisoned)
    output = tmp_path / "out"
    assert train.main(options(output, **SHORT, feature_cache="cpu")) == 2
    err, bad = capsys.readouterr().err, seen[4]
    assert "The loss is no longer a number." in err and "--init-from" in err
    assert f"epoch {bad.epoch}, row {bad.number}, sequences {list(bad.documents)[:8]}"[:-1] in err
    assert state.find_state(output)[1]["progress"]["step"] == 4
    for folder in (output / "last", state.find_state(output)[0]):
        for path in folder.glob("*.safetensors"):
            assert all(tensor.isfinite().all() for tensor in load_file(path).values())
    monkeypatch.undo()
    assert train.main(options(output, **SHORT)) == 0


@pytest.mark.parametrize("scaled", [False, True])
def test_a_step_that_a_loss_scaler_skips_does_not_stop_the_run(scaled):
    """float16: after an infinite gradient the scaler skips the step and lowers its factor; the loss is finite."""
    made = Trainer.__new__(Trainer)
    made.accelerator, made.metrics = SimpleNamespace(scaler=object() if scaled else None), None
    made.progress, made._logged_at, made._pending_steps = Progress(step=3), 0.0, 1
    batch = SimpleNamespace(pack=SimpleNamespace(epoch=0, number=2, documents=(4,)))

    def flush(loss: float, gradient: float) -> None:
        made._pending = [(batch, torch.tensor([loss, gradient, 3.0, 4.0]))]
        made._flush()

    flush(1.0, 2.0)
    with pytest.raises(TrainingError, match="row 2, sequences"):
        flush(math.nan, 2.0)
    with nullcontext() if scaled else pytest.raises(TrainingError):
        flush(1.0, math.inf)


# Sharding.


@pytest.mark.parametrize("optimizer, why", [("muon", "Muon needs whole matrices."), ("adamw", "one shard only")])
@pytest.mark.parametrize("kind", [DistributedType.FSDP, DistributedType.DEEPSPEED])
def test_sharding_is_refused(tmp_path, capsys, monkeypatch, kind, optimizer, why):
    monkeypatch.setattr(machine.Accelerator, "distributed_type", kind)
    refused(
        tmp_path / "out", capsys, "A draft cannot be trained in shards.", kind.value, why, "DDP", optimizer=optimizer
    )


def test_every_option_says_what_it_is_for():
    text = parser().format_help()
    for name in ("--no-overlap-anchors", "--feature-cache", "--init-from", "--pause-minutes"):
        assert name in text
    assert all(action.help for action in parser()._actions)
