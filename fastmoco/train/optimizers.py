"""The optimizers, by one lookup, and the learning rate."""

import importlib
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

from fastmoco.config.recipe import Recipe, Schedule
from fastmoco.errors import UsageError
from fastmoco.train.lars import LARS

_APEX = {"apex_sgd": "FusedSGD", "apex_adam": "FusedAdam", "apex_lamb": "FusedLAMB"}


def build_optimizer(recipe: Recipe, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """Return the optimizer of a recipe; see `step_if` for those that can skip on the device.

    Raises:
        UsageError: it is one of apex's, and apex is not installed.
    """
    wanted = recipe.optimizer
    optimizer = _get_class(wanted.name)(
        parameters, lr=recipe.lr, weight_decay=wanted.weight_decay, **wanted.options()
    )
    if wanted.name == "sgd":
        _start_from_zeros(optimizer)
    return optimizer


def _get_class(name: str) -> Callable[..., torch.optim.Optimizer]:
    if name in _APEX:
        return _apex(name)
    fused: dict[str, Any] = {
        "sgd": torch.optim.SGD,
        "adam": torch.optim.Adam,
        "adamw": torch.optim.AdamW,
    }
    if name in fused:
        return lambda *args, **options: fused[name](*args, fused=True, **options)
    plain: dict[str, Any] = {
        "lars": LARS,
        "adagrad": torch.optim.Adagrad,
        "rmsprop": torch.optim.RMSprop,
    }
    return plain[name]  # type: ignore[no-any-return]


def _apex(name: str) -> Callable[..., torch.optim.Optimizer]:
    try:  # the `apex` of the package index is another program, and has no such module
        found = getattr(importlib.import_module("apex.optimizers"), _APEX[name])
    except (ImportError, AttributeError):
        raise UsageError(
            f"optimizer.name={name} needs NVIDIA apex, which is built from its source; torch's own "
            "sgd, adam and adamw are fused without it."
        ) from None
    return found  # type: ignore[no-any-return]


def _start_from_zeros(sgd: torch.optim.Optimizer) -> None:
    """Make the momentum buffers of fused SGD before its first step.

    torch would leave them uninitialized if that step were skipped; from zeros it gives the same,
    m * 0 + g.
    """
    group = sgd.param_groups[0]
    for parameter in group["params"] if group["momentum"] else ():
        zeros = torch.zeros_like(parameter, memory_format=torch.preserve_format)
        sgd.state[parameter]["momentum_buffer"] = zeros


def step_if(optimizer: torch.optim.Optimizer, ok: torch.Tensor) -> None:
    """Take a step where `ok` (0-d bool on the device) holds, else leave weights and state alone.

    SGD, LARS, Adam and AdamW read the flag on the device. Adagrad, RMSprop and apex's cannot: for
    them the host waits for it.
    """
    if getattr(optimizer, "_step_supports_amp_scaling", False):
        optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]
        optimizer.step()
    elif bool(ok):
        optimizer.step()


def learning_rate(schedule: Schedule, base: float, step: int, steps_per_epoch: int) -> float:
    """Return the learning rate of a step.

    Cosine: base (1 + cos(pi e / length)) / 2 (Loshchilov and Hutter 2017, without restarts), with
    e the time passed, set anew each step or epoch as `schedule.update` says; step: base times
    gamma for each milestone passed. A warm-up comes first and shortens the cosine.
    """
    unit = steps_per_epoch if schedule.epochs else 1  # steps in one unit of the length
    warmup = (schedule.warmup_epochs * steps_per_epoch + schedule.warmup_steps) / unit
    if step < warmup * unit:
        return base * (step + 1) / (warmup * unit)
    if (schedule.update or ("epoch" if schedule.epochs else "step")) == "epoch":
        step = (step // steps_per_epoch + schedule.first_epoch) * steps_per_epoch
    now = step / unit
    if schedule.name == "step":
        return base * schedule.gamma ** sum(now >= m for m in schedule.milestones)
    length = (schedule.epochs or schedule.steps or 0) - warmup
    return base * (1 + math.cos(math.pi * max(now - warmup, 0) / length)) / 2


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Set the learning rate of every group."""
    for group in optimizer.param_groups:
        group["lr"] = lr
