"""The outside of a measured process: starts a command, watches what it costs, prints it as JSON.

    python -m harness.resource_monitor COMMAND...

It is a process of its own for each measurement, so that RUSAGE_CHILDREN holds this command and
nothing else. It also adopts orphans: a worker that its parent left behind is waited for all the
same (ended, if it does not end by itself), and its CPU seconds count. What a process that ignores
SIGCHLD lets go of is not seen by the kernel, and so not here.

Peak memory is the largest sum of PSS (proportional set size: a page that n processes share counts
1/n in each) over the tree of processes, without this one. Page cache does not count, mapped and
shared memory does. It is sampled every 50 ms. Reading PSS takes milliseconds and holds up the
process that is read, so it is read only when the sum of RSS, which is never below, says that there
may be a new peak; and where a sample takes long, the next one waits, so that sampling never takes
more than 5 % of one core. A peak that is shorter than this is missed.
"""

import ctypes
import json
import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, BinaryIO

import psutil

PERIOD = 0.05  # seconds between two samples
SHARE = 0.05  # of one core, that sampling may take
CHANGED = 0.01  # relative change of RSS that makes another look at PSS worth while
PATIENCE = 5.0  # seconds that orphans have to end by themselves
TAIL = 4000  # characters of stderr that are handed on
NOT_STARTED = 127
PR_SET_CHILD_SUBREAPER = 36


class _Sampler(threading.Thread):
    """Follows the memory of all processes below this one."""

    def __init__(self) -> None:
        super().__init__(daemon=True)
        self.peak = 0
        self.samples = 0
        self._resident = 0
        self._ended = threading.Event()

    def run(self) -> None:
        pause = 0.0
        while not self._ended.wait(pause):
            began = time.thread_time()
            self._sample()
            pause = max(PERIOD, (time.thread_time() - began) / SHARE)

    def stop(self) -> None:
        self._ended.set()
        self.join()

    def _sample(self) -> None:
        processes = psutil.Process().children(recursive=True)
        resident = sum(map(_resident_bytes, processes))
        self.samples += 1
        changed = abs(resident - self._resident) > CHANGED * resident
        if resident > self.peak and changed:
            self._resident = resident
            self.peak = max(self.peak, sum(map(_proportional_bytes, processes)))


def _resident_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error):  # it has ended since
        return int(process.memory_info().rss)
    return 0


def _proportional_bytes(process: psutil.Process) -> int:
    with suppress(psutil.Error):
        return int(process.memory_full_info().pss)
    return 0


def watch(command: Sequence[str]) -> dict[str, Any]:
    """Run a command to its end; return its status, its costs and the end of what it printed."""
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        try:
            costs = _costs(command, out, err)
        except OSError as error:
            text = f"{command[0]} cannot be started: {error.strerror}."
            return {"status": NOT_STARTED, "stderr": text}
        last_line = (_text(out).splitlines() or [""])[-1]
        return {**costs, "last_line": last_line, "stderr": _text(err)[-TAIL:]}


def _costs(command: Sequence[str], out: BinaryIO, err: BinaryIO) -> dict[str, Any]:
    load, ticks, began = os.getloadavg()[0], psutil.cpu_times(), time.perf_counter()
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=err)
    sampler = _Sampler()
    sampler.start()
    status = process.wait()
    wall = time.perf_counter() - began
    sampler.stop()
    _reap_orphans()
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {
        "status": status,
        "wall_s": wall,
        "cpu_s": used.ru_utime + used.ru_stime,
        "peak_bytes": sampler.peak,
        "memory_samples": sampler.samples,
        "load_before": load,
        "steal_percent": _steal_percent(ticks._asdict(), psutil.cpu_times()._asdict()),
    }


def _steal_percent(before: dict[str, float], after: dict[str, float]) -> float:
    """Return the share of all cores' time that the machine's host kept from it."""
    # A guest's time is part of the user time already.
    spent = {k: after[k] - before[k] for k in after if not k.startswith("guest")}
    return 100 * spent["steal"] / max(sum(spent.values()), 1e-9)


def _adopt_orphans() -> None:
    """Become the parent of every descendant whose own parent ends."""
    ctypes.CDLL(None).prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def _reap_orphans() -> None:
    end = time.monotonic() + PATIENCE
    with suppress(ChildProcessError):  # none is left
        while True:
            if os.waitpid(-1, os.WNOHANG) != (0, 0):
                continue
            if time.monotonic() > end:
                _kill_all()
            time.sleep(0.01)


def _kill_all() -> None:
    for process in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            process.kill()


def _text(stream: BinaryIO) -> str:
    stream.seek(0)
    return stream.read().decode(errors="replace").strip()


def main() -> int:
    """Watch the command of the command line."""
    _adopt_orphans()
    print(json.dumps(watch(sys.argv[1:])))
    return 0


if __name__ == "__main__":
    sys.exit(main())
