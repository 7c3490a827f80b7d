"""The ranks of a run, and the one place that touches torch's collectives."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.errors import UsageError


@dataclass(frozen=True)
class Ranks:
    """This process's place among those of the run, and what they can do together.

    Attributes:
        rank: 0..size-1; rank 0 alone writes and talks.
        size: number of ranks.
        local_rank: the rank on this machine, which is also its GPU.
        local_size: ranks on this machine.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1

    @property
    def leads(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return this rank's contiguous slice of `rows`; the last ranks may get fewer."""
        each = -(-rows // self.size)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks in rank order: (n, ...) to (size * n, ...)."""
        if self.size == 1:
            return rows
        everything = rows.new_empty(self.size * len(rows), *rows.shape[1:])
        dist.all_gather_single(everything, rows.contiguous())
        return everything

    def mean_(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` by their mean over the ranks, and return them."""
        if self.size > 1:
            dist.all_reduce(values)
            values /= self.size
        return values

    def any(self, flag: bool) -> bool:
        """Return whether `flag` holds on any rank."""
        if self.size == 1:
            return flag
        votes = torch.tensor([float(flag)], device=_device_of_backend())
        dist.all_reduce(votes)
        return bool(votes.item())

    def union(self, values: set[int]) -> set[int]:
        """Return what is in the set of any rank."""
        if self.size == 1:
            return set(values)
        found: list[set[int]] = [set()] * self.size
        dist.all_gather_object(found, values)
        return set().union(*found)

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module with its gradients averaged over the ranks.

        Buffers are never synced in forward: the running statistics are averaged before they are
        read, and a queue has no place in a broadcast.
        """
        if self.size == 1:
            return module
        return DistributedDataParallel(
            module, forward_sync_buffers=False, gradient_as_bucket_view=True
        )


def _device_of_backend() -> str:
    return "cuda" if dist.get_backend() == "nccl" else "cpu"


def device_of(choice: str, local_rank: int) -> torch.device:
    """Return the device that a recipe's `device` means on this machine.

    Raises:
        UsageError: "cuda" without a GPU, or more ranks than GPUs.
    """
    gpus = torch.cuda.device_count()
    if choice == "cpu" or (choice == "auto" and not gpus):
        return torch.device("cpu")
    if local_rank >= gpus:
        raise UsageError(
            f"Rank {local_rank} of this machine has no GPU (found {gpus}): "
            "start fewer processes, or set device=cpu."
        )
    return torch.device("cuda", local_rank)


@contextmanager
def joined(device_choice: str, timeout_s: float = 1800.0) -> Iterator[tuple[Ranks, torch.device]]:
    """Join the ranks that torchrun started, or be the only one.

    Args:
        device_choice: a recipe's `device`.
        timeout_s: how long a collective waits for a rank.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    local_rank = int(os.environ.get("LOCAL_RANK", "0"))
    device = device_of(device_choice, local_rank)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif size > 1:
        # torchrun allows each process one thread, however many cores there are.
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(max(1, (os.cpu_count() or 1) // local_size))
    if size == 1:
        yield Ranks(), device
        return
    dist.init_process_group(
        "nccl" if device.type == "cuda" else "gloo", timeout=timedelta(seconds=timeout_s)
    )
    try:
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        yield Ranks(dist.get_rank(), size, local_rank, local_size), device
    finally:
        dist.destroy_process_group()
