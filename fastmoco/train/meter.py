"""What a run says of itself: accumulated on the device, read on logged steps only."""

import math
import time
from typing import Any

import torch

from fastmoco.distributed import Ranks
from fastmoco.train.moco import MoCo, Outcome


class Meter:
    """Loss of the epoch, speed, and the share of time spent waiting for data.

    Attributes:
        epoch: (2,) fp64 on the device: sum of the step losses of this epoch, and their number.
    """

    def __init__(self, batch: int, ranks: Ranks, device: torch.device) -> None:
        self.epoch = torch.zeros(2, dtype=torch.float64, device=device)
        self._batch, self._ranks = batch, ranks
        self.restart_clock()

    def restart_clock(self) -> None:
        """Leave out what came before, such as a monitor."""
        self._since, self._steps, self._waited_s = time.perf_counter(), 0, 0.0

    def count(self, outcome: Outcome, waited_s: float) -> None:
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

    def read(self, outcome: Outcome, moco: MoCo) -> dict[str, Any]:
        """Return the row of a logged step: means over the ranks, speed since the last one."""
        scalars = _scalars(outcome, moco.recipe.temperature)
        values = self._ranks.mean_(torch.stack(list(scalars.values())))
        elapsed = time.perf_counter() - self._since
        row = {
            **dict(zip(scalars, values.tolist(), strict=True)),
            "grad_norm": float(outcome.grad_norm),
            "queue_filled": int(moco.queue.filled),
            "skipped": moco.guard.check(),
            "images_per_s": self._batch * self._steps / elapsed,
            "data_wait_percent": 100 * self._waited_s / elapsed,
        }
        self.restart_clock()
        return row


def _scalars(outcome: Outcome, t: float) -> dict[str, torch.Tensor]:
    """Return what is averaged over the samples of a step; `t` is the temperature.

    `feature_std` is 1 for queries spread evenly over the sphere and 0 for a collapsed encoder.
    """
    hardest = outcome.negative.max(dim=1).values
    return {
        "loss": outcome.loss.mean(),
        "pretext_top1": (outcome.positive > hardest).to(outcome.loss.dtype).mean(),
        "positive_similarity": outcome.positive.mean() * t,
        "negative_similarity": outcome.negative.mean() * t,
        "feature_std": outcome.q.std(dim=0).mean() * math.sqrt(outcome.q.shape[1]),
    }
