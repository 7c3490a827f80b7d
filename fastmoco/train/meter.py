"""What a run says of itself: accumulated on the device, read on logged steps only."""

import math
import sys
import time
from typing import Any

import torch

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine, StepOutput


class Meter:
    """Loss of the epoch, speed, and the share of time spent waiting for data.

    Attributes:
        epoch: (2,) fp64 on the device: sum of the step losses of this epoch, and their number.
    """

    def __init__(self, recipe: Recipe, ranks: World, device: torch.device) -> None:
        self.epoch = torch.zeros(2, dtype=torch.float64, device=device)
        self._recipe, self._ranks, self._device = recipe, ranks, device
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what came before, such as a monitor."""
        self._since, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count(self, outcome: StepOutput, waited_s: float) -> None:
        """Take in one step; `waited_s` is what it waited for its batch."""
        ok = outcome.ok.double()
        loss = torch.where(outcome.ok, outcome.loss.mean(), 0).double()
        self.epoch += torch.stack([loss * ok, ok])
        self._steps += 1
        self._waited_s += waited_s

    def settle(self) -> None:
        """Average the epoch's loss over the ranks: before it is read or saved."""
        self._ranks.mean_(self.epoch)

    def end_epoch(self) -> float:
        """Return the mean loss of the epoch, and start the next one."""
        self.settle()
        total, steps = self.epoch.tolist()
        self.epoch.zero_()
        return total / steps if steps else math.nan

    def read(self, outcome: StepOutput, moco: Engine) -> dict[str, Any]:
        """Return the row of a logged step: means over the ranks, speed since the last one."""
        scalars = _scalars(outcome, self._recipe.objective.temperature)
        values = self._ranks.mean_(torch.stack(list(scalars.values())))
        of_objective = moco.objective.numbers()
        elapsed = time.perf_counter() - self._since  # after the first wait for the device
        row = {
            **dict(zip(scalars, values.tolist(), strict=True)),
            "grad_norm": float(outcome.grad_norm),
            "loss_scale": float(moco.scale.scale),
            **of_objective,
            "skipped": moco.guard.check(),
            "images_per_s": self._recipe.batch * self._steps / elapsed,
            "data_wait_percent": 100 * self._waited_s / elapsed,
            "memory_mb": _peak_memory(self._device) / 1e6,
        }
        self.restart_clock()
        return row


def _peak_memory(device: torch.device) -> int:
    """Return the most that was held so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no such count
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


def _scalars(outcome: StepOutput, t: float) -> dict[str, torch.Tensor]:
    """Return what is averaged over the samples of a step; `t` is the temperature.

    `feature_std` is 1 for queries spread evenly over the sphere and 0 for a collapsed encoder.
    """
    better = (outcome.negative >= outcome.positive[:, None]).sum(dim=1)
    return {
        "loss": outcome.loss.mean(),
        "pretext_top1": (better < 1).to(outcome.loss.dtype).mean(),
        "pretext_top5": (better < 5).to(outcome.loss.dtype).mean(),
        "positive_similarity": outcome.positive.mean() * t,
        "negative_similarity": outcome.negative.mean() * t,
        "feature_std": outcome.q.std(dim=0).mean() * math.sqrt(outcome.q.shape[1]),
    }
