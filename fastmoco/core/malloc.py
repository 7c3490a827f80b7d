"""What becomes of memory that a training step frees on a CPU."""

import ctypes
import platform

import torch

# Of mallopt(3), which glibc alone has.
_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4
_NEVER = -1


def keep_freed_memory(device: torch.device) -> None:
    """Make this process keep the memory that it frees, where `device` is the CPU.

    Each step frees its activations and asks for them again. glibc gives large ones back to the
    kernel, which then fills the pages with zeros anew: 15,000 to 80,000 page faults a step of
    ResNet-18, 7 % of its time (benchmarks/NOTES.md). With another C library nothing changes.
    """
    if device.type != "cpu" or platform.libc_ver()[0] != "glibc":
        return
    libc = ctypes.CDLL(None)
    libc.mallopt(_M_MMAP_MAX, 0)
    libc.mallopt(_M_TRIM_THRESHOLD, _NEVER)
