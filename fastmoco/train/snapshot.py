"""A state as it is now, copied to the host for a thread to write while the steps go on."""

from collections.abc import Callable
from typing import Any

import torch

from fastmoco.runs.checkpoints import State


def snapshot(state: State, device: torch.device) -> Callable[[], State]:
    """Copy a state into memory of the host, without waiting for the device.

    On a GPU the copies take their place in the stream, before the updates of the next step, and
    the memory is pinned; torch keeps it for the next snapshot once it is let go.

    Args:
        state: nested dictionaries and lists; its tensors may change after the call.
        device: where it lives.

    Returns:
        A function that waits for the copies and returns them; any thread may call it.
    """
    copies: State = _on_host(state)
    if device.type != "cuda":
        return lambda: copies
    copied = torch.cuda.Event()  # type: ignore[no-untyped-call]
    copied.record(torch.cuda.current_stream(device))

    def finished() -> State:
        copied.synchronize()
        return copies

    return finished


def _on_host(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        copy = torch.empty_like(value, device="cpu", pin_memory=value.is_cuda)
        return copy.copy_(value, non_blocking=True)
    if isinstance(value, dict):
        return {key: _on_host(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_on_host(item) for item in value]
    return value
