"""The loop around the step: fetch, step, maybe log, maybe monitor, maybe save."""

import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, Protocol

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import AsyncAnyFlag
from fastmoco.core.streams import Spared
from fastmoco.errors import CheckpointError, DataError, DivergedError
from fastmoco.load.loader import Batch, Loader
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import Fingerprint, RunFolder, State
from fastmoco.train.engine import Engine
from fastmoco.train.interrupts import StopSignal
from fastmoco.train.meter import Meter
from fastmoco.train.optimizers import learning_rate, set_learning_rate
from fastmoco.train.snapshot import snapshot
from fastmoco.train.watchdog import Watchdog

Monitor = Callable[[Encoder, Callable[[], bool]], dict[str, float]]
"""Takes the query encoder in evaluation mode, returns numbers by name; runs on every rank.

It asks the second argument every second or so whether to give up, equally often on all ranks, and
then returns no numbers."""


class Display(Protocol):
    """Whoever wants to see the run."""

    def step(self, row: dict[str, Any]) -> None:
        """Show a logged step."""

    def epoch(self, row: dict[str, Any]) -> None:
        """Show the end of an epoch."""

    def bad(self, row: dict[str, Any]) -> None:
        """Show damaged samples that the run goes on without."""

    def unsaved(self, row: dict[str, Any]) -> None:
        """Show that a checkpoint could not be written."""


@dataclass
class Trainer:
    """A run in progress.

    Attributes:
        recipe: what to do.
        moco: the engine.
        loader: the training stream.
        run: where it is written; rank 0 alone writes.
        marks: fingerprint put into checkpoints.
        displays: show rows on rank 0.
        monitor: called every `recipe.monitor.every` epochs, and before the first.
    """

    recipe: Recipe
    moco: Engine
    loader: Loader
    run: RunFolder
    marks: Fingerprint
    displays: Sequence[Display] = ()
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        self._meter = Meter(self.recipe, self.moco.ranks, self.moco.device)
        self._per_epoch = self.loader.plan.steps_per_epoch
        self._known_bad: set[int] = set()
        self._metrics = Spared("rows of metrics.jsonl")
        self._vote = AsyncAnyFlag(self.moco.ranks)
        self._watchdog = Watchdog(self.recipe.runtime.stall_s)
        self._signal = StopSignal(answers=self.moco.ranks.leads)
        self._interrupted = self._due = False
        self._last_due = time.monotonic()
        self._saving: tuple[int, Future[None]] | None = None
        self.last_step = self.recipe.last_step(self._per_epoch)

    def train(self, start: int) -> int:
        """Run from step `start` to the end, or to a signal, and return the steps done.

        Raises:
            DataError: an image cannot be read or decoded.
            DivergedError: too many non-finite steps in a row.
            CheckpointError: the last checkpoint could not be written.
            KeyboardInterrupt: on rank 0 at a Ctrl-C, once the checkpoint is written.
        """
        try:
            with self._watchdog, self._signal, ThreadPoolExecutor(1, "checkpoint") as self._writer:
                return self._steps(start)
        except DivergedError as error:
            raise DivergedError(f"{error} {self.run.last_good()}") from None

    def _steps(self, start: int) -> int:
        if start == 0 and self.monitor:
            self._end_epoch(0, loss=None)
        batches = self.loader.batches(start)
        for step in range(start, self.last_step):
            self._step(step, *_timed(batches))
            done = step + 1
            if self._asked_to_stop() or done == self.last_step:
                self._save(done)
                self._finish_saving(final=True)
                if self._interrupted and done < self.last_step and self.moco.ranks.leads:
                    raise KeyboardInterrupt(f"at step {done} of {self.last_step}, which is saved")
                return done
            if self._checkpoint_is_due(done):
                self._save(done)
            elif self._saving and self._saving[1].done():
                self._finish_saving()
        return start

    def _asked_to_stop(self) -> bool:
        """Return whether a signal has come to any rank; every rank must ask equally often."""
        self._watchdog.alive()
        stop, self._interrupted, due = self._vote(
            self._signal.received, self._signal.interrupted, self._minutes_are_over()
        )
        self._due |= due
        return stop

    def _minutes_are_over(self) -> bool:
        """Return once an interval whether a checkpoint is due by the clock of rank 0."""
        minutes = self.recipe.checkpoints.minutes
        now = time.monotonic()
        if not self.moco.ranks.leads or not minutes or now - self._last_due < 60 * minutes:
            return False
        self._last_due = now
        return True

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.recipe.checkpoints.every
        due, self._due = self._due or bool(every and done % every == 0), False
        return due

    def _step(self, step: int, batch: Batch, waited_s: float) -> None:
        lr = learning_rate(self.recipe.schedule, self.recipe.lr, step, self._per_epoch)
        set_learning_rate(self.moco.optimizer, lr)
        query_view, key_view = batch.views
        outcome = self.moco.step(query_view, key_view, step)
        self._meter.count(outcome, waited_s)
        done = step + 1
        if done % self.recipe.runtime.log_every == 0 or done == self.last_step:
            self._log("step", done, {"lr": lr, **self._meter.read(outcome, self.moco)})
        if done % self._per_epoch == 0 or done == self.last_step:
            self._end_epoch(done, self._meter.end_epoch())

    def _log(self, kind: str, done: int, numbers: dict[str, Any]) -> None:
        """Write a row down and show it."""
        if self.moco.ranks.leads:
            row = {"kind": kind, "step": done, "epoch": done / self._per_epoch, **numbers}
            with self._metrics:
                self.run.log(row)
            for display in self.displays:
                getattr(display, kind)(row)

    def _end_epoch(self, done: int, loss: float | None) -> None:
        whole, part = divmod(done, self._per_epoch)
        numbers: dict[str, Any] = {"epoch": done / self._per_epoch if part else whole, "loss": loss}
        every = self.recipe.monitor.every if self.recipe.monitor else 1
        if self.monitor and (whole % every == 0 or done == self.last_step):
            numbers |= self._evaluate(self.monitor)
        self._log("epoch", done, numbers)

    def _evaluate(self, monitor: Monitor) -> dict[str, float]:
        self.moco.settle()
        self.moco.encoder_q.eval()
        numbers = monitor(self.moco.encoder_q, self._asked_to_stop)
        self.moco.train()
        self._meter.restart_clock()
        return numbers

    def _save(self, done: int) -> None:
        """Copy the state and let it be written beside the next steps, one checkpoint at a time."""
        self._watchdog.alive()
        self._share_bad(done)
        self.moco.settle()
        self._meter.settle()
        if self.moco.ranks.leads:
            self._finish_saving()
            copied = snapshot(self.state(), self.moco.device)
            self._saving = done, self._writer.submit(self._write, copied, done)

    def _write(self, copied: Callable[[], State], done: int) -> None:
        self.run.save(copied(), done, self.marks, self.recipe.checkpoints.keep)

    def _finish_saving(self, final: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is."""
        if self._saving:
            (done, written), self._saving = self._saving, None
            try:
                written.result()
            except OSError as error:
                self._go_on_unsaved(done, error, final)

    def _go_on_unsaved(self, done: int, error: OSError, final: bool) -> None:
        """A full disk costs a checkpoint, not the run: whoever watches may make room in time."""
        words = f"No checkpoint of step {done} ({error.strerror or error}): make room."
        if final:
            raise CheckpointError(f"{words} {self.run.last_good()}") from error
        self._log("unsaved", done, {"message": f"{words} {self.run.last_good()}"})

    def _share_bad(self, done: int) -> None:
        """Let every rank know the damaged samples that any of them met, and write down new ones."""
        bad = self.moco.ranks.union(self.loader.bad)
        self.loader.avoid(bad)
        new = sorted(bad - self._known_bad)
        self._known_bad = bad
        if new:
            named = [self.loader.data.describe(sample) for sample in new]
            self._log("bad", done, {"ids": new, "samples": named})
        if len(bad) > self.recipe.data.max_bad_images:  # of all ranks together
            raise DataError(
                f"{len(bad)} damaged images are more than data.max_bad_images="
                f"{self.recipe.data.max_bad_images}: copy the sets again, or allow more."
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
