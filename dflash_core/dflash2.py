"""What DFlash 2 adds to the draft model: a convolution along the block and a selector that walks one path through it.

A DFlash block is filled all at once, so its slots do not know what the slots before them will say. DFlash 2 (Inco AI and
Z Lab, August 2026) tells them twice: each slot mixes in its predecessor's hidden state, and among each slot's best
candidates the one is taken that fits the token chosen just before. Parameter names are the public checkpoints'. It knows
no target, no sampling settings and no cache.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dflash_core.config import DraftConfig
from dflash_core.drafter import Chain


class DynamicConv(nn.Module):
    """Depthwise convolution over a block's slots: out[i] = sum over t of (base[t] + delta[i, t]) * x[i - t].

    Slots before the block count as 0. `base` is a kernel per channel, `delta` one per group of channels that depends on
    slot i's input. There are two such kernels, before and after a sublayer, both computed from what goes into the first.
    A new one passes its input through.
    """

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        self._taps, self._group = config.conv_kernel_size, config.conv_group_size
        groups = config.hidden_size // config.conv_group_size
        self.base_kernel = nn.Parameter(torch.zeros(2, self._taps, config.hidden_size))
        self.kernel_projection = nn.Linear(config.hidden_size, 2 * self._taps * groups, bias=False)
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Pass the input through."""
        self.base_kernel.zero_()[:, 0] = 1.0
        self.kernel_projection.weight.zero_()

    def before(self, x: Tensor, slots: int) -> tuple[Tensor, Tensor]:
        """The sublayer's input [B, Q, H] of blocks of `slots` slots, convolved, and the kernel that `after` needs."""
        first, second = self.kernel_projection(x).unflatten(-1, (2, self._taps, -1)).unbind(-3)
        return self._convolve(x, self.base_kernel[0], first, slots), second

    def after(self, x: Tensor, kernel: Tensor, slots: int) -> Tensor:
        """The sublayer's output [B, Q, H], convolved."""
        return self._convolve(x, self.base_kernel[1], kernel, slots)

    def _convolve(self, x: Tensor, base: Tensor, delta: Tensor, slots: int) -> Tensor:
        grouped = x.unflatten(1, (-1, slots)).unflatten(-1, (-1, self._group))
        kernel = base.unflatten(-1, (-1, self._group)) + delta.unflatten(1, (-1, slots))[..., None]
        total = grouped * kernel[..., 0, :, :]
        for tap in range(1, min(self._taps, slots)):
            earlier = F.pad(grouped[:, :, :-tap], (0, 0, 0, 0, tap, 0))
            total = total + earlier * kernel[..., tap, :, :]
        return total.flatten(-2).flatten(1, 2).to(x.dtype)


class CandidateSelector(nn.Module):
    """Scores each slot's candidates by the token before: logit + <predecessor code * projected hidden, successor code>."""

    def __init__(self, config: DraftConfig) -> None:
        super().__init__()
        rank = config.selector_rank
        self.predecessor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.successor_codebook = nn.Parameter(torch.empty(config.vocab_size, rank))
        self.hidden_projection = nn.Linear(config.hidden_size, rank, bias=False)
        self._top_k = config.selector_top_k
        self.reset()

    @torch.no_grad()
    def reset(self) -> None:
        """Leave every logit as it is."""
        # Small: the code of a token that training never meets stays as it is, and should weigh little.
        nn.init.normal_(self.predecessor_codebook, std=0.1)
        nn.init.normal_(self.hidden_projection.weight, std=self.hidden_projection.in_features**-0.5)
        self.successor_codebook.zero_()

    def codes(self, hidden: Tensor, predecessors: Tensor) -> Tensor:
        """What successors are scored with [..., P, rank], for hidden states [..., H] after each of [..., P] tokens."""
        return self.predecessor_codebook[predecessors] * self.hidden_projection(hidden)[..., None, :]

    def chain(self, hidden: Tensor, logits: Tensor, anchor: Tensor) -> Chain:
        """The block's candidates and their scores, from hidden states [k, H], logits [k, V] and the anchor's id [1]."""
        unary, candidates = self._candidates(logits)
        before = torch.cat((anchor.to(candidates).expand(1, self._top_k), candidates[:-1]))
        return Chain(candidates, self._scores(hidden, unary, candidates, before), logits.shape[-1])

    def follow(self, hidden: Tensor, logits: Tensor, predecessors: Tensor) -> Tensor:
        """The tokens [M] it takes after known predecessors [M], from hidden states [M, H] and logits [M, V]."""
        unary, candidates = self._candidates(logits)
        scores = self._scores(hidden, unary, candidates, predecessors[:, None])[:, 0]
        return candidates.gather(1, scores.argmax(-1, keepdim=True))[:, 0]

    def _candidates(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        """The highest logits [M, K] in float32 and their tokens [M, K]."""
        found = logits.topk(self._top_k, dim=-1)
        return found.values.float(), found.indices

    def _scores(self, hidden: Tensor, unary: Tensor, candidates: Tensor, before: Tensor) -> Tensor:
        """[M, P, K] of candidates [M, K] after each of the tokens `before` [M, P]; the logits may be on another device."""
        codes = self.codes(hidden, before.to(hidden.device))
        edges = codes @ self.successor_codebook[candidates.to(hidden.device)].mT
        return unary[:, None] + edges.to(unary)
