"""How to compute on this machine: processes, precision, masks, compiling; knows no target and no data."""

import os
from dataclasses import dataclass

import torch
from accelerate import Accelerator
from accelerate.utils import DistributedType

from dflash_core.errors import TrainingError
from dflash_core.masks import TILE
from dflash_core.training.report import shown_bytes
from dflash_core.training.settings import TrainSettings

_SHARDING = (DistributedType.FSDP, DistributedType.DEEPSPEED, DistributedType.MEGATRON_LM)
# A dense mask is kept as bools and once more as float32 by the attention itself.
_DENSE_BYTES = 5


@dataclass(frozen=True)
class Machine:
    """Every "auto" decided."""

    accelerator: Accelerator
    use_flex: bool
    compile: bool
    dtype: str


def decide_machine(settings: TrainSettings) -> Machine:
    """Raises `TrainingError` for settings that cannot work here."""
    on_gpu = torch.cuda.is_available() and settings.device in ("auto", "cuda") or settings.device.startswith("cuda")
    precision = ("bf16" if on_gpu else "no") if settings.mixed_precision == "auto" else settings.mixed_precision
    # Without mixed precision the float32 draft reads the target's features as they are.
    dtype = "float32" if (precision, settings.dtype) == ("no", "auto") else settings.dtype
    if precision == "no" and dtype != "float32":
        found = f"--mixed-precision {precision} with --dtype {dtype}."
        raise TrainingError("Two settings disagree.", found, "Use --dtype float32, or --mixed-precision bf16.")
    accelerator = Accelerator(
        mixed_precision=precision, gradient_accumulation_steps=settings.accumulate, cpu=settings.device == "cpu"
    )
    _check_sharding(settings, accelerator)
    use_flex = on_gpu if settings.attention == "auto" else settings.attention == "flex"
    if use_flex:
        _check_flex(settings, on_gpu)
    elif not on_gpu:
        _check_dense(settings)
    compiled = on_gpu if settings.compile is None else settings.compile
    if on_gpu:
        torch.set_float32_matmul_precision("high")
    return Machine(accelerator, use_flex, compiled, dtype)


def _check_sharding(settings: TrainSettings, accelerator: Accelerator) -> None:
    kind = accelerator.distributed_type
    if kind in _SHARDING:
        why = (
            "Muon needs whole matrices." if settings.optimizer == "muon" else "A saved state would hold one shard only."
        )
        raise TrainingError(
            "A draft cannot be trained in shards.",
            f"Accelerate is configured for {kind.value} over {accelerator.num_processes} processes. {why}",
            "Use plain data parallelism (DDP): a draft is small enough for every device.",
        )


def _check_flex(settings: TrainSettings, on_gpu: bool) -> None:
    if not on_gpu:
        raise TrainingError(
            "Flex attention cannot train here.", "It has no backward pass on a CPU.", "Use --attention sdpa."
        )
    if settings.context_tokens % TILE:
        found = f"--context-tokens is {settings.context_tokens}."
        raise TrainingError("The packed row does not fit the mask's tiles.", found, f"Use a multiple of {TILE}.")


def _check_dense(settings: TrainSettings) -> None:
    """A dense mask grows with the square of the slots; the defaults are meant for flex."""
    slots = settings.anchors * settings.block_size
    needed, have = _DENSE_BYTES * slots * (settings.context_tokens + slots), _memory_bytes()
    if have is not None and needed > have:
        raise TrainingError(
            "The attention mask does not fit into memory.",
            f"{slots:,} slots and {settings.context_tokens:,} context tokens need {shown_bytes(needed)}, "
            f"this machine has {shown_bytes(have)}.",
            "Lower --anchors and --context-tokens, or train on a GPU.",
        )


def _memory_bytes() -> int | None:
    """All of this machine's main memory, None where the system does not tell."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return None
