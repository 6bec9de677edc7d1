"""Muon for matrices, batched by shape: orthogonalised momentum (Jordan et al. 2024); knows no model.

All matrices of one shape are stacked, so five Newton-Schulz rounds cost a handful of batched products per shape.
"""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

COEFFICIENTS = (3.4445, -4.7750, 2.0315)


def orthogonalise(matrices: Tensor, steps: int = 5) -> Tensor:
    """Nearest half-orthogonal matrices, roughly, of [n, rows, columns]: singular values go to about 1."""
    tall = matrices.shape[1] > matrices.shape[2]
    x = (matrices.mT if tall else matrices).to(torch.bfloat16 if matrices.is_cuda else torch.float32)
    x = x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)
    a, b, c = COEFFICIENTS
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * (gram @ gram)) @ x
    return (x.mT if tall else x).to(matrices.dtype)


class Muon(torch.optim.Optimizer):
    """Nesterov momentum, orthogonalised, scaled by sqrt(rows / columns) for tall matrices; decoupled weight decay.

    One parameter group per shape; the momentum of a group is one stacked tensor in the state of its first parameter.
    """

    def __init__(
        self, params: Iterable[nn.Parameter], lr: float = 0.02, momentum: float = 0.95, weight_decay: float = 0.0,
        compile: bool = False,
    ) -> None:  # fmt: skip
        shapes: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in params:
            assert parameter.dim() == 2
            shapes.setdefault(parameter.shape, []).append(parameter)
        defaults = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([{"params": group} for group in shapes.values()], defaults)
        self._orthogonalise = torch.compile(orthogonalise, dynamic=False) if compile else orthogonalise

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            assert len(params) == len(group["params"])
            self._step_group(group, params)

    def _step_group(self, group: dict[str, Any], params: list[nn.Parameter]) -> None:
        gradient = torch.stack([p.grad for p in params])
        state = self.state[params[0]]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(gradient)
        momentum = group["momentum"]
        state["momentum_buffer"].lerp_(gradient, 1.0 - momentum)
        update = self._orthogonalise(gradient.lerp_(state["momentum_buffer"], momentum))
        scale = max(1.0, gradient.shape[1] / gradient.shape[2]) ** 0.5
        if group["weight_decay"]:
            torch._foreach_mul_(params, 1.0 - group["lr"] * group["weight_decay"])
        torch._foreach_add_(params, list(update.unbind()), alpha=-group["lr"] * scale)
