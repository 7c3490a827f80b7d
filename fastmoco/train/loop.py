"""The loop around the step: fetch, step, maybe log, maybe monitor, maybe save."""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol

from fastmoco.config import Recipe
from fastmoco.errors import DataError
from fastmoco.load.loader import Batch, Loader
from fastmoco.models.resnet import Encoder
from fastmoco.run import Fingerprint, RunFolder, State
from fastmoco.train.meter import Meter
from fastmoco.train.moco import MoCo
from fastmoco.train.optim import learning_rate, set_learning_rate

Monitor = Callable[[Encoder], dict[str, float]]
"""Takes the query encoder in evaluation mode, returns numbers by name; runs on every rank."""


class Display(Protocol):
    """Whoever wants to see the run."""

    def step(self, row: dict[str, Any]) -> None:
        """Show a logged step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the end of an epoch."""

    def bad(self, row: dict[str, Any]) -> None:
        """Show damaged samples that the run goes on without."""


@dataclass
class Trainer:
    """A run in progress.

    Attributes:
        recipe: what to do.
        moco: the engine.
        loader: the training stream.
        run: where it is written; rank 0 alone writes.
        marks: fingerprint put into checkpoints.
        display: shows rows on rank 0.
        monitor: called every `recipe.monitor.every` epochs, and before the first.
    """

    recipe: Recipe
    moco: MoCo
    loader: Loader
    run: RunFolder
    marks: Fingerprint
    display: Display
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        self._meter = Meter(self.recipe.batch, self.moco.ranks, self.moco.device)
        self._per_epoch = self.loader.plan.steps_per_epoch
        self._known_bad: set[int] = set()

    @property
    def last_step(self) -> int:
        """Steps of the whole run."""
        return self.recipe.last_epoch * self._per_epoch

    def train(self, start: int) -> None:
        """Run from step `start` to the end.

        Raises:
            DataError: an image cannot be read or decoded.
            DivergedError: too many non-finite steps in a row.
        """
        if start == 0 and self.monitor:
            self._end_epoch(0, loss=None)
        batches = self.loader.batches(start)
        for step in range(start, self.last_step):
            batch, waited_s = _timed(batches)
            lr = learning_rate(
                self.recipe.schedule, self.recipe.optimizer.lr, step, self._per_epoch
            )
            set_learning_rate(self.moco.optimizer, lr)
            query_view, key_view = batch.views
            outcome = self.moco.step(query_view, key_view, step)
            self._meter.count(outcome, waited_s)

            done = step + 1
            if done % self.recipe.log_every == 0 or done == self.last_step:
                self._log(done, {"lr": lr, **self._meter.read(outcome, self.moco)})
            if done % self._per_epoch == 0:
                self._end_epoch(done, self._meter.end_epoch())
            if done % self.recipe.checkpoint_every == 0 or done == self.last_step:
                self._save(done)

    def _log(self, done: int, numbers: dict[str, Any]) -> None:
        row = {"kind": "step", "step": done, "epoch": done / self._per_epoch, **numbers}
        if self.moco.ranks.leads:
            self.run.log(row)
            self.display.step(row)

    def _end_epoch(self, done: int, loss: float | None) -> None:
        epoch = done // self._per_epoch
        row: dict[str, Any] = {"kind": "epoch", "step": done, "epoch": epoch, "loss": loss}
        every = self.recipe.monitor.every if self.recipe.monitor else 1
        if self.monitor and (epoch % every == 0 or done == self.last_step):
            row |= self._evaluate(self.monitor)
        if self.moco.ranks.leads:
            self.run.log(row)
            self.display.epoch(row)

    def _evaluate(self, monitor: Monitor) -> dict[str, float]:
        self.moco.settle()
        self.moco.encoder_q.eval()
        numbers = monitor(self.moco.encoder_q)
        self.moco.train()
        self._meter.restart_clock()
        return numbers

    def _save(self, done: int) -> None:
        self._share_bad(done)
        self.moco.settle()
        self._meter.settle()
        if self.moco.ranks.leads:
            self.run.save(self.state(), done, self.marks, self.recipe.keep)

    def _share_bad(self, done: int) -> None:
        """Let every rank know the damaged samples that any of them met, and write down new ones."""
        bad = self.moco.ranks.union(self.loader.bad)
        self.loader.avoid(bad)
        new = sorted(bad - self._known_bad)
        self._known_bad = bad
        if new and self.moco.ranks.leads:
            named = [self.loader.data.describe(sample) for sample in new]
            row = {"kind": "bad", "step": done, "ids": new, "samples": named}
            self.run.log(row)
            self.display.bad(row)
        if len(bad) > self.recipe.max_bad_images:  # of all ranks together
            raise DataError(
                f"{len(bad)} damaged images are more than max_bad_images="
                f"{self.recipe.max_bad_images}: copy the sets again, or allow more."
            )

    def state(self) -> State:
        """Return all that a resumed run needs beside the step number."""
        return {
            **self.moco.state(),
            "epoch_loss": self._meter.epoch,
            "bad": sorted(self.loader.bad),
        }

    def load(self, state: State) -> None:
        """Take over a state that `state` returned."""
        self.moco.load(state)
        self._meter.epoch.copy_(state["epoch_loss"])
        self.loader.avoid(state["bad"])
        self._known_bad = set(state["bad"])


def _timed(batches: Iterator[Batch]) -> tuple[Batch, float]:
    began = time.perf_counter()
    return next(batches), time.perf_counter() - began
