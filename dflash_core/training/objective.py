"""One training forward: features and anchors in, loss and counts out; knows no optimiser and no files."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from dflash_core.masks import TrainingLayout
from dflash_core.model import DFlashDraftModel, Masks
from dflash_core.target import Target
from dflash_core.training.loss import (
    Edges,
    Softmax,
    decay_weights,
    distil,
    dpace_weights,
    predecessors,
    slot_labels,
)


@dataclass(frozen=True)
class LossSettings:
    """See `loss` for what each does. `chunks` > 1 recomputes the head in so many parts to save memory."""

    labels: Literal["argmax", "data"] = "argmax"
    weights: Literal["decay", "dpace"] = "decay"
    gamma: float = 4.0
    dpace_alpha: float = 0.5
    distil: float = 0.0
    chunks: int = 1


@dataclass(frozen=True)
class Inputs:
    """Everything of one row that the loss needs.

    features         [1, S, taps * H]
    tokens           [1, S]
    argmax           [1, S] the target's choices, or None
    top              values and ids [S, K] of the target's highest logits, or None
    others           [C] random tokens of the sampled softmax, or None
    """

    features: Tensor
    tokens: Tensor
    layout: TrainingLayout
    argmax: Tensor | None = None
    top: tuple[Tensor, Tensor] | None = None
    others: Tensor | None = None


def layer_masks(draft: DFlashDraftModel, layout: TrainingLayout, use_flex: bool) -> Masks:
    """The layout's mask for each kind of layer that the draft has."""
    build = layout.flex if use_flex else layout.dense
    return {kind: build(*draft.config.attention_rule(kind)) for kind in set(draft.config.layer_types)}


def fill_blocks(
    draft: DFlashDraftModel, target: Target, context: Tensor, tokens: Tensor, layout: TrainingLayout, masks: Masks
) -> Tensor:
    """Hidden states [R, N, B, H] of every block's slots, from the projected context [R, S, H]."""
    rows, count = layout.anchor.shape
    ids = torch.full((rows, count, layout.block_size), draft.config.mask_token_id, device=tokens.device)
    ids[:, :, 0] = tokens.gather(1, layout.anchor.clamp(min=0))
    block = target.embed(ids.flatten(1), draft.config.input_embedding_scale).to(context.device)
    hidden = draft(block, context, layout.slot_position, layout.position, masks, layout.block_size)
    return hidden.unflatten(1, (count, layout.block_size))


class DraftObjective(nn.Module):
    """The draft and its loss. Taps are scaled by fixed powers of two, which `export` folds into `fc`.

    Taps differ tenfold in scale; left alone, one step of the optimiser would move the loud ones ten times as far.
    """

    def __init__(
        self, draft: DFlashDraftModel, target: Target, softmax: Softmax, settings: LossSettings,
        tap_scale: Sequence[float], use_flex: bool, compile: bool,
    ) -> None:  # fmt: skip
        super().__init__()
        self.draft = draft
        # In a tuple, so that the target's frozen weights are no parameters of this module.
        self._frozen = (target, softmax)
        self._settings, self.use_flex = settings, use_flex
        scale = torch.tensor(tap_scale).repeat_interleave(draft.config.hidden_size)
        self.register_buffer("tap_scale", scale.to(draft.fc.weight.device), persistent=False)
        self._compute = torch.compile(self._loss, dynamic=False) if compile else self._loss

    @torch.no_grad()
    def export(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        """Public weights of training weights: the tap scales folded into `fc`."""
        return {**weights, "fc.weight": weights["fc.weight"] * self.tap_scale}

    def forward(self, inputs: Inputs) -> tuple[Tensor, Tensor]:
        """Loss and counts [2, k]: right slots and live slots by position. One row a call."""
        layout, anchor = inputs.layout, inputs.layout.anchor
        assert anchor.shape[0] == 1
        masks = layer_masks(self.draft, layout, self.use_flex)
        argmax = None if inputs.argmax is None or self._settings.labels == "data" else inputs.argmax[0]
        return self._compute(
            inputs.features,
            inputs.tokens,
            layout.document,
            layout.position,
            anchor,
            argmax,
            inputs.top,
            inputs.others,
            masks,
        )

    def _loss(
        self, features: Tensor, tokens: Tensor, document: Tensor, position: Tensor, anchor: Tensor,
        argmax: Tensor | None, top: tuple[Tensor, Tensor] | None, others: Tensor | None, masks: Masks,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        settings, (target, _) = self._settings, self._frozen
        layout = TrainingLayout(document, position, anchor, self.draft.config.block_size)
        context = self.draft.project(features * self.tap_scale.to(features.dtype))
        hidden = fill_blocks(self.draft, target, context, tokens, layout, masks)[0, :, 1:]
        labels, live = slot_labels(tokens[0], argmax, document[0], anchor[0], layout.block_size)
        count, drafted = labels.shape
        edges = self._edges(hidden, predecessors(tokens[0], anchor[0], labels))
        soft = self._soft(top, anchor[0], drafted)
        nll, right = self._score(hidden.flatten(0, 1), labels.flatten(), soft, others, edges)
        nll, right = nll.unflatten(0, (count, drafted)), right.unflatten(0, (count, drafted))
        if settings.weights == "dpace":
            weights = dpace_weights(nll, live, settings.dpace_alpha)
        else:
            weights = decay_weights(drafted, settings.gamma, nll.device)[None]
        weights = torch.where(live, weights, 0.0)
        # A dead slot's loss may be infinite (its label can be any token), and 0 * inf is not 0.
        loss = torch.where(live, weights * nll, 0.0).sum() / weights.sum().clamp(min=1e-6)
        return loss, torch.stack(((right & live).sum(0), live.sum(0)))

    def _edges(self, hidden: Tensor, before: Tensor) -> Edges | None:
        """What the selector adds to logits of slots [N, k, H] after known tokens [N, k], in every second block.

        The others learn to name candidates without it, which is what they are ranked by before the selector looks.
        """
        selector = self.draft.candidate_selector
        if selector is None:
            return None
        codes = selector.codes(hidden, before[..., None])[..., 0, :]
        seeing = torch.arange(len(codes), device=codes.device) % 2 == 0
        return torch.where(seeing[:, None, None], codes, 0.0).flatten(0, 1), selector.successor_codebook

    def _soft(self, top: tuple[Tensor, Tensor] | None, anchor: Tensor, drafted: int) -> tuple[Tensor, Tensor] | None:
        """The target's top logits at every slot, [N * k, K] each."""
        if top is None:
            return None
        index = (
            (anchor.clamp(min=0)[:, None] + torch.arange(drafted, device=anchor.device))
            .clamp(max=len(top[0]) - 1)
            .flatten()
        )
        return top[0][index], top[1][index]

    def _score(
        self, hidden: Tensor, labels: Tensor, soft: Any, others: Tensor | None, edges: Edges | None
    ) -> tuple[Tensor, Tensor]:
        chunks = self._settings.chunks
        if chunks == 1:
            return self._score_part(hidden, labels, soft, others, edges)
        softs = [None] * chunks if soft is None else list(zip(*(part.chunk(chunks) for part in soft), strict=True))
        joined = [None] * chunks if edges is None else [(codes, edges[1]) for codes in edges[0].chunk(chunks)]
        parts = [
            checkpoint(self._score_part, part, label, kind, others, edge, use_reentrant=False)
            for part, label, kind, edge in zip(
                hidden.chunk(chunks), labels.chunk(chunks), softs, joined, strict=True
            )
        ]
        return torch.cat([nll for nll, _ in parts]), torch.cat([right for _, right in parts])

    def _score_part(
        self, hidden: Tensor, labels: Tensor, soft: Any, others: Tensor | None, edges: Edges | None
    ) -> tuple[Tensor, Tensor]:
        target, softmax = self._frozen
        nll, right = softmax(hidden, labels, others, edges)
        if soft is not None:
            share = self._settings.distil
            nll = (1.0 - share) * nll + share * distil(target.head(hidden), *soft)
        return nll, right
