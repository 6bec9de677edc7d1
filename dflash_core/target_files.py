"""Reads a target's configuration, tokenizer and weights onto a device; knows nothing of drafts, pairs or the Hub."""

import importlib.util
import platform
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError

from dflash_core.checkpoints import first_line, read_json, weight_files
from dflash_core.errors import LoadError
from dflash_core.target import Target

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
QUANTIZE = ("4bit", "8bit")
# Text model types whose recurrent layers give the same logits after a rollback as without one (tested).
ROLLED_BACK_RECURRENT = (
    "qwen3_5_text", "qwen3_5_moe_text", "qwen3_next", "falcon_h1", "nemotron_h", "olmo_hybrid",
)  # fmt: skip
TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tekken.json", "spiece.model", "vocab.txt")
# Up to this size on disk a 16-bit target may be widened to float32 on a CPU.
WIDEN_BYTES = 2_000_000_000


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


def target_options(device: str, dtype: str, device_map: Any, quantize: str | None) -> dict[str, Any]:
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


def read_target_config(path: Path) -> Any:
    """The target's text configuration, defaults filled in by transformers."""
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING, AutoConfig

    raw = read_json(path)
    if isinstance(raw.get("dflash_config"), dict):
        raise LoadError(
            "This target is a draft model.", f"{path} has a 'dflash_config'.", "Give it as the draft instead."
        )
    try:
        config = AutoConfig.from_pretrained(path.parent, local_files_only=True, trust_remote_code=False)
    except (ValueError, KeyError, TypeError, OSError, StrictDataclassError) as error:
        raise LoadError(
            "The target's config.json cannot be used.", first_line(error), "Choose a model that transformers knows."
        ) from error
    text = config.get_text_config(decoder=True)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise LoadError(
            "The target is not a causal language model.",
            f"Its model type is '{config.model_type}'.",
            "Choose one that is.",
        )
    return text


def load_tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    if not any((folder / name).is_file() for name in TOKENIZER_FILES):
        raise LoadError(
            "The target has no tokenizer.",
            f"There is no {TOKENIZER_FILES[0]} in {folder}.",
            "Download the target again.",
        )
    try:
        return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # the Rust reader raises plain Exception
        raise LoadError(
            "The target's tokenizer cannot be read.", first_line(error), "Download the target again."
        ) from error


def load_model(folder: Path, options: dict[str, Any]) -> Any:
    """The causal language model of a checked folder; every weight comes from its safetensors. Raises `LoadError`."""
    from transformers import AutoModelForCausalLM

    options = options | {"dtype": _widened(folder, options)}
    try:
        model, found = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            ignore_mismatched_sizes=True,
            output_loading_info=True,
            **options,
        )
    except (OSError, ValueError, KeyError, ImportError, SafetensorError, RuntimeError) as error:
        if is_out_of_memory(error):
            raise
        raise LoadError(
            "The target cannot be loaded.", first_line(error), "Download it again or choose another."
        ) from error
    # transformers fills what a file lacks with random numbers and only logs it; a mismatch holds (name, shape, shape).
    lacking = sorted(found["missing_keys"]) or sorted(name for name, *_ in found["mismatched_keys"])
    if lacking:
        raise LoadError(
            "The target's weights are incomplete.",
            f"{len(lacking)} tensors are missing or misshapen, such as '{lacking[0]}'.",
            "Download the target again.",
        )
    _check_recurrence(model.config.get_text_config(decoder=True), type(model).__name__, model._is_stateful)
    return model


def _widened(folder: Path, options: dict[str, Any]) -> torch.dtype | str:
    """The dtype to load with. Where bfloat16 is emulated, a block takes 1.5 to 2 times as long as in float32."""
    if options["dtype"] != "auto" or "device_map" in options or has_native_bfloat16():
        return options["dtype"]
    size = sum(path.stat().st_size for path in weight_files(folder))
    return torch.float32 if size <= WIDEN_BYTES else "auto"


def has_native_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 itself; asked of x86 only, elsewhere assumed."""
    return platform.machine().lower() not in ("x86_64", "amd64") or torch.cpu._is_avx512_bf16_supported()


def _check_recurrence(config: Any, class_name: str, is_stateful: bool) -> None:
    """Recurrent families keep states in ways of their own; only those whose rollback was measured exact may pass."""
    if is_stateful and config.model_type not in ROLLED_BACK_RECURRENT:
        raise LoadError(
            "This target keeps a state that cannot be rolled back.",
            f"{class_name} is a recurrent model of a family that was not proven.",
            "Use a target with full, sliding-window or Qwen3.5-style linear attention.",
        )


def stop_token_ids(target: Target, tokenizer: Any) -> tuple[int, ...]:
    """What `generate` stops at: the generation config's ids, else the config's, else the tokenizer's."""
    for holder in (target.model.generation_config, target.config, tokenizer):
        ids = getattr(holder, "eos_token_id", None)
        if ids is not None:
            return (ids,) if isinstance(ids, int) else tuple(ids)
    return ()


def context_length(target: Target, tokenizer: Any) -> int:
    return getattr(target.config, "max_position_embeddings", None) or min(tokenizer.model_max_length, 2**20)


def is_out_of_memory(error: BaseException) -> bool:
    """PyTorch's CPU allocator raises a plain RuntimeError."""
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and "DefaultCPUAllocator" in str(error)


@contextmanager
def memory_errors() -> Iterator[None]:
    """No memory left is the user's to mend; everything else passes."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise LoadError(
            "The pair does not fit into memory.",
            first_line(error),
            "Choose quantize='4bit', another device or a smaller pair.",
        ) from error
