"""Finds checkpoint folders on disk or on the Hub and names their files; knows nothing of what the weights mean."""

import errno
import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeAlias

from safetensors import SafetensorError

from dflash_core.errors import LoadError

Progress: TypeAlias = Callable[[str, float | None], None]

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Folders inside a repository and "consolidated" files repeat the same weights in another format.
_UNWANTED = ("*/*", "consolidated*")


def local_folder(source: str) -> Path | None:
    """The folder if `source` names one on this machine, None for a Hub id. Raises `LoadError` for a missing path."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    is_path = source.startswith((".", "/", "~", "\\")) or source.count("/") != 1 or "\\" in source or path.exists()
    if is_path:
        found = "It is a file" if path.is_file() else "There is no such folder"
        raise LoadError(
            f"The model '{source}' was not found.",
            f"{found}.",
            "Give a checkpoint's folder or a Hub id like 'owner/name'.",
        )
    return None


def config_path(source: str, *, revision: str | None = None, local_files_only: bool = False) -> Path:
    """A checkpoint's config.json alone, so that a wrong one is refused before its weights are fetched."""
    folder = local_folder(source)
    if folder is not None:
        return folder / "config.json"
    from huggingface_hub import hf_hub_download

    with hub_errors(source):
        return Path(hf_hub_download(source, "config.json", revision=revision, local_files_only=local_files_only))


def fetch(source: str, what: str, progress: Progress, *, revision: str | None, local_files_only: bool) -> Path:
    """The whole checkpoint as a local folder, downloaded from the Hub when `source` is an id."""
    folder = local_folder(source)
    if folder is not None:
        return folder
    from huggingface_hub import snapshot_download

    message = f"Fetching {what} from the Hub"
    progress(message, None)
    with hub_errors(source), disk_errors(Path.home()):
        return Path(
            snapshot_download(
                source,
                revision=revision,
                local_files_only=local_files_only,
                allow_patterns=list(_WANTED),
                ignore_patterns=list(_UNWANTED),
                tqdm_class=_bar_class(message, progress),
            )
        )


def _bar_class(message: str, progress: Progress) -> type:
    """A tqdm that draws nothing and passes on the fraction of bytes that are on disk."""
    from tqdm.auto import tqdm

    class Forward(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            # Among the Hub's bars, one counts files and one bytes on the wire, whose total is a guess.
            self._counts = options.get("unit") == "B" and options.get("desc") != "Downloading bytes"
            super().__init__(*args, **(options | {"disable": False, "gui": True}))

        def display(self, *args: Any, **options: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self._counts and self.total:
                progress(message, min(self.n / self.total, 1.0))
            return None

    return Forward


@contextmanager
def hub_errors(source: str) -> Iterator[None]:
    """Hub and network failures as sentences."""
    from huggingface_hub import errors as hub

    wrong = f"The model '{source}' could not be fetched from the Hub."
    # The base error of the HTTP client that this version of the Hub library was built on.
    http_error = getattr(hub, "HTTPError", hub.HfHubHTTPError)
    try:
        yield
    except hub.GatedRepoError as error:
        do = "Accept its licence on huggingface.co and log in with: hf auth login."
        raise LoadError(wrong, "Access to it is restricted.", do) from error
    except hub.RepositoryNotFoundError as error:
        raise LoadError(
            wrong, "There is no such public model.", "Check the spelling, or log in if it is private."
        ) from error
    except hub.RevisionNotFoundError as error:
        raise LoadError(wrong, "The revision does not exist.", "Give an existing branch, tag or commit.") from error
    except hub.LocalEntryNotFoundError as error:
        do = "Connect to the network, or give a local folder."
        raise LoadError(wrong, "It is not on this machine and the Hub could not be asked.", do) from error
    except hub.EntryNotFoundError as error:
        raise LoadError(wrong, "It has no config.json.", "Choose a model in the transformers layout.") from error
    except hub.HFValidationError as error:
        raise LoadError(wrong, "It is not a valid Hub id.", "Give 'owner/name' or a local folder.") from error
    except (http_error, ConnectionError, TimeoutError) as error:
        raise LoadError(
            wrong, f"The connection failed: {first_line(error)}", "Check the network and try again."
        ) from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(
            "This folder holds no checkpoint.",
            f"There is no {path.name} in {path.parent}.",
            "Give the folder that has one.",
        ) from error
    except (OSError, ValueError) as error:
        raise LoadError(
            "A checkpoint's file is unreadable.",
            f"{path} is not valid JSON: {error}.",
            "Download the checkpoint again.",
        ) from error
    if not isinstance(value, dict):
        raise LoadError(
            "A checkpoint's file is unreadable.", f"{path} holds no JSON object.", "Download the checkpoint again."
        )
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or as indexed. Raises `LoadError` for pickles and missing shards."""
    if (folder / SINGLE).is_file():
        return [folder / SINGLE]
    if (folder / INDEX).is_file():
        return _indexed_files(folder)
    pickles = sorted(path.name for pattern in PICKLES for path in folder.glob(pattern))
    if pickles:
        raise LoadError(
            "Weights in pickle files are refused, they can run code.",
            f"{folder} holds {pickles[0]} and no safetensors.",
            "Convert the checkpoint to safetensors first.",
        )
    raise LoadError(
        "The checkpoint has no weights.", f"There is no {SINGLE} in {folder}.", "Download the checkpoint again."
    )


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError(
            "The checkpoint's index is unusable.", f"Its {INDEX} has no 'weight_map'.", "Download the checkpoint again."
        )
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError("The checkpoint's index is unusable.", f"It names the file '{name}'.", "Download it again.")
        if not (folder / name).is_file():
            raise LoadError(
                "The checkpoint is incomplete.", f"The shard {name} is missing in {folder}.", "Download it again."
            )
    return [folder / name for name in names]


@contextmanager
def weight_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise LoadError(
            "The weights are damaged or cut short.",
            f"Reading {where} failed: {error}.",
            "Download the checkpoint again.",
        ) from error


def disk_full(folder: Path, found: str = "The disk is full.") -> LoadError:
    return LoadError(
        f"There is no room for the model in {folder}.", found, "Free some space or choose another cache folder."
    )


@contextmanager
def disk_errors(folder: Path) -> Iterator[None]:
    """Turn a full disk or a forbidden folder into a sentence; Rust writers say it in text only."""
    try:
        yield
    except Exception as error:
        number, text = getattr(error, "errno", None), str(error)
        if number in (errno.ENOSPC, errno.EDQUOT) or "os error 28" in text or "No space left" in text:
            raise disk_full(folder) from error
        if isinstance(error, PermissionError | NotADirectoryError | FileExistsError) or number == errno.EROFS:
            raise LoadError(
                "The model's folder cannot be written.",
                f"{text}.",
                "Allow writing there or choose another cache folder.",
            ) from error
        raise


def first_line(error: Exception) -> str:
    """What another library said, as one sentence."""
    if isinstance(error, KeyError):
        return f"The entry {error} is missing."
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    text = " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
    return f"{text[:300].rstrip('.,:;! ')}."
