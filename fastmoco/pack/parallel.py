"""Calling a function in worker processes, with the results in the order of the request."""

import multiprocessing
import os
import signal
import threading
from collections import deque
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from fastmoco.errors import DataError

AHEAD = 4  # tasks in flight for each worker: bounds the memory

T = TypeVar("T")
R = TypeVar("R")


def ordered_map(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yield function(task) for each task, in order, computed by `workers` processes.

    Tasks are taken as workers need them. Close the generator (`contextlib.closing`) to stop early.

    Raises:
        DataError: a worker ran out of memory or was killed.
    """
    context = multiprocessing.get_context("spawn")  # the parent may hold torch's threads
    pool = ProcessPoolExecutor(workers, mp_context=context, initializer=_end_with_parent)
    waiting: deque[Future[R]] = deque()
    try:
        for task in tasks:
            waiting.append(_submit(pool, function, task))
            if len(waiting) >= AHEAD * workers:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()
    except (BrokenProcessPool, MemoryError) as error:
        raise DataError(
            "A worker ran out of memory or was killed: try fewer --workers. (A script that calls "
            'this needs `if __name__ == "__main__"`.)'
        ) from error
    finally:
        pool.shutdown(cancel_futures=True)


def mapped(
    function: Callable[[T], R], tasks: Iterable[T], workers: int
) -> Generator[R, None, None]:
    """Yield function(task) for each task, in order; a single worker is this process.

    For functions whose failure does not take this process along; see `ordered_map`.
    """
    if workers > 1:
        yield from ordered_map(function, tasks, workers)
    else:
        yield from map(function, tasks)


def _submit(pool: ProcessPoolExecutor, function: Callable[[T], R], task: T) -> Future[R]:
    # A submit may start a worker, which inherits the mask: Ctrl-C is for the parent to handle.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        return pool.submit(function, task)
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
