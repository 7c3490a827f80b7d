"""The ranks of a run, and the one place that touches torch's collectives."""

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, replace
from datetime import timedelta
from functools import cached_property
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from fastmoco.core.cores import count_cores
from fastmoco.errors import UsageError

T = TypeVar("T")
# The newest torch renamed it, and warns of the old name.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


@dataclass(frozen=True)
class World:
    """This process's place among those of the run, and what they can do together.

    Attributes:
        rank: 0..size-1; rank 0 alone writes and talks.
        size: number of ranks.
        local_rank: the rank on this machine, which is also its GPU.
        local_size: ranks on this machine.
        group: of torch, that the collectives run in; None: all ranks.
        timeout: how long a collective waits for a rank.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    group: dist.ProcessGroup | None = None
    timeout: timedelta = timedelta(minutes=30)

    @cached_property
    def node(self) -> "World":
        """Those of this machine among themselves; the first use is a collective of all ranks."""
        if self.local_size == self.size:
            return self
        if self.size % self.local_size:
            raise UsageError(
                "objective.shuffle: node needs the same number of processes on every machine."
            )
        group, _ = dist.new_subgroups(self.local_size, timeout=self.timeout)
        return replace(self, rank=self.local_rank, size=self.local_size, group=group)

    @property
    def is_main(self) -> bool:
        """Whether this is the rank that writes and talks."""
        return self.rank == 0

    def share(self, rows: int) -> slice:
        """Return this rank's contiguous slice of `rows`; the last ranks may get fewer."""
        each = -(-rows // self.size)
        return slice(min(self.rank * each, rows), min((self.rank + 1) * each, rows))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Return the rows of all ranks in rank order: (n, ...) to (size * n, ...).

        Gradients flow back: a rank's rows receive the sum of what every rank made of them.
        """
        if self.size == 1:
            return rows
        everything: torch.Tensor = _Gather.apply(rows, self)
        return everything

    def gather_shares(self, rows: torch.Tensor, count: int) -> torch.Tensor:
        """Return all `count` rows, of which each rank holds its `share`."""
        if self.size == 1:
            return rows
        equal = rows.new_zeros(-(-count // self.size), *rows.shape[1:])
        equal[: len(rows)] = rows
        return self.gather(equal)[:count]

    def exchange(
        self, rows: torch.Tensor, sent: Sequence[int], received: Sequence[int]
    ) -> torch.Tensor:
        """Send rows to each rank and return what all of them sent here, both in rank order.

        Args:
            rows: (sum of sent, ...) those for rank 0 first.
            sent, received: rows to and from each rank.
        """
        if self.size == 1:
            return rows
        arrived = rows.new_empty(int(sum(received)), *rows.shape[1:])
        splits = [int(n) for n in received], [int(n) for n in sent]
        dist.all_to_all_single(arrived, rows.contiguous(), *splits, group=self.group)
        return arrived

    def mean_(self, values: torch.Tensor) -> torch.Tensor:
        """Replace `values` by their mean over the ranks, and return them."""
        if self.size > 1:
            dist.all_reduce(values, group=self.group)
            values /= self.size
        return values

    def mean_with_gradient(self, values: torch.Tensor) -> torch.Tensor:
        """Return the mean of `values` over the ranks, through which gradients flow back."""
        if self.size == 1:
            return values
        total: torch.Tensor = _Sum.apply(values, self.group)
        return total / self.size

    def gather_object(self, value: T) -> list[T]:
        """Return what each rank has, in rank order; it crosses between the hosts."""
        found = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(found, value, group=self.group)
        return found

    def union(self, values: set[int]) -> set[int]:
        """Return what is in the set of any rank."""
        return set().union(*self.gather_object(values))

    def wrap(self, module: nn.Module) -> nn.Module:
        """Return the module with its gradients averaged over the ranks.

        Buffers are never synced in forward: the running statistics are averaged before they are
        read, and a queue has no place in a broadcast.
        """
        if self.size == 1:
            return module
        wrapped = DistributedDataParallel(module, gradient_as_bucket_view=True)
        wrapped.broadcast_buffers = False  # the argument has another name in the newest torch
        return wrapped

    def no_sync(self, wrapped: nn.Module) -> AbstractContextManager[None]:
        """Return a context in which a wrapped module's gradients stay on this rank."""
        if isinstance(wrapped, DistributedDataParallel):
            return wrapped.no_sync()
        return nullcontext()


class _Sum(torch.autograd.Function):
    """A sum over the ranks; the gradient of what every rank made of it is a sum again."""

    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, group: dist.ProcessGroup | None) -> torch.Tensor:
        ctx.group = group
        total = values.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.group)
        return total, None


class _Gather(torch.autograd.Function):
    """The rows of all ranks; the gradient of what every rank made of them is a sum."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, world: World) -> torch.Tensor:
        ctx.world = world
        everything = rows.new_empty(world.size * len(rows), *rows.shape[1:])
        _all_gather(everything, rows.contiguous(), group=world.group)
        return everything

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> tuple[torch.Tensor, None]:
        total = gradient.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(total, group=ctx.world.group)
        return total[ctx.world.share(len(total))], None


class AsyncAnyFlag:
    """Which flags are up on any rank, known to all at the same call, without waiting for it.

    A call's outcome is that of the flags of the call before: the exchange, a few bytes between the
    hosts, runs beside the work in between.

    Args:
        world: that vote; creating it is a collective of all of them.
    """

    def __init__(self, world: World) -> None:
        # Between hosts even where tensors live on GPUs: reading a GPU's would wait for its work.
        self._group: dist.ProcessGroup | None = None
        if world.size > 1:
            group = dist.new_group(backend="gloo", timeout=world.timeout)
            self._group = cast(dist.ProcessGroup, group)
        self._cast: tuple[dist.Work, torch.Tensor] | None = None

    def __call__(self, *flags: bool) -> list[bool]:
        """Cast this rank's flags; return which of them were up on any rank at the last call."""
        if self._group is None:
            return list(flags)
        outcome = self._outcome() or [False] * len(flags)
        votes = torch.tensor(flags, dtype=torch.int32)
        work = dist.all_reduce(votes, group=self._group, async_op=True)
        assert work is not None
        self._cast = work, votes
        return outcome

    def _outcome(self) -> list[bool]:
        if self._cast is None:
            return []
        work, votes = self._cast
        work.wait()
        return votes.bool().tolist()


def get_device(choice: str, local_rank: int, local_size: int = 1) -> torch.device:
    """Return the device that a recipe's `device` means on this machine, for one of its ranks.

    Raises:
        UsageError: "cuda" without a GPU, more ranks than GPUs, or a driver too old for this torch.
    """
    if choice == "cpu":
        return torch.device("cpu")
    _check_driver()
    gpus = torch.cuda.device_count()
    if choice == "auto" and not gpus:
        return torch.device("cpu")
    needed = max(local_rank + 1, local_size)
    if needed > gpus:  # asked of every rank, so that all meet it
        raise UsageError(
            f"{needed} processes on this machine need as many GPUs (found {gpus}): "
            "start fewer processes, or set runtime.device=cpu."
        )
    return torch.device("cuda", local_rank)


def _check_driver() -> None:
    """Refuse a driver that is too old for this torch, which counts its GPUs all the same.

    Raises:
        UsageError: it is. (Where there is no GPU, torch says something else.)
    """
    try:
        torch.cuda.init()  # type: ignore[no-untyped-call]
    except (RuntimeError, AssertionError) as error:
        if "too old" not in str(error):
            return
        told, _, _ = str(error).partition(". ")
        raise UsageError(
            f"{told}; this torch is built for CUDA {torch.version.cuda}: update the driver, or "
            "install a torch built for its CUDA (such as the cu126 build), or set "
            "runtime.device=cpu."
        ) from error


def _number_in_environment(name: str, default: int) -> int:
    text = os.environ.get(name, str(default))
    if not text.isdecimal():
        raise UsageError(f"{name}={text} in the environment is no number: `unset {name}`.")
    return int(text)


@contextmanager
def init_distributed(
    device_choice: str, timeout_s: float = 1800.0
) -> Iterator[tuple[World, torch.device]]:
    """Join the ranks that torchrun started, or be the only one.

    Args:
        device_choice: a recipe's `device`.
        timeout_s: how long a collective waits for a rank.

    Raises:
        UsageError: the environment is not that of torchrun.
    """
    size = _number_in_environment("WORLD_SIZE", 1)
    local_rank = _number_in_environment("LOCAL_RANK", 0)
    local_size = _number_in_environment("LOCAL_WORLD_SIZE", size)
    missing = [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
    if size > 1 and missing:
        raise UsageError(
            f"WORLD_SIZE={size} in the environment, but no {missing[0]}: start several processes "
            "by torchrun, or `unset WORLD_SIZE` for one."
        )
    device = get_device(device_choice, local_rank, local_size)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    # torchrun allows each process one thread, and torch alone takes no notice of a CPU quota.
    cores = count_cores(local_size)
    torch.set_num_threads(cores if size > 1 else min(cores, torch.get_num_threads()))
    if size == 1:
        yield World(), device
        return
    timeout = timedelta(seconds=timeout_s)
    # Labels and votes stay on the hosts: NCCL has no path for them.
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    # Told its GPU, NCCL connects at once, and never guesses it from the rank.
    bound = device if device.type == "cuda" else None
    dist.init_process_group(backend, timeout=timeout, device_id=bound)
    yield World(dist.get_rank(), size, local_rank, local_size, timeout=timeout), device
    # Not after an error: the clean-up would wait for ranks that are still in a collective.
    # torch 2.6 holds Python's lock while it ends gloo's threads, and hangs for ever if one of them
    # waits for that lock to free the last tensors: they are given the time to.
    time.sleep(0.1)
    dist.destroy_process_group()
