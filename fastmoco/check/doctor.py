"""What is installed here, what is missing, and what would be slow; each line with a remedy."""

import os
import platform
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

from fastmoco.core.cores import count_cores
from fastmoco.dataset.shard_set import ShardSet

_READ = 2**28  # bytes of a set that are read to tell its speed
_SLOW_MB = 200  # a second: an H100 at 4,000 img/s reads 450 of ImageNet's JPEGs
_LITTLE_MEMORY_GB, _LITTLE_DISK_GB = 8, 10


@dataclass(frozen=True)
class Finding:
    """One line.

    Attributes:
        name: of what was looked at.
        found: what it is.
        remedy: what to do about it; empty: it is fine.
    """

    name: str
    found: str
    remedy: str = ""


def examine(data: Path | None = None) -> Iterator[Finding]:
    """Yield what there is to say of this machine.

    Args:
        data: a packed set, whose disk is looked at and which is read; None: the current folder's.

    Raises:
        DataError: there is no set.
    """
    yield Finding("Python", platform.python_version())
    for package in ("torch", "torchvision", "numpy", "numba", "pillow"):
        yield Finding(package, _version(package) or "missing")
    yield _dali()
    yield from _gpus()
    yield _cores()
    yield _memory()
    yield _disk(data or Path())
    if data:
        yield _reading(ShardSet(data))


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _dali() -> Finding:
    for cuda in ("130", "120"):
        if found := _version(f"nvidia-dali-cuda{cuda}"):
            return Finding("DALI", f"{found} for CUDA {cuda[:2]}")
    if not torch.cuda.is_available():
        return Finding("DALI", "missing; a CPU needs none")
    return Finding(
        "DALI",
        "missing",
        "pip install 'fastmoco[cuda13]' (Linux; [cuda12] for a driver older than 580), or train "
        "with runtime.executor=fused",
    )


def _gpus() -> Iterator[Finding]:
    if not torch.cuda.is_available():
        built = f"torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "none"
        present = bool(shutil.which("nvidia-smi"))
        remedy = "update its driver, or install a torch built for it" if present else ""
        yield Finding("GPU", f"none that torch can use ({built})", remedy)
        return
    for number in range(torch.cuda.device_count()):
        device = torch.cuda.get_device_properties(number)
        free, total = torch.cuda.mem_get_info(number)
        memory = f"{free / 1e9:.0f} of {total / 1e9:.0f} GB free"
        taken = "another program holds its memory" if free < total / 2 else ""
        yield Finding(f"GPU {number}", f"{device.name}, {memory}", taken)
    nccl = ".".join(map(str, torch.cuda.nccl.version()))  # type: ignore[no-untyped-call]
    yield Finding("NCCL", nccl)


def _cores() -> Finding:
    usable, whole = count_cores(1), os.cpu_count() or 1
    remedy = ""
    if usable < whole:
        remedy = "this process may use a part of them (affinity or a quota): ask for more if slow"
    return Finding("CPU cores", f"{usable} of {whole}", remedy)


def _memory() -> Finding:
    free = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") / 1e9
    remedy = "a ResNet-50 run needs about 6 GB per process" if free < _LITTLE_MEMORY_GB else ""
    return Finding("memory", f"{free:.1f} GB free", remedy)


def _disk(folder: Path) -> Finding:
    free = shutil.disk_usage(folder).free / 1e9
    remedy = "make room: checkpoints and sets go there" if free < _LITTLE_DISK_GB else ""
    return Finding("disk", f"{free:.1f} GB free at {folder.resolve().name or '/'}", remedy)


def _reading(shards: ShardSet) -> Finding:
    """Read the set's first bytes as a loader finds them: from the disk or from its cache."""
    began, done = time.perf_counter(), 0
    for path in sorted(shards.root.glob("*.tar")):
        with path.open("rb") as file:
            while done < _READ and (chunk := file.read(2**22)):
                done += len(chunk)
    speed = done / 1e6 / max(time.perf_counter() - began, 1e-9)
    remedy = "copy the set to a local disk, or set data.window=16" if speed < _SLOW_MB else ""
    return Finding(f"reading {shards.root.name}", f"{speed:,.0f} MB/s", remedy)
