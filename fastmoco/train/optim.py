"""The optimizer and its learning rate."""

import math
from collections.abc import Iterable

import torch
from torch import nn

from fastmoco.config import Optimizer, Schedule


def build_optimizer(recipe: Optimizer, parameters: Iterable[nn.Parameter]) -> torch.optim.SGD:
    """Return torch's fused optimizer, which skips a step by a flag on the device (`found_inf`)."""
    optimizer = torch.optim.SGD(
        parameters,
        lr=recipe.lr,
        momentum=recipe.momentum,
        weight_decay=recipe.weight_decay,
        fused=True,
    )
    if recipe.momentum:
        # torch would leave these uninitialised if the very first step were skipped; from zeros the
        # first step gives the same, m * 0 + g.
        for parameter in optimizer.param_groups[0]["params"]:
            zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
            optimizer.state[parameter]["momentum_buffer"] = zeros
    return optimizer


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    Cosine: base (1 + cos(pi e / epochs)) / 2 (Loshchilov and Hutter 2017, without restarts), with
    e the epoch, whole or fractional as `schedule.update` says; step: base times gamma for each
    milestone passed. A warm-up comes first and shortens the cosine.
    """
    now = step / steps_per_epoch
    if now < schedule.warmup_epochs:
        return base * (step + 1) / (schedule.warmup_epochs * steps_per_epoch)
    epoch = now if schedule.update == "step" else step // steps_per_epoch + schedule.first_epoch
    if schedule.name == "step":
        return base * schedule.gamma ** sum(epoch >= m for m in schedule.milestones)
    length = schedule.epochs - schedule.warmup_epochs
    return base * (1 + math.cos(math.pi * (epoch - schedule.warmup_epochs) / length)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
