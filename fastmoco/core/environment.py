"""What a measurement depends on beside its code. No host, user or absolute path enters it."""

import hashlib
import os
import platform
import subprocess
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import fastmoco

PACKAGES = (
    "fastmoco",
    "torch",
    "torchvision",
    "numba",
    "nvidia-dali-cuda120",
    "nvidia-dali-cuda130",
    "webdataset",
    "pillow",
    "numpy",
)
VECTORS = ("avx", "amx", "asimd", "sve")  # instruction sets that decide the speed of arithmetic


def environment() -> dict[str, Any]:
    """Return a description of machine and software."""
    return {
        **_processor(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gb": round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1),
        "kernel": platform.release(),
        "python": platform.python_version(),
        "versions": _versions(),
        "threads": {k: v for k, v in sorted(os.environ.items()) if k.endswith("_NUM_THREADS")},
        **_checkout(Path(fastmoco.__file__).parents[1]),
    }


def digest_of_inputs(files: Iterable[tuple[str, int]]) -> str:
    """Return the SHA-256 of a list of (relative name, size): the same list is the same input."""
    digest = hashlib.sha256()
    for name, size in files:
        digest.update(f"{size} {name}\n".encode(errors="surrogateescape"))
    return digest.hexdigest()


def _processor() -> dict[str, Any]:
    # platform.processor() is empty on some distributions.
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    fields = {key.strip(): value.strip() for key, _, value in (x.partition(":") for x in lines)}
    flags = (fields.get("flags") or fields.get("Features") or "").split()
    model = fields.get("model name") or f"{platform.machine()}, model not told"
    return {"cpu": model, "cpu_flags": [flag for flag in flags if flag.startswith(VECTORS)]}


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _checkout(root: Path) -> dict[str, Any]:
    """Return commit and state of a checkout; nothing for an installed package."""
    if not (root / ".git").exists():
        return {}
    try:
        commit, changes = _git(root, "rev-parse", "HEAD"), _git(root, "status", "--porcelain")
    except (OSError, subprocess.CalledProcessError):
        return {}
    return {"git": commit, "git_changed": bool(changes)}


def _git(root: Path, *arguments: str) -> str:
    command = ("git", "-C", str(root), *arguments)
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
