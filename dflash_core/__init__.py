"""Block-diffusion speculative decoding (DFlash): a draft model fills a block, the target checks it in one forward."""

from dflash_core.config import DraftConfig, SamplingParams
from dflash_core.decode import decode
from dflash_core.errors import DFlashError
from dflash_core.events import Finish, Prefill, Step
from dflash_core.loading import Pair, load_pair, pair_names
from dflash_core.model import DFlashDraftModel
from dflash_core.pipeline import DFlashPipeline
from dflash_core.reference import transformers_decode
from dflash_core.scheduler import DFlashTokenDiffusionScheduler

__all__ = [
    "DFlashDraftModel",
    "DFlashError",
    "DFlashPipeline",
    "DFlashTokenDiffusionScheduler",
    "DraftConfig",
    "Finish",
    "Pair",
    "Prefill",
    "SamplingParams",
    "Step",
    "decode",
    "load_pair",
    "pair_names",
    "transformers_decode",
]
