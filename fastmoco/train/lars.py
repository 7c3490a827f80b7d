"""LARS: SGD with momentum at a learning rate of each layer's own."""

from collections.abc import Callable, Iterable
from itertools import compress
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
        """Take the step by a few launches on a GPU, however many parameters there are."""
        found_inf = getattr(self, "found_inf", torch.zeros((), device=params[0].device))
        ok = found_inf == 0
        gradients = [p.grad for p in params if p.grad is not None]
        sizes = [g.numel() for g in gradients]
        flat = torch.cat([g.as_strided((n,), (1,)) for g, n in zip(gradients, sizes, strict=True)])
        # A NaN times 0 is NaN: it has to be taken out, not weighted down.
        flat = torch.where(ok, flat, 0)
        parts = zip(torch.split(flat, sizes), gradients, strict=True)
        moves = [part.as_strided(g.size(), g.stride()) for part, g in parts]
        rates = _decay(params, moves, group["weight_decay"], group["trust"])
        # A rate for each number: torch has no fused product of tensors with a 0-d tensor for each.
        flat *= torch.cat([rate.expand(n) for rate, n in zip(rates, sizes, strict=True)])
        velocities = [self._velocity(p) for p in params]
        torch._foreach_mul_(velocities, torch.where(ok, group["momentum"], flat.new_ones(())))
        torch._foreach_add_(velocities, torch._foreach_mul(moves, ok.to(flat)))
        torch._foreach_add_(params, torch._foreach_mul(velocities, -group["lr"] * ok.to(flat)))

    def _velocity(self, parameter: torch.Tensor) -> torch.Tensor:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(
                parameter, memory_format=torch.preserve_format
            )
        buffer: torch.Tensor = state["momentum_buffer"]
        return buffer


def _decay(
    params: list[torch.Tensor], gradients: list[torch.Tensor], weight_decay: float, trust: float
) -> list[torch.Tensor]:
    """Add the decay of weights to their gradients, and return the 0-d rate of each parameter."""
    is_weight = [p.ndim > 1 for p in params]
    weights, theirs = list(compress(params, is_weight)), list(compress(gradients, is_weight))
    if not weights:
        return [gradients[0].new_ones(())] * len(params)
    torch._foreach_add_(theirs, weights, alpha=weight_decay)
    lengths = [torch.stack(torch._foreach_norm(tensors)) for tensors in (weights, theirs)]
    usable = (lengths[0] > 0) & (lengths[1] > 0)
    rates = torch.where(usable, trust * lengths[0] / lengths[1], 1)
    scaled, plain = iter(rates.unbind()), rates.new_ones(())
    return [next(scaled) if weight else plain for weight in is_weight]
