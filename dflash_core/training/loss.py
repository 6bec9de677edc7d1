"""What a block is punished for: labels, which slots count, their weights, and the softmax; knows no draft model.

A block of size B has k = B - 1 drafted slots; slot j predicts the token at anchor + j.

| option | what it does | effect on the default pair |
|---|---|---|
| decay | weight exp(-(j-1)/gamma) (DFlash Eq. 4) | early slots decide most; gamma 2.4 at block 8 beat 7 |
| dpace | weight = expected tokens that hang on the slot by the draft's confidence (arXiv 2605.18810) | adapts itself |
| labels "argmax" | the target's own choice, counted while the data follows it | with gamma 2: 2.16 -> 2.39 |
| labels "data" | the data's next token | the paper's; learns what a greedy target never says |
| distil | adds cross-entropy to the target's top-k distribution | none on greedy decoding, helps rejection sampling |
| selector | every second block's logits are scored after the true token before (DFlash 2) | 4.05 -> 4.28 tokens a pass |
| sampled softmax | frequent tokens exactly, a sample of the rest scaled up | same loss on average, 1/3 of the cost |
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeAlias

import torch
from torch import Tensor

from dflash_core.target import Target

PAPER_GAMMA = {16: 7.0, 10: 5.0, 8: 4.0}


def paper_gamma(block_size: int) -> float:
    """The paper's gamma for its block sizes, in proportion between and beyond them."""
    return PAPER_GAMMA.get(block_size, max(1.0, block_size * 7.0 / 16.0))


def slot_labels(
    tokens: Tensor, argmax: Tensor | None, document: Tensor, anchor: Tensor, block_size: int
) -> tuple[Tensor, Tensor]:
    """Labels [N, k] and which of them count [N, k], for one row.

    tokens, document  [S] of the row
    argmax            [S] the target's choice after each token, or None to learn the data itself
    anchor            [N] indices into the row, below 0 for padding

    With `argmax` a slot counts while the data follows the target: a greedy target never gets past the first mismatch.
    """
    steps = torch.arange(1, block_size, device=tokens.device)
    index = (anchor[:, None] + steps).clamp(0, len(tokens) - 1)
    inside = (anchor[:, None] >= 0) & (anchor[:, None] + steps < len(tokens))
    inside = inside & (document[index] == document[anchor.clamp(min=0)][:, None])
    if argmax is None:
        return tokens[index], inside
    labels = argmax[(index - 1).clamp(min=0)]
    follows = (labels == tokens[index]) & inside
    followed = torch.cat((torch.ones_like(follows[:, :1]), follows[:, :-1]), dim=1).int().cumprod(1).bool()
    return labels, inside & followed


def predecessors(tokens: Tensor, anchor: Tensor, labels: Tensor) -> Tensor:
    """[N, k] the token before each slot's label [N, k]: the anchor's own, then the labels; `tokens` [S] of the row."""
    return torch.cat((tokens[anchor.clamp(min=0)][:, None], labels[:, :-1]), dim=1)


def decay_weights(drafted: int, gamma: float, device: torch.device) -> Tensor:
    """[k] exp(-(j-1)/gamma) for j = 1..k."""
    return torch.exp(-torch.arange(drafted, device=device, dtype=torch.float32) / gamma)


def dpace_weights(nll: Tensor, live: Tensor, alpha: float) -> Tensor:
    """[N, k] sums over m >= j of the products of smoothed confidences up to m; no gradient (arXiv 2605.18810)."""
    confidence = (1.0 - alpha) * torch.exp(-nll.detach()) + alpha
    reach = torch.cumprod(torch.where(live, confidence, 0.0), dim=1)
    return reach.flip(1).cumsum(1).flip(1)


# Scores that the token before adds: codes [M, rank] of it, and the successors' codebook [V, rank].
Edges: TypeAlias = tuple[Tensor, Tensor]

# (hidden [M, H], labels [M], others [C'] or None, edges or None)
#   -> (negative log-likelihood [M], label is the best token [M])
Softmax = Callable[[Tensor, Tensor, Tensor | None, Edges | None], tuple[Tensor, Tensor]]

# Logits of bfloat16 are this far apart or more when they are large enough to win.
TIE = 0.05


@dataclass(frozen=True)
class FullSoftmax:
    """Over the whole vocabulary."""

    target: Target

    def __call__(
        self, hidden: Tensor, labels: Tensor, others: Tensor | None, edges: Edges | None = None
    ) -> tuple[Tensor, Tensor]:
        logits = self.target.head(hidden).float()
        if edges is not None:
            logits = logits + edges[0] @ edges[1].mT
        chosen = logits.gather(1, labels[:, None])[:, 0]
        return torch.logsumexp(logits, dim=-1) - chosen, chosen >= logits.detach().amax(-1)


@dataclass(frozen=True)
class SampledSoftmax:
    """Over the frequent tokens exactly and over a uniform sample of the others, each standing for several.

    frequent     [F] token ids
    is_frequent  [V]
    """

    target: Target
    frequent: Tensor
    is_frequent: Tensor

    def __call__(
        self, hidden: Tensor, labels: Tensor, others: Tensor | None, edges: Edges | None = None
    ) -> tuple[Tensor, Tensor]:
        assert others is not None
        exact, sampled = (self._rows(hidden, ids, edges) for ids in (self.frequent, others))
        chosen = self.target.head_of(hidden, labels)
        if edges is not None:
            chosen = chosen + (edges[0].float() * edges[1][labels].float()).sum(-1)
        rare = len(self.is_frequent) - len(self.frequent)
        common = self.is_frequent[labels]
        # A rare label is counted by itself, so it leaves the sample and the sample stands for the rest.
        sampled = sampled.masked_fill(others[None] == labels[:, None], -torch.inf)
        weight = math.log(rare / len(others))
        total = torch.logaddexp(torch.logsumexp(exact, dim=-1), torch.logsumexp(sampled, dim=-1) + weight)
        total = torch.where(common, total, torch.logaddexp(total, chosen))
        return total - chosen, chosen >= exact.detach().amax(-1) - TIE

    def _rows(self, hidden: Tensor, ids: Tensor, edges: Edges | None) -> Tensor:
        logits = self.target.head_rows(hidden, ids).float()
        return logits if edges is None else logits + edges[0] @ edges[1][ids].mT


def distil(logits: Tensor, top_values: Tensor, top_ids: Tensor) -> Tensor:
    """[M] cross-entropy of the draft's logits [M, V] to the target's top-k logits [M, K], renormalised over the K."""
    wanted = top_values.float().softmax(-1)
    logits = logits.float()
    return torch.logsumexp(logits, dim=-1) - (wanted * logits.gather(1, top_ids)).sum(-1)
