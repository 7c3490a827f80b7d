"""Ranks that are threads of this process: what several ranks find together, without their start."""

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Barrier
from typing import Any, TypeVar

import torch

from fastmoco.core.distributed import World

T = TypeVar("T")


class Table:
    """Where the ranks lay down what they have, and wait for the others."""

    def __init__(self, size: int) -> None:
        self.places: list[Any] = [None] * size
        self.barrier = Barrier(size, timeout=120)

    def exchange(self, rank: int, value: T) -> list[T]:
        self.places[rank] = value
        self.barrier.wait()
        found = list(self.places)
        self.barrier.wait()
        return found


@dataclass(frozen=True)
class Threaded(World):
    """One of them. A rank that calls another collective, or with another shape, breaks the test."""

    table: Table = field(default_factory=lambda: Table(1))

    def gather(self, rows: torch.Tensor) -> torch.Tensor:
        found = self.table.exchange(self.rank, rows)
        assert len({(part.shape, part.dtype) for part in found}) == 1
        return torch.cat(found)

    def mean_(self, values: torch.Tensor) -> torch.Tensor:
        found = self.table.exchange(self.rank, values.clone())
        return values.copy_(torch.stack(found).mean(dim=0))

    def gather_object(self, value: T) -> list[T]:
        return self.table.exchange(self.rank, value)


def on_ranks(size: int, work: Callable[[World], T]) -> list[T]:
    """Return what the work gives on each of `size` ranks, side by side."""
    table = Table(size)

    def one(rank: int) -> T:
        try:
            return work(Threaded(rank, size, table=table))
        except BaseException:
            table.barrier.abort()  # the others need not wait for it
            raise

    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(one, range(size)))
