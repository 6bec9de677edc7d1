"""The verdict on a drafted block: pure acceptance rules, and the scheduler class that wraps them; runs no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from dflash_core.config import Acceptance, SamplingParams
from dflash_core.errors import PromptError
from dflash_core.sampling import Sampler, pick, probabilities


@dataclass(frozen=True, slots=True)
class Verdict:
    """How far a block was right: the target's choice per slot [k+1], and the correction at posterior[accepted]."""

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


@dataclass(slots=True)
class DFlashTokenDiffusionSchedulerOutput:
    """Verified blocks.

    prev_sample       the blocks [B, k+1] as they came: the anchor, then the drafted tokens
    accepted_length   how many drafted tokens were accepted [B], 0..k
    next_token        the correction or bonus [B]
    posterior         the target's choice after each slot [B, k+1]
    """

    prev_sample: Tensor
    accepted_length: Tensor
    next_token: Tensor
    posterior: Tensor


class DFlashTokenDiffusionScheduler:
    """The verdict on drafted blocks with the interface of a diffusers scheduler.

    acceptance, top_p, top_k and seed as in `SamplingParams`; a temperature comes with every call.
    `DFlashPipeline` hands these settings to the loop, whose verdict is the one `step` gives.
    """

    order = 1
    config_name = "scheduler_config.json"

    def __init__(
        self, acceptance: Acceptance = "match", top_p: float = 1.0, top_k: int = 0, seed: int | None = None
    ) -> None:
        self._params = SamplingParams(acceptance=acceptance, top_p=top_p, top_k=top_k, seed=seed)
        self.set_timesteps(1)

    @property
    def config(self) -> dict[str, Any]:
        """The settings this scheduler was made with."""
        return {name: getattr(self._params, name) for name in ("acceptance", "top_p", "top_k", "seed")}

    def set_timesteps(self, num_inference_steps: int = 1, device: str | torch.device | None = None) -> None:
        """Start a run: timesteps n-1..0 (DFlash fills a block in one), and a seed's random numbers from the top."""
        if num_inference_steps < 1:
            raise PromptError(
                "A scheduler setting is out of range.",
                f"'num_inference_steps' is {num_inference_steps}.",
                "It must be at least 1.",
            )
        self.num_inference_steps = num_inference_steps
        self.timesteps = torch.arange(num_inference_steps - 1, -1, -1, device=device)
        self._random = Sampler(self._params, torch.device("cpu"))

    def sample(self, logits: Tensor, temperature: float = 0.0) -> Tensor:
        """Tokens [B, S] chosen from logits [B, S, V]: the most likely at temperature 0, else drawn."""
        rows = logits.flatten(0, 1)
        if temperature == 0.0:
            return rows.argmax(dim=-1).unflatten(0, logits.shape[:2])
        uniforms = self._random.fresh_uniforms(len(rows)).to(logits.device)
        return pick(self._distribution(rows, temperature), uniforms).unflatten(0, logits.shape[:2])

    def step(
        self,
        model_output: Tensor,
        timestep: int | Tensor,
        sample: Tensor,
        *,
        temperature: float = 0.0,
        draft_logits: Tensor | None = None,
        return_dict: bool = True,
    ) -> DFlashTokenDiffusionSchedulerOutput | tuple[Tensor, Tensor, Tensor, Tensor]:
        """Judge drafted blocks.

        model_output   the target's logits [B, k+1, V] of the block
        timestep       part of the interface; a block is filled in one step
        sample         the block [B, k+1]: the anchor, then k drafted tokens
        draft_logits   [B, k, V] the tokens were drawn from; rejection sampling needs them
        """
        drafted = sample[:, 1:]
        if self._params.acceptance == "rejection" and temperature > 0.0:
            posterior, accepted = self._reject(model_output, drafted, draft_logits, temperature)
        else:
            posterior = self.sample(model_output, temperature)
            accepted = matching_prefix(drafted, posterior)
        next_token = posterior.gather(1, accepted[:, None])[:, 0]
        if not return_dict:
            return sample, accepted, next_token, posterior
        return DFlashTokenDiffusionSchedulerOutput(sample, accepted, next_token, posterior)

    @staticmethod
    def check_should_stop(output_ids: Tensor, stop_token_ids: Sequence[int] | None, num_input_tokens: int) -> bool:
        """Whether a stop token stands in the reply part of output_ids [B, prompt + reply]; it holds no mask slots."""
        if not stop_token_ids:
            return False
        stops = torch.tensor(list(stop_token_ids), device=output_ids.device)
        return bool(torch.isin(output_ids[:, num_input_tokens:], stops).any())

    def _distribution(self, logits: Tensor, temperature: float) -> Tensor:
        return probabilities(logits, temperature, self._params.top_p, self._params.top_k)

    def _reject(
        self, logits: Tensor, drafted: Tensor, draft_logits: Tensor | None, temperature: float
    ) -> tuple[Tensor, Tensor]:
        if draft_logits is None:
            raise PromptError(
                "Rejection sampling cannot judge this block.",
                "'draft_logits' is missing.",
                "Pass the logits the draft drew from.",
            )
        verdicts = [
            reject(self._random, self._distribution(p, temperature), d, self._distribution(q, temperature))
            for p, d, q in zip(logits, drafted, draft_logits, strict=True)
        ]
        return torch.stack([v.posterior for v in verdicts]), drafted.new_tensor([v.accepted for v in verdicts])
