"""Timing and counting, on a GPU or, for a dry run, on a CPU."""

import gc
import json
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

# Of CUDA's calls, those that return when the device has got somewhere.
_WAITS = ("cudaStreamSynchronize", "cudaDeviceSynchronize", "cudaEventSynchronize")
_MARK = "what is counted"


def wait(device: torch.device) -> None:
    """Wait until the device has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds_of(work: Callable[[int], object], device: torch.device, seconds: float) -> float:
    """Return the seconds that a call of `work`, which is warm, takes.

    Args:
        work: called with 0, 1, ...
        device: that does it.
        seconds: how long to measure, about; two calls are, at least.
    """
    wait(device)
    began = time.perf_counter()
    work(0)
    wait(device)
    count = max(2, round(seconds / (time.perf_counter() - began)))
    began = time.perf_counter()
    for number in range(1, 1 + count):
        work(number)
    wait(device)
    return (time.perf_counter() - began) / count


def forget() -> None:
    """Give back what the last item held, and start its counters anew."""
    gc.collect()
    torch._dynamo.reset()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()


def peak_memory_gb(device: torch.device) -> float | None:
    """Return the most that torch held on a GPU since `forget`."""
    return torch.cuda.max_memory_allocated(device) / 1e9 if device.type == "cuda" else None


@dataclass(frozen=True)
class Profile:
    """What a GPU ran.

    Attributes:
        kernels: how many; None: the profiler saw none.
        waits: calls in which the host waited for the device.
        top: the kernels that took longest, as (name, number, milliseconds).
    """

    kernels: int | None = None
    waits: int | None = None
    top: list[tuple[str, int, float]] = field(default_factory=list)

    def figures(self) -> dict[str, Any]:
        """Return them as a row's."""
        return {"kernels": self.kernels, "waits": self.waits, "top": self.top}


def profiled(work: Callable[[], object], device: torch.device) -> Profile:
    """Return what one call ran; an empty profile on a CPU."""
    if device.type != "cuda":
        return Profile()
    from torch.profiler import ProfilerActivity, profile, record_function

    wait(device)
    try:
        with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as profiler:
            with record_function(_MARK):
                work()
            wait(device)
        with TemporaryDirectory() as folder:
            path = Path(folder) / "trace.json"
            profiler.export_chrome_trace(str(path))
            return profile_of(json.loads(path.read_text())["traceEvents"])
    except Exception:  # a machine may forbid profiling: what was timed counts all the same
        traceback.print_exc()
        return Profile()


def profile_of(events: list[dict[str, Any]], shown: int = 12) -> Profile:
    """Count the events of a Chrome trace that torch.profiler has written."""
    kernels = [event for event in events if event.get("cat") == "kernel"]
    if not kernels:
        return Profile()
    marks = [e for e in events if e["name"] == _MARK and e.get("cat") == "user_annotation"]
    first, last = marks[0]["ts"], marks[0]["ts"] + marks[0]["dur"]
    # Behind the mark we wait ourselves, and the profiler does.
    waits = sum(e["name"] in _WAITS and first <= e["ts"] < last for e in events)
    times: dict[str, list[float]] = {}
    for kernel in kernels:
        times.setdefault(kernel["name"], []).append(kernel["dur"] / 1e3)
    top = sorted(times.items(), key=lambda pair: -sum(pair[1]))[:shown]
    return Profile(len(kernels), waits, [(name, len(ms), sum(ms)) for name, ms in top])
