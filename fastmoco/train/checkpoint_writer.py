"""Checkpoints on their way to the disk, beside the steps."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

from fastmoco.config.monitor import Checkpoints
from fastmoco.errors import CheckpointError
from fastmoco.runs.checkpoints import Fingerprint, Measured, State, is_better
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.snapshot import snapshot


class CheckpointWriter:
    """Writes one checkpoint at a time on a thread; a full disk costs a checkpoint, not the run.

    Args:
        run: where they go.
        fingerprint: of the run.
        checkpoints: which of them stay.
        failed: told the step and what went wrong, on the caller's thread.
    """

    def __init__(
        self,
        run: RunFolder,
        fingerprint: Fingerprint,
        checkpoints: Checkpoints,
        failed: Callable[[int, str], None],
    ) -> None:
        self._run, self._fingerprint, self._failed = run, fingerprint, failed
        self._keep, self._best = checkpoints.keep, checkpoints.best_metric
        self._pending: tuple[int, Future[None]] | None = None

    def __enter__(self) -> "CheckpointWriter":
        self._thread = ThreadPoolExecutor(1, "checkpoint")
        return self

    def __exit__(self, *raised: object) -> None:
        self._thread.shutdown()

    def save(self, state: State, done: int, device: torch.device, measured: Measured) -> None:
        """Copy the state of step `done`, after which it may change, and let it be written."""
        self.wait()
        copied = snapshot(state, device)
        self._pending = done, self._thread.submit(self._write, copied, done, measured)

    def _write(self, copied: Callable[[], State], done: int, measured: Measured) -> None:
        self._run.save(copied(), done, self._fingerprint, self._keep, measured, self._best)

    def poll(self) -> None:
        """Tell of a failure, once the thread has met it; whoever watches may make room in time."""
        if self._pending and self._pending[1].done():
            self.wait()

    def wait(self, last: bool = False) -> None:
        """Wait for the checkpoint that is being written, if one is.

        Raises:
            CheckpointError: it could not be written, and it is the `last`.
        """
        if not self._pending:
            return
        (done, written), self._pending = self._pending, None
        try:
            written.result()
        except OSError as error:
            words = f"No checkpoint of step {done} ({error.strerror or error}): make room."
            if last:
                raise CheckpointError(f"{words} {self._run.last_good()}") from error
            self._failed(done, f"{words} {self._run.last_good()}")


class Best:
    """Whether what was just measured is the best so far, the same on all ranks.

    Args:
        run: whose checkpoints up to `start` tell what was reached before.
        checkpoints: by which number; none: nothing is the best.
        start: steps done before.
    """

    def __init__(self, run: RunFolder, checkpoints: Checkpoints, start: int) -> None:
        self._metric = checkpoints.best_metric
        self._best = run.measured_best(self._metric, start) if self._metric else {}

    def is_reached(self, measured: Measured) -> bool:
        """Return whether these numbers are better than all before, and remember them."""
        if self._metric not in measured or not is_better(measured, self._best, self._metric):
            return False
        self._best = measured
        return True
