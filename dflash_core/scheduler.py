"""The verdict on a drafted block: pure acceptance rules, and the scheduler class that wraps them; runs no model."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dflash_core.sampling import Sampler, pick


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a block was right. `posterior` [k+1] is the target's choice per slot; posterior[accepted] the correction."""

    posterior: Tensor
    accepted: int


def matching_prefix(drafted: Tensor, posterior: Tensor) -> Tensor:
    """How many leading drafted tokens [..., k] equal the posterior [..., k+1]; a tensor [...] of 0..k."""
    return (drafted == posterior[..., :-1]).cumprod(dim=-1).sum(dim=-1)


def judge(sampler: Sampler, logits: Tensor, drafted: Tensor, draft_probs: Tensor | None, position: int) -> Verdict:
    """Apply the sampler's acceptance rule to target logits [k+1, V] and drafted [k] for reply positions from `position`.

    Greedy and "match" compare the draft with the target's own choice; "rejection" accepts d with min(1, p(d)/q(d)) and
    draws the correction from the residual (Leviathan et al. 2023, algorithm 1). All are exact in distribution.
    """
    if draft_probs is None:
        posterior = sampler.choose(logits, position)
        return Verdict(posterior, int(matching_prefix(drafted, posterior)))
    return reject(sampler, sampler.distribution(logits), drafted, draft_probs)


def reject(sampler: Sampler, probs: Tensor, drafted: Tensor, draft_probs: Tensor) -> Verdict:
    """Rejection sampling of drafted [k] drawn from draft_probs [k, V] against target probs [k+1, V].

    The posterior holds the draft where it was accepted, the drawn correction, then the most likely tokens.
    """
    k = len(drafted)
    slots = torch.arange(k, device=probs.device)
    keep = sampler.fresh_uniforms(k) * draft_probs[slots, drafted] < probs[slots, drafted]
    accepted = int(keep.long().cumprod(dim=0).sum())
    rest = probs[accepted]
    if accepted < k:
        rest = (rest - draft_probs[accepted]).clamp_min(0.0)
    posterior = probs.argmax(dim=-1)
    posterior[:accepted] = drafted[:accepted]
    posterior[accepted] = pick(rest[None], sampler.fresh_uniforms(1))[0]
    return Verdict(posterior, accepted)
