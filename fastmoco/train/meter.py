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
    """Means over the steps of an epoch and since the last row; speed; the time waited for data.

    Skipped steps count in no mean.

    Attributes:
        epoch: (2,) fp64 on the device: sum of the step losses of this epoch, and their number.
        since_row: (7,) fp64 on the device: the sums of `_AVERAGED` and the number of steps.
    """

    def __init__(self, recipe: Recipe, world: World, device: torch.device) -> None:
        self.epoch = torch.zeros(2, dtype=torch.float64, device=device)
        self.since_row = torch.zeros(len(_AVERAGED) + 1, dtype=torch.float64, device=device)
        self._recipe, self._world, self._device = recipe, world, device
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what came before, such as a monitor."""
        self._since, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count(self, output: StepOutput, waited_s: float) -> None:
        """Take in one step; `waited_s` is what it waited for its batch."""
        values = _averages(output, self._recipe.objective.temperature)
        self.since_row += torch.where(output.ok, values, 0)
        self.epoch += torch.where(output.ok, values[:: len(_AVERAGED)], 0)  # loss and count
        self._steps += 1
        self._waited_s += waited_s

    def all_reduce(self) -> None:
        """Average over the ranks: before the sums are read or saved."""
        self._world.mean_(self.epoch)
        self._world.mean_(self.since_row)

    def end_epoch(self) -> float:
        """Return the mean loss of the epoch, and start the next one."""
        total, steps = self._world.mean_(self.epoch).tolist()
        self.epoch.zero_()
        return total / steps if steps else math.nan

    def read(self, output: StepOutput, engine: Engine) -> dict[str, Any]:
        """Return the row of a logged step: means over the steps since the last one, and speed."""
        *sums, steps = self._world.mean_(self.since_row).tolist()
        self.since_row.zero_()
        elapsed = time.perf_counter() - self._since  # after the first wait for the device
        row = {
            **{n: x / steps if steps else math.nan for n, x in zip(_AVERAGED, sums, strict=True)},
            "grad_norm": float(output.grad_norm),
            "loss_scale": float(engine.scale.scale),
            **engine.objective.numbers(),
            "skipped": engine.guard.check(),
            "images_per_s": self._recipe.batch * self._steps / elapsed,
            "data_wait_percent": 100 * self._waited_s / elapsed,
            "memory_mb": _peak_memory(self._device) / 1e6,
        }
        self.restart_clock()
        return row

    def state(self) -> dict[str, torch.Tensor]:
        """Return what a resumed run needs."""
        return {"epoch_loss": self.epoch, "since_row": self.since_row}

    def load(self, state: dict[str, torch.Tensor]) -> None:
        """Take over a state that `state` returned."""
        self.epoch.copy_(state["epoch_loss"])
        if "since_row" in state:  # older checkpoints lack it
            self.since_row.copy_(state["since_row"])


def _peak_memory(device: torch.device) -> int:
    """Return the most that was held so far, in bytes: of the GPU, or of this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    if sys.platform == "win32":  # has no such count
        return 0
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


_AVERAGED = (
    "loss",
    "pretext_top1",
    "pretext_top5",
    "positive_similarity",
    "negative_similarity",
    "feature_std",  # 1 for queries spread evenly over the sphere, 0 for a collapsed encoder
)


def _averages(output: StepOutput, temperature: float) -> torch.Tensor:
    """Return (7,) fp64: what a row averages over the samples of a step, and a 1."""
    better = (output.negative >= output.positive[:, None]).sum(dim=1)
    values = (
        output.loss.mean(),
        (better < 1).double().mean(),
        (better < 5).double().mean(),
        output.positive.mean() * temperature,
        output.negative.mean() * temperature,
        output.q.std(dim=0).mean() * math.sqrt(output.q.shape[1]),
        torch.ones_like(output.grad_norm),
    )
    return torch.stack([value.double() for value in values])
