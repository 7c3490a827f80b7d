"""What the device can do: the rates by which every other figure is to be judged."""

from collections.abc import Callable

import torch

from gpu_phases.measure import seconds_of
from gpu_phases.task import Figures, Item, Items, Task

SECONDS = 1.0  # of each measurement


def items(task: Task) -> Items:
    """Return the rates, by the names that the page knows."""
    return {
        "rate/copy": Item(lambda: copy(task)),
        "rate/bf16 matmul": Item(lambda: matmul(task)),
        "rate/host to device": Item(lambda: to_device(task)),
    }


def copy(task: Task) -> Figures:
    """Return the bandwidth of a copy on the device."""
    size = 2**20 if task.dry else 2**30
    source = torch.ones(size, dtype=torch.uint8, device=task.device)
    target = torch.empty_like(source)
    rate = 2 * size / _seconds(task, lambda: target.copy_(source))
    return _rate(rate / 1e9, "GB/s", f"{size / 2**20:.0f} MiB read and as many written")


def matmul(task: Task) -> Figures:
    """Return the rate of a product of bf16 matrices."""
    side = 128 if task.dry else 8192
    a, b = torch.randn(2, side, side, dtype=torch.bfloat16, device=task.device)
    rate = 2 * side**3 / _seconds(task, lambda: a @ b)
    return _rate(rate / 1e12, "TFLOP/s", f"{side} x {side} x {side}")


def to_device(task: Task) -> Figures:
    """Return the bandwidth from pinned host memory to the device."""
    size = 2**20 if task.dry else 2**28
    source = torch.ones(size, dtype=torch.uint8, pin_memory=not task.dry)
    target = torch.empty(size, dtype=torch.uint8, device=task.device)
    rate = size / _seconds(task, lambda: target.copy_(source, non_blocking=True))
    return _rate(rate / 1e9, "GB/s", f"{size / 2**20:.0f} MiB from pinned memory")


def _seconds(task: Task, work: Callable[[], object]) -> float:
    device = torch.device(task.device)
    work()
    return seconds_of(lambda _: work(), device, 0.05 if task.dry else SECONDS)


def _rate(value: float, unit: str, how: str) -> Figures:
    return {"value": value, "unit": unit, "how": how}
