"""Finds checkpoint folders on disk or on the Hub and reads draft models from them; knows nothing of pairs or devices."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file

from dflash_core.config import DraftConfig
from dflash_core.default_target import Progress, disk_errors
from dflash_core.errors import LoadError
from dflash_core.model import DFlashDraftModel

ARCHITECTURE = "DFlashDraftModel"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
DRAFT_DTYPES = ("F32", "F16", "BF16")
_WANTED = ("*.json", "*.safetensors", "*.txt", "*.model", "*.jinja", "*.tiktoken")
# Folders inside a repository and "consolidated" files repeat the same weights in another format.
_UNWANTED = ("*/*", "consolidated*")


def local_folder(source: str) -> Path | None:
    """The folder if `source` names one on this machine, None if it is a Hub id. Raises `LoadError` for a missing path."""
    path = Path(source).expanduser()
    if path.is_dir():
        return path
    is_path = source.startswith((".", "/", "~", "\\")) or source.count("/") != 1 or "\\" in source or path.exists()
    if is_path:
        found = "It is a file" if path.is_file() else "There is no such folder"
        raise LoadError(
            f"The model '{source}' was not found.", f"{found}.", "Give a checkpoint's folder or a Hub id like 'owner/name'."
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
    """A tqdm that draws nothing and passes the download's fraction on."""
    from tqdm.auto import tqdm

    class Forward(tqdm):
        def __init__(self, *args: Any, **options: Any) -> None:
            options.pop("name", None)
            super().__init__(*args, **(options | {"disable": False, "gui": True}))

        def display(self, *args: Any, **options: Any) -> None:
            pass

        def update(self, n: float | None = 1) -> bool | None:
            self.n += n or 0
            if self.unit == "B" and self.total:
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
        raise LoadError(wrong, "There is no such public model.", "Check the spelling, or log in if it is private.") from error
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
        first_line = (str(error).splitlines() or [type(error).__name__])[0]
        raise LoadError(wrong, f"The connection failed: {first_line}.", "Check the network and try again.") from error


def read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise LoadError(
            "This folder holds no checkpoint.", f"There is no {path.name} in {path.parent}.", "Give the folder that has one."
        ) from error
    except (OSError, ValueError) as error:
        raise LoadError(
            "A checkpoint's file is unreadable.", f"{path} is not valid JSON: {error}.", "Download the checkpoint again."
        ) from error
    if not isinstance(value, dict):
        raise LoadError(
            "A checkpoint's file is unreadable.", f"{path} holds no JSON object.", "Download the checkpoint again."
        )
    return value


def read_draft_config(raw: dict[str, Any]) -> DraftConfig:
    """Dispatch on `architectures` and `dflash_config`: a plain Qwen3 has the same model type. Raises `LoadError`."""
    names = raw.get("architectures") or []
    is_marked = isinstance(raw.get("dflash_config"), dict)
    if names and ARCHITECTURE not in names:
        wrong = "This draft is a variant that is not supported." if is_marked else "This is not a DFlash draft model."
        raise LoadError(
            wrong, f"Its config.json declares {', '.join(map(str, names))}.", f"Give a checkpoint that declares {ARCHITECTURE}."
        )
    if not names and not is_marked:
        raise LoadError(
            "This is not a DFlash draft model.",
            "Its config.json has neither 'architectures' nor 'dflash_config'.",
            f"Give a checkpoint that declares {ARCHITECTURE}.",
        )
    return DraftConfig.from_dict(raw)


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a checkpoint, one or as its index says. Raises `LoadError` for pickles and missing shards."""
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
    raise LoadError("The checkpoint has no weights.", f"There is no {SINGLE} in {folder}.", "Download the checkpoint again.")


def _indexed_files(folder: Path) -> list[Path]:
    weight_map = read_json(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise LoadError("The checkpoint's index is unusable.", f"{INDEX} has no 'weight_map'.", "Download the checkpoint again.")
    names = sorted({str(name) for name in weight_map.values()})
    for name in names:
        if Path(name).name != name or not name.endswith(".safetensors"):
            raise LoadError("The checkpoint's index is unusable.", f"It names the file '{name}'.", "Download it again.")
        if not (folder / name).is_file():
            raise LoadError("The checkpoint is incomplete.", f"The shard {name} is missing in {folder}.", "Download it again.")
    return [folder / name for name in names]


@contextmanager
def weight_errors(where: Path) -> Iterator[None]:
    try:
        yield
    except (SafetensorError, OSError) as error:
        raise LoadError(
            "The weights are damaged or cut short.", f"Reading {where} failed: {error}.", "Download the checkpoint again."
        ) from error


def check_draft_weights(files: list[Path], config: DraftConfig) -> None:
    """Compare the files' headers with what this shape needs: every key, no other, right sizes and types."""
    found: dict[str, tuple[tuple[int, ...], str]] = {}
    for path in files:
        with weight_errors(path), safe_open(path, framework="pt") as file:
            for name in file.keys():
                part = file.get_slice(name)
                found[name] = (tuple(part.get_shape()), part.get_dtype())
    expected = {name: tuple(value.shape) for name, value in empty_draft(config).state_dict().items()}
    _check_names(set(found), set(expected))
    for name, shape in expected.items():
        if found[name][0] != shape:
            raise LoadError(
                "The draft's weights do not fit its config.json.",
                f"'{name}' has shape {list(found[name][0])}, expected {list(shape)}.",
                "Use the config.json that belongs to these weights.",
            )
        if found[name][1] not in DRAFT_DTYPES:
            raise LoadError(
                "The draft's weights have a type that is not supported.",
                f"'{name}' is stored as {found[name][1]}.",
                f"Use a checkpoint in {', '.join(DRAFT_DTYPES)}.",
            )


def _check_names(found: set[str], expected: set[str]) -> None:
    missing, extra = sorted(expected - found), sorted(found - expected)
    if any("qkv" in name for name in extra):
        variant = "fused query, key and value weights"
    elif any("embed_tokens" in name or "lm_head" in name for name in extra):
        variant = "an embedding or head of its own"
    else:
        variant = None
    if variant is not None:
        raise LoadError(
            "This draft is a variant that is not supported.", f"It has {variant}.", "Use a draft in the plain DFlash layout."
        )
    if missing or extra:
        raise LoadError(
            "The draft's weights do not fit its config.json.",
            f"{len(missing)} tensors are missing and {len(extra)} unexpected, such as '{(missing or extra)[0]}'.",
            "Use a complete draft in the plain DFlash layout.",
        )


def empty_draft(config: DraftConfig) -> DFlashDraftModel:
    """The draft's shape without memory behind it."""
    with torch.device("meta"):
        return DFlashDraftModel(config)


def load_draft(files: list[Path], config: DraftConfig, device: torch.device, dtype: torch.dtype) -> DFlashDraftModel:
    """Read checked weights into a draft model, frozen, in evaluation mode, on `device` as `dtype`."""
    tensors: dict[str, torch.Tensor] = {}
    for path in files:
        with weight_errors(path):
            tensors |= {name: value.to(device, dtype) for name, value in load_file(path).items()}
    draft = empty_draft(config)
    draft.load_state_dict(tensors, strict=True, assign=True)
    return draft.eval().requires_grad_(False)
