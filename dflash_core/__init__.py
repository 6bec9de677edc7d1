"""Block-diffusion speculative decoding (DFlash): a draft model fills a block, the target checks it in one forward."""

from dflash_core.config import DraftConfig, SamplingParams
from dflash_core.decode import decode
from dflash_core.errors import DFlashError
from dflash_core.events import Finish, Prefill, Step
from dflash_core.model import DFlashDraftModel

__all__ = [
    "DFlashDraftModel",
    "DFlashError",
    "DraftConfig",
    "Finish",
    "Prefill",
    "SamplingParams",
    "Step",
    "decode",
]
