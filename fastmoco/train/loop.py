"""The loop around the step: fetch, step, log, evaluate, save, stop."""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import AsyncAnyFlag
from fastmoco.core.streams import Spared
from fastmoco.errors import DataError, DivergedError
from fastmoco.load.loader import Batch, Loader
from fastmoco.models.encoder import Encoder
from fastmoco.runs.checkpoints import Fingerprint, Measured, State
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.checkpoint_writer import Best, CheckpointWriter
from fastmoco.train.engine import Engine, StepOutput
from fastmoco.train.interrupts import StopSignal
from fastmoco.train.meter import Meter
from fastmoco.train.optimizers import learning_rate, set_learning_rate
from fastmoco.train.watchdog import Watchdog

Monitor = Callable[[Encoder, Callable[[], bool]], dict[str, float]]
"""Takes the query encoder in evaluation mode, returns numbers by name; runs on every rank.

It asks the second argument every second or so whether to give up, equally often on all ranks, and
then returns no numbers."""


class Display(Protocol):
    """Whoever wants to see the run."""

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl; its `kind` is step, epoch, bad (images) or unsaved."""


@dataclass
class Trainer:
    """A run in progress.

    Attributes:
        recipe: what to do.
        engine: takes the steps.
        loader: the training stream.
        run: where it is written; rank 0 alone writes.
        fingerprint: put into checkpoints.
        any_flag: tells all ranks of a signal to one of them.
        displays: show rows on rank 0.
        monitor: called every `recipe.monitor.every` epochs, and before the first.
    """

    recipe: Recipe
    engine: Engine
    loader: Loader
    run: RunFolder
    fingerprint: Fingerprint
    any_flag: AsyncAnyFlag
    displays: Sequence[Display] = ()
    monitor: Monitor | None = None

    def __post_init__(self) -> None:
        self._is_main = self.engine.world.is_main
        self._meter = Meter(self.recipe, self.engine.world, self.engine.device)
        self._per_epoch = self.loader.plan.steps_per_epoch
        self._known_bad: set[int] = set()
        self._metrics = Spared("rows of metrics.jsonl")
        self._watchdog = Watchdog(self.recipe.runtime.stall_s)
        self._signal = StopSignal(answers=self._is_main)
        checkpoints = self.recipe.checkpoints
        self._writer = CheckpointWriter(self.run, self.fingerprint, checkpoints, self._log_unsaved)
        self._interrupted = self._save_by_clock = False
        self._last_save_by_clock = time.monotonic()
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
            with self._watchdog, self._signal, self._writer:
                done = self._loop(start)
                self._writer.wait(last=True)
        except DivergedError as error:
            raise DivergedError(f"{error} {self.run.last_good()}") from None
        if self._interrupted and done < self.last_step and self._is_main:
            raise KeyboardInterrupt(f"at step {done} of {self.last_step}, which is saved")
        return done

    def _loop(self, start: int) -> int:
        if start == 0 and self.monitor:
            self._log_epoch(0, loss=None)
        best = Best(self.run, self.recipe.checkpoints, start)
        batches = self.loader.batches(start)
        for done in range(start + 1, self.last_step + 1):
            batch, waited_s = _fetch(batches)
            lr = learning_rate(self.recipe.schedule, self.recipe.lr, done - 1, self._per_epoch)
            output = self._step(batch, done - 1, lr)
            self._meter.count(output, waited_s)

            last = done == self.last_step
            if last or done % self.recipe.runtime.log_every == 0:
                self._log("step", done, {"lr": lr, **self._meter.read(output, self.engine)})
            measured: Measured = {}
            if last or done % self._per_epoch == 0:
                measured = self._log_epoch(done, self._meter.end_epoch())

            stop = self._stop_requested() or last
            if best.is_reached(measured) or self._checkpoint_is_due(done) or stop:
                self._save(done, measured)
            if stop:
                return done
            self._writer.poll()
        return start

    def _step(self, batch: Batch, step: int, lr: float) -> StepOutput:
        set_learning_rate(self.engine.optimizer, lr)
        return self.engine.step(batch.views[0], batch.views[-1], step, batch.ids)

    def _log(self, kind: str, done: int, numbers: dict[str, Any]) -> None:
        """Write a row down and show it."""
        if self._is_main:
            row = {"kind": kind, "step": done, "epoch": done / self._per_epoch, **numbers}
            with self._metrics:
                self.run.log(row)
            for display in self.displays:
                display.show(row)

    def _log_epoch(self, done: int, loss: float | None) -> Measured:
        """Write down an epoch, and return what was measured at its end."""
        whole, part = divmod(done, self._per_epoch)
        numbers: dict[str, Any] = {"epoch": done / self._per_epoch if part else whole, "loss": loss}
        every = self.recipe.monitor.every if self.recipe.monitor else 1
        measured: Measured = {}
        if self.monitor and (whole % every == 0 or done == self.last_step):
            measured = self._evaluate(self.monitor)
        self._log("epoch", done, numbers | measured)
        return measured

    def _log_unsaved(self, done: int, message: str) -> None:
        self._log("unsaved", done, {"message": message})

    def _evaluate(self, monitor: Monitor) -> dict[str, float]:
        self.engine.all_reduce_buffers()
        self.engine.encoder_q.eval()
        numbers = monitor(self.engine.encoder_q, self._stop_requested)
        # Ranks on unlike machines may differ in the last bit, but must save together.
        numbers = self.engine.world.gather_object(numbers)[0]
        self.engine.train()
        self._meter.restart_clock()
        return numbers

    def _stop_requested(self) -> bool:
        """Return whether a signal has come to any rank; every rank must ask equally often."""
        self._watchdog.alive()
        stop, self._interrupted, by_clock = self.any_flag(
            self._signal.received, self._signal.interrupted, self._minutes_are_over()
        )
        self._save_by_clock |= by_clock
        return stop

    def _minutes_are_over(self) -> bool:
        """Return once an interval whether a checkpoint is due by the clock of rank 0."""
        minutes = self.recipe.checkpoints.minutes
        now = time.monotonic()
        if not self._is_main or not minutes or now - self._last_save_by_clock < 60 * minutes:
            return False
        self._last_save_by_clock = now
        return True

    def _checkpoint_is_due(self, done: int) -> bool:
        every = self.recipe.checkpoints.every
        due, self._save_by_clock = self._save_by_clock or bool(every and done % every == 0), False
        return due

    def _save(self, done: int, measured: Measured) -> None:
        self._watchdog.alive()
        self._share_corrupt_ids(done)
        self.engine.all_reduce_buffers()
        self._meter.all_reduce()
        if self._is_main:
            self._writer.save(self.state(), done, self.engine.device, measured)

    def _share_corrupt_ids(self, done: int) -> None:
        """Let every rank know the damaged samples that any of them met, and write down new ones."""
        bad = self.engine.world.union(self.loader.bad)
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
        return {**self.engine.state(), **self._meter.state(), "bad": sorted(self.loader.bad)}

    def load(self, state: State) -> None:
        """Take over a state that `state` returned."""
        self.engine.load(state)
        self._meter.load(state)
        self.loader.avoid(state["bad"])
        self._known_bad = set(state["bad"])


def _fetch(batches: Iterator[Batch]) -> tuple[Batch, float]:
    """Return the next batch, and the seconds that it was waited for."""
    began = time.perf_counter()
    return next(batches), time.perf_counter() - began
