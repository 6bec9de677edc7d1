"""Turns logits into probabilities and picks; knows no model, no cache and no text.

Every reply position owns one uniform number, drawn from the seed. A pick is the inverse of the cumulative distribution
at that number, so a token depends on the seed, its position and its prefix only: the same seed gives the same reply
with and without drafting.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dflash_core.config import SamplingParams
from dflash_core.drafter import Chain, Proposal

# Rows are sorted this deep at first; only when the kept mass is not reached within it is the whole row sorted.
_TOP_P_DEPTH = 512


def probabilities(logits: Tensor, temperature: float, top_p: float = 1.0, top_k: int = 0) -> Tensor:
    """Probabilities [q, V] in float32 of logits [q, V] after temperature > 0, then top-k, then top-p.

    top-p keeps the smallest set of most likely tokens whose mass reaches it, at least one.
    """
    scaled = logits.float() / temperature
    if 0 < top_k < scaled.shape[-1]:
        floor = scaled.topk(top_k, dim=-1).values[..., -1:]
        scaled = scaled.masked_fill(scaled < floor, float("-inf"))
    probs = scaled.softmax(dim=-1)
    if top_p < 1.0:
        probs = probs.masked_fill(probs < _nucleus_floor(probs, top_p), 0.0)
        probs = probs / probs.sum(dim=-1, keepdim=True)
    return probs


def _nucleus_floor(probs: Tensor, top_p: float) -> Tensor:
    """The smallest probability [q, 1] inside each row's nucleus."""
    for depth in (min(_TOP_P_DEPTH, probs.shape[-1]), probs.shape[-1]):
        top = probs.topk(depth, dim=-1).values
        # A token stays while the mass before it is below top_p.
        kept = (top.cumsum(dim=-1) - top < top_p).sum(dim=-1, keepdim=True)
        if bool((kept < depth).all()):
            break
    return top.gather(-1, kept - 1)


def pick(probs: Tensor, uniforms: Tensor) -> Tensor:
    """Tokens [q] drawn from probs [q, V] at uniforms [q] in [0, 1) by inverse cumulative distribution."""
    wide = torch.float32 if probs.device.type == "mps" else torch.float64
    cumulative = probs.to(wide).cumsum(dim=-1)
    point = uniforms.to(wide)[:, None] * cumulative[:, -1:]
    # right=True steps over tokens of probability zero.
    return torch.searchsorted(cumulative, point, right=True)[:, 0].clamp_(max=probs.shape[-1] - 1)


def confidence(logits: Tensor, tokens: Tensor) -> Tensor:
    """Probability at temperature 1 of tokens [q] under logits [q, V]; not a number where a row is broken."""
    wide = logits.float()
    return (wide.gather(-1, tokens[:, None])[:, 0] - wide.logsumexp(dim=-1)).exp()


class Sampler:
    """One reply's picks: the settings, the seed's uniforms by position, and a second stream for rejection sampling."""

    def __init__(self, params: SamplingParams, device: torch.device) -> None:
        self.params = params
        self.device = device
        self._positions = torch.Generator()
        self.seed = self._positions.seed() if params.seed is None else params.seed
        # The same seed must not feed both streams: a draft drawn with the target's own numbers would be no draw.
        self._positions.manual_seed(self.seed)
        self._extra = torch.Generator()
        self._extra.manual_seed((self.seed + 0x9E3779B97F4A7C15) % 2**63)
        self._uniforms = torch.empty(0, dtype=torch.float64)

    @property
    def greedy(self) -> bool:
        return self.params.temperature == 0.0

    @property
    def rejection(self) -> bool:
        return not self.greedy and self.params.acceptance == "rejection"

    def uniforms_at(self, position: int, count: int) -> Tensor:
        """The uniforms [count] of reply positions `position` onwards."""
        while len(self._uniforms) < position + count:
            more = torch.rand(256, generator=self._positions, dtype=torch.float64)
            self._uniforms = torch.cat((self._uniforms, more))
        return self._uniforms[position : position + count].to(self.device, torch.float32 if self.device.type == "mps" else None)

    def fresh_uniforms(self, count: int) -> Tensor:
        """Uniforms [count] of the second stream, never given twice."""
        drawn = torch.rand(count, generator=self._extra, dtype=torch.float64)
        return drawn.to(self.device, torch.float32 if self.device.type == "mps" else None)

    def process(self, logits: Tensor, history: Sequence[int], drafted: Sequence[int]) -> Tensor:
        """Run the processors over logits [q, V]; slot i's context is `history` and the first i drafted tokens."""
        if not self.params.processors:
            return logits
        rows = []
        for slot, row in enumerate(logits):
            for processor in self.params.processors:
                row = processor([*history, *drafted[:slot]], row)
            rows.append(row)
        return torch.stack(rows)

    def distribution(self, logits: Tensor) -> Tensor:
        """Probabilities [q, V] with the user's temperature, top-k and top-p. Not for greedy decoding."""
        return probabilities(logits, self.params.temperature, self.params.top_p, self.params.top_k)

    def choose(self, logits: Tensor, position: int) -> Tensor:
        """The target's choice [q] for reply positions `position` onwards."""
        if self.greedy:
            return logits.argmax(dim=-1)
        return pick(self.distribution(logits), self.uniforms_at(position, len(logits)))

    def draft(self, proposal: Proposal) -> tuple[Tensor, Tensor | None, Tensor]:
        """Drafted tokens [k], the probabilities [k, V] they were drawn from if they were, and the logits [k, V] behind."""
        if isinstance(proposal, Chain):
            # Each is drawn before the next one's logits are known, which is all that rejection sampling asks of a draft.
            drafted, logits = proposal.walk(self._draft_from)
            return drafted, self.distribution(logits) if self.rejection else None, logits
        if not self.rejection:
            return proposal.argmax(dim=-1), None, proposal
        probs = self.distribution(proposal)
        return pick(probs, self.fresh_uniforms(len(probs))), probs, proposal

    def _draft_from(self, logits: Tensor) -> Tensor:
        return self.draft(logits)[0]
