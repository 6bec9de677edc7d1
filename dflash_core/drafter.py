"""Who guesses the block: the DFlash draft model, or nobody; knows no acceptance rule."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from torch import Tensor

if TYPE_CHECKING:
    from dflash_core.model import DFlashDraftModel
    from dflash_core.target import Target


class Chain:
    """A proposal whose every slot depends on the token chosen before it.

    candidates   [k, K] token ids
    scores       [k, K, K] a slot's logits over its candidates (last), by the candidate chosen in the slot before; slot 0
                 follows the anchor, whichever row is read
    """

    def __init__(self, candidates: Tensor, scores: Tensor, vocab_size: int) -> None:
        self.candidates, self.scores, self.vocab_size = candidates, scores, vocab_size
        self.logits: Tensor | None = None

    def walk(self, choose: Callable[[Tensor], Tensor]) -> tuple[Tensor, Tensor]:
        """Choose slot by slot with `choose` (logits [1, K] -> index [1]).

        Returns the tokens [k] and the logits [k, V] each was chosen from, -inf for all but its candidates; they stay at
        hand as `logits`.
        """
        rows, chosen = [], [self.candidates.new_zeros(1)]
        for scores in self.scores:
            rows.append(scores.index_select(0, chosen[-1]))
            chosen.append(choose(rows[-1]))
        drafted = self.candidates.gather(1, torch.stack(chosen[1:]))[:, 0]
        empty = self.scores.new_full((len(rows), self.vocab_size), float("-inf"))
        self.logits = empty.scatter_(1, self.candidates, torch.cat(rows))
        return drafted, self.logits


Proposal: TypeAlias = Tensor | Chain
"""What the drafted tokens are chosen from: independent logits [k, V], or logits that follow each other."""


class Drafter(Protocol):
    """One run's source of guesses."""

    taps: tuple[int, ...]
    """Target layers whose hidden states `commit` wants, () for none."""
    max_drafted: int
    """The most tokens `propose` can draft in one block."""

    def commit(self, features: Tensor) -> None:
        """Take the tapped hidden states [1, n, taps * H] of n newly committed tokens, each exactly once, in order."""

    def propose(self, anchor: int, k: int) -> Proposal:
        """What to choose the k tokens after the anchor from; the anchor follows all committed features."""

    def reset(self) -> None:
        """Forget all committed features: the reply was replaced by another."""


class NoDraft:
    """The baseline: proposes nothing and taps nothing, so plain decoding pays for neither."""

    taps: tuple[int, ...] = ()
    max_drafted = 0

    def commit(self, features: Tensor) -> None:
        raise AssertionError("the baseline taps no layers")

    def propose(self, anchor: int, k: int) -> Proposal:
        raise AssertionError("the baseline drafts nothing")

    def reset(self) -> None:
        pass


class DFlashDrafter:
    """Fills [anchor, MASK x k] in one forward of the draft model, between the target's embedding and its head."""

    def __init__(
        self, target: "Target", draft: "DFlashDraftModel", block_size: int | None = None, mask_token_id: int | None = None
    ) -> None:
        config = draft.config
        mask = config.mask_token_id if mask_token_id is None else mask_token_id
        self.taps = config.target_layer_ids
        self.max_drafted = (block_size or config.block_size) - 1
        self._target, self._draft, self._cache = target, draft, draft.new_cache()
        self._masks = torch.full((1, config.block_size), mask, device=draft.fc.weight.device)

    def commit(self, features: Tensor) -> None:
        self._draft.extend(self._cache, features.to(self._masks.device))

    def propose(self, anchor: int, k: int) -> Proposal:
        return self._fill(self._block(anchor, k))

    def _block(self, anchor: int, k: int) -> Tensor:
        ids = self._masks[:, : k + 1].clone()
        ids[0, 0] = anchor
        return ids

    def _fill(self, ids: Tensor) -> Proposal:
        block = self._target.embed(ids, self._draft.config.input_embedding_scale).to(self._draft.fc.weight)
        hidden = self._draft.fill(self._cache, block)[0, 1:]
        logits, selector = self._target.head(hidden), self._draft.candidate_selector
        return logits if selector is None else selector.chain(hidden, logits, ids[0, :1])

    def reset(self) -> None:
        self._cache = self._draft.new_cache()
