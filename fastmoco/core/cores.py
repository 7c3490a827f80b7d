"""The CPU cores that this process may keep busy, which may be fewer than the machine has."""

import os
from collections.abc import Iterator
from pathlib import Path

_CGROUPS = Path("/proc/self/cgroup")  # those that this process is in
_MOUNT = Path("/sys/fs/cgroup")


def count_cores(ranks: int) -> int:
    """Return the cores that each of the ranks of this machine may keep busy; at least 1.

    The smaller of affinity (taskset, Slurm) and CPU quota (containers), divided by the ranks.
    """
    if hasattr(os, "sched_getaffinity"):
        cores = len(os.sched_getaffinity(0))
    else:
        cores = os.cpu_count() or 1
    return max(1, int(min([cores, *_quotas()])) // ranks)


def _quotas() -> Iterator[float]:
    """Yield the CPU quotas of this process's cgroups (versions 1 and 2), in cores."""
    try:
        lines = _CGROUPS.read_text().splitlines()
    except OSError:  # not Linux
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if not controllers:
            root, names = _MOUNT, ["cpu.max"]
        elif "cpu" in controllers.split(","):
            root, names = _MOUNT / "cpu", ["cpu.cfs_quota_us", "cpu.cfs_period_us"]
        else:
            continue
        group = root / path.lstrip("/")
        # The quota of a group binds those below it. A container may see its own as the root.
        for folder in (group, *group.parents):
            if folder.is_relative_to(root):
                yield from _quota(folder, names)


def _quota(folder: Path, names: list[str]) -> Iterator[float]:
    """Yield the quota of a cgroup if it has one; it is "max" or -1 if not."""
    try:
        quota, period = map(int, " ".join((folder / n).read_text() for n in names).split())
    except (OSError, ValueError):
        return
    if quota > 0:
        yield quota / period
