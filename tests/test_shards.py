"""Token shards: what is written is what is read, without loading it, whatever kills the writer."""

import errno
import json
from pathlib import Path

import numpy as np
import pytest

from dflash_core.errors import TrainingError
from dflash_core.training.shard_writer import Sample, ShardWriter, write_all
from dflash_core.training.shards import TokenShards


def samples(count, seed=0, vocab=1000):
    random = np.random.default_rng(seed)
    lengths = random.integers(2, 40, count)
    return [
        Sample(random.integers(0, vocab, n), int(random.integers(1, n + 1)), key=i + 1000 * seed, category="ab"[i % 2])
        for i, n in enumerate(lengths)
    ]


def assert_same(shards, expected):
    assert len(shards) == len(expected)
    for i, sample in enumerate(expected):
        tokens, prompt_length = shards[i]
        assert tokens.tolist() == list(sample.tokens) and prompt_length == sample.prompt_length
        assert shards.category(i) == sample.category


@pytest.mark.parametrize("vocab, dtype", [(49152, np.uint16), (151936, np.int32)])
def test_shards_return_what_was_written_as_maps(tmp_path, vocab, dtype):
    expected = samples(50, vocab=vocab)
    writer = ShardWriter(tmp_path, vocab, {"target": "t"}, shard_bytes=500)
    for sample in expected:
        writer.add(sample)
    writer.save()
    shards = TokenShards.open(tmp_path)
    assert len(list(tmp_path.glob("shard-*.safetensors"))) > 3
    assert_same(shards, expected)
    assert shards[0][0].dtype == dtype and isinstance(shards[0][0], np.memmap)
    assert shards.total_tokens == sum(len(s.tokens) for s in expected) == shards.manifests[0]["counts"]["tokens"]
    assert shards.manifests[0]["target"] == "t"
    assert shards[-1][0].tolist() == list(expected[-1].tokens)
    with pytest.raises(IndexError):
        shards[50]


def test_folders_and_npz_are_read_as_one(tmp_path):
    first, second = samples(5), samples(7, seed=1)
    write_all(tmp_path / "a", first, 1000)
    tokens = np.concatenate([s.tokens for s in second]).astype(np.uint16)
    np.savez_compressed(
        tmp_path / "b.npz",
        tokens=tokens,
        length=np.array([len(s.tokens) for s in second], np.int32),
        prompt_length=np.array([s.prompt_length for s in second], np.int32),
    )
    shards = TokenShards.open(tmp_path / "a", tmp_path / "b.npz")
    for i, sample in enumerate(first + second):
        assert shards[i][0].tolist() == list(sample.tokens) and shards[i][1] == sample.prompt_length
    assert shards.lengths.tolist() == [len(s.tokens) for s in first + second]
    assert [m.get("format") for m in shards.manifests] == ["dflash-token-shards", None]
    assert shards.category(0) == "a" and shards.category(6) is None


def test_a_killed_writer_loses_only_what_was_not_saved(tmp_path):
    expected = samples(30)
    writer = ShardWriter(tmp_path, 1000, {"target": "t"}, shard_bytes=500)
    for sample in expected:
        writer.add(sample)
    del writer  # killed: the last shard was never saved
    (tmp_path / ".shard-00099.safetensors.partial").write_bytes(b"half a shard")
    kept = TokenShards.open(tmp_path)
    assert 10 < len(kept) < 30
    again = ShardWriter(tmp_path, 1000, {"target": "t"}, shard_bytes=500)
    assert again.done == kept.keys() and again.counts()["sequences"] == len(kept)
    for sample in expected:
        if sample.key not in again.done:
            again.add(sample)
    again.save()
    assert_same(TokenShards.open(tmp_path), expected)
    assert not list(tmp_path.glob(".*.partial"))


def test_a_shard_in_progress_is_saved_in_place(tmp_path):
    expected = samples(9)
    writer = ShardWriter(tmp_path, 1000, {}, save_seconds=0.0)
    for sample in expected:
        writer.add(sample)
    assert [p.name for p in tmp_path.glob("shard-*")] == ["shard-00000.safetensors"]
    assert_same(TokenShards.open(tmp_path), expected)


def test_another_runs_folder_is_refused(tmp_path):
    write_all(tmp_path, samples(3), 1000, target="one")
    with pytest.raises(TrainingError, match="other data.*target is 'one', this run's is 'two'"):
        ShardWriter(tmp_path, 1000, {"target": "two"})
    with pytest.raises(TrainingError, match="other data"):
        ShardWriter(tmp_path, 2000, {"target": "one"})


def test_a_full_disk_is_reported_and_costs_nothing_saved(tmp_path, monkeypatch):
    writer = ShardWriter(tmp_path, 1000, {})
    for sample in samples(3):
        writer.add(sample)
    writer.save()

    def full(path, data):
        with path.open("wb") as file:
            file.write(data[:9])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    writer.add(samples(1, seed=1)[0])
    with pytest.raises(TrainingError, match="disk is full"):
        writer.save()
    assert len(TokenShards.open(tmp_path)) == 3 and not list(tmp_path.glob(".*.partial"))


@pytest.mark.parametrize("damage", ["missing", "empty", "cut", "text", "lengths", "manifest"])
def test_bad_data_is_named(tmp_path, damage):
    path = tmp_path / "data"
    if damage != "missing":
        write_all(path, samples(3), 1000)
        shard = path / "shard-00000.safetensors"
        if damage == "empty":
            shard.unlink()
        elif damage == "cut":
            shard.write_bytes(shard.read_bytes()[:-10])
        elif damage == "text":
            shard.write_text("hello, I am no shard")
        elif damage == "lengths":
            shard.unlink()
            np.savez(
                path / "shard-00000.npz",
                tokens=np.zeros(5, np.uint16),
                length=np.array([3]),
                prompt_length=np.array([1]),
            )
        else:
            (path / "manifest.json").write_text("{")
    with pytest.raises(TrainingError, match=str(path)):
        TokenShards.open(path)


def test_the_manifest_is_plain_json(tmp_path):
    writer = ShardWriter(tmp_path, 1000, {"target": "t"})
    writer.add(samples(1)[0])
    writer.record_run(seconds=1.5, tokens_per_second=20)
    manifest = json.loads((tmp_path / "manifest.json").read_text())
    assert manifest["runs"] == [{"seconds": 1.5, "tokens_per_second": 20}]
    assert manifest["counts"]["sequences"] == 1
