"""A block in which nothing may wait for the GPU."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_waits() -> Iterator[None]:
    """Raise at whatever synchronizes with the device within the block."""
    with warnings.catch_warnings(action="ignore"):  # that the mode does not know every such call
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")
