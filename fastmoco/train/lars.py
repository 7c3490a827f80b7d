"""LARS: SGD with momentum at a learning rate of each layer's own."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn


class LARS(torch.optim.Optimizer):
    """Layer-wise adaptive rate scaling (You, Gitman and Ginsburg 2017), in the form of MoCo v3.

    The rate of a weight is `trust` |w| / |g + decay w| times the learning rate. Vectors (biases,
    BatchNorm) are neither scaled nor decayed, as in SimCLR. A step can be skipped by
    a flag on the device, `found_inf`, as in torch's fused optimizers.

    Args:
        parameters: to train.
        lr: learning rate.
        momentum: of the velocity.
        trust: the coefficient.
        weight_decay: added to the gradient of weights.
    """

    _step_supports_amp_scaling = True

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        lr: float,
        momentum: float = 0.9,
        trust: float = 0.001,
        weight_decay: float = 0.0,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "trust": trust, "weight_decay": weight_decay}
        super().__init__(parameters, defaults)

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Move the parameters, or nothing where `found_inf` (0-d) is not 0."""
        assert closure is None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if params:
                self._step(params, group)

    def _step(self, params: list[torch.Tensor], group: dict[str, Any]) -> None:
        found_inf = getattr(self, "found_inf", torch.zeros((), device=params[0].device))
        ok = found_inf == 0
        # A NaN times 0 is NaN: it has to be taken out, not weighted down.
        gradients = [torch.where(ok, p.grad, 0) for p in params if p.grad is not None]
        moves = self._scaled(params, gradients, group)
        velocities = [self._velocity(p) for p in params]
        moved = torch._foreach_mul(velocities, group["momentum"])
        torch._foreach_add_(moved, moves)
        weight = ok.to(params[0].dtype)
        torch._foreach_lerp_(velocities, moved, [weight] * len(params))
        rate = -group["lr"] * weight
        torch._foreach_addcmul_(params, velocities, [rate] * len(params))

    def _velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer

    def _scaled(
        self, params: list[torch.Tensor], gradients: list[torch.Tensor], group: dict[str, Any]
    ) -> list[torch.Tensor]:
        """Return the gradients, those of weights decayed and brought to their lengths."""
        return [
            g if p.ndim < 2 else _adapted(p, g.add(p, alpha=group["weight_decay"]), group["trust"])
            for p, g in zip(params, gradients, strict=True)
        ]


def _adapted(weight: torch.Tensor, gradient: torch.Tensor, trust: float) -> torch.Tensor:
    lengths = weight.norm(), gradient.norm()
    usable = (lengths[0] > 0) & (lengths[1] > 0)
    return gradient * torch.where(usable, trust * lengths[0] / lengths[1], 1.0)
