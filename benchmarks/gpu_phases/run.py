"""A training run as a user starts it, watched from outside."""

import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmoco.runs.run_folder import RunFolder

LAUNCHER = Path(__file__).parents[2] / "launch" / "pretrain.py"
STARTING_S = 40.0  # that a run needs for its first steps, and to be asked to end
ENDING_S = 20.0  # that a run may take to save and end once it has been asked to


@contextmanager
def started(recipe: str, out: Path, overrides: Sequence[str]) -> Iterator["subprocess.Popen[Any]"]:
    """Start a run of one process, which is gone afterwards."""
    command = [sys.executable, str(LAUNCHER), recipe, f"out={out}", *overrides]
    with subprocess.Popen(command, stdout=sys.stderr) as process:
        try:
            yield process
        finally:
            process.kill()


def get_rows(process: "subprocess.Popen[Any]", out: Path, until: float) -> Iterator[dict[str, Any]]:
    """Yield the rows of a run as it writes them, until it ends; at `until` it is asked to.

    Raises:
        RuntimeError: it failed.
    """
    seen, asked = 0, False
    while True:
        ended = process.poll() is not None
        rows = RunFolder(out).rows()
        yield from rows[seen:]
        seen = len(rows)
        if ended:
            break
        if time.time() > until + (ENDING_S if asked else 0.0):
            process.send_signal(signal.SIGKILL if asked else signal.SIGTERM)
            asked = True
        time.sleep(0.2)
    if process.returncode:
        raise RuntimeError(f"the run ended with exit code {process.returncode}")
