"""Checking images in worker processes, with the results in the order of the request."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path

from fastmoco.errors import DataError
from fastmoco.pack.check import Checked, check_file

CHUNK = 16  # images a task
AHEAD = 4  # tasks in flight for each worker: bounds the memory


def check_files(
    root: Path, names: Sequence[str], workers: int, min_side: int
) -> Generator[Checked | str, None, None]:
    """Yield the result of `check_file` for each name below `root`, in order.

    Close the generator (`contextlib.closing`) to stop the workers early.

    Raises:
        DataError: a worker ran out of memory or was killed.
    """
    context = multiprocessing.get_context("spawn")  # the parent may hold torch's threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    waiting: deque[Future[list[Checked | str]]] = deque()
    try:
        for start in range(0, len(names), CHUNK):
            waiting.append(_submit(pool, root, names[start : start + CHUNK], min_side))
            if len(waiting) >= AHEAD * workers:
                yield from waiting.popleft().result()
        while waiting:
            yield from waiting.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        raise DataError("A worker ran out of memory or was killed: try fewer --workers.") from error
    finally:
        pool.shutdown(cancel_futures=True)


def _check_chunk(root: Path, names: Sequence[str], min_side: int) -> list[Checked | str]:
    return [check_file(root / name, min_side) for name in names]


def _submit(
    pool: ProcessPoolExecutor, root: Path, names: Sequence[str], min_side: int
) -> Future[list[Checked | str]]:
    # A submit may start a worker, which inherits the mask: Ctrl-C is for the parent to handle.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(_check_chunk, root, names, min_side)
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_with_parent() -> None:
    """Let this worker end when its parent does: a killed parent cannot tell it to."""
    threading.Thread(target=_wait_for_parent_and_exit, daemon=True).start()


def _wait_for_parent_and_exit() -> None:
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)
