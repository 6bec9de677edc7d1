"""Which optimiser moves which weights of a draft; knows no loss and no schedule."""

import torch

from dflash_core.model import DFlashDraftModel
from dflash_core.training.muon import Muon
from dflash_core.training.settings import TrainSettings

BETAS = (0.9, 0.95)


def make_optimizers(
    settings: TrainSettings, draft: DFlashDraftModel, compile: bool
) -> dict[str, torch.optim.Optimizer]:
    """One optimiser for matrices, one for everything else: norms, convolutions, codebooks (a row per token)."""
    matrices, rest = [], []
    for name, parameter in draft.named_parameters():
        (matrices if parameter.dim() == 2 and "codebook" not in name else rest).append(parameter)
    fused, decay = matrices[0].is_cuda, settings.weight_decay
    if settings.optimizer == "muon":
        first: torch.optim.Optimizer = Muon(matrices, settings.matrix_lr, settings.momentum, decay, compile)
    else:
        first = torch.optim.AdamW(matrices, settings.matrix_lr, betas=BETAS, weight_decay=decay, fused=fused)
    second = torch.optim.AdamW(rest, settings.lr_rest, betas=BETAS, weight_decay=0.0, fused=fused)
    return {"matrices": first, "rest": second}
