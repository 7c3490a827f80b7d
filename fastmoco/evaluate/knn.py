"""The weighted kNN classifier of instance discrimination (Wu et al. 2018, section 3.4)."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

import torch
from torch.nn.functional import normalize

from fastmoco.distributed import Ranks
from fastmoco.evaluate.measure import Predictions
from fastmoco.evaluate.screen import Nearest, Screen, pays

_CHUNK = 512  # queries at a time: the similarities never fill more than (512, N)
_WORKERS = 8  # that share them, at most: products of fewer than 64 queries are slow


@dataclass(frozen=True)
class Neighbours:
    """A labelled bank of features to look queries up in.

    Which of several neighbours that are equally near at place k votes is not defined.

    Attributes:
        features: (N, dim) fp32; normalised here.
        labels: (N,) int64, 0..classes-1.
        classes: their number.
        k: neighbours that vote; the whole bank where it is smaller.
        t: temperature of their weights exp(similarity / t).
    """

    features: torch.Tensor
    labels: torch.Tensor
    classes: int
    k: int = 200
    t: float = 0.1

    def nearest(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (M, count) cosine similarities and rows of the bank, the nearest one first."""
        similarity = normalize(queries, dim=1) @ self._bank.T
        best, rows = similarity.topk(min(count, len(self.features)), dim=1)
        return best, rows

    def scores(self, queries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield (chunk, classes) votes for (M, dim) queries; that of the nearest neighbour is 1."""
        if not len(queries):
            return  # a rank may have no share
        screen = self._screen  # made, and the bank too, before several threads ask for them
        with _workers() as (pool, count):
            shares = torch.split(normalize(queries, dim=1), _CHUNK // count)
            yield from pool.map(lambda share: self._votes(share, screen), shares)

    def predict(
        self, queries: torch.Tensor, labels: torch.Tensor, ranks: Ranks = Ranks()
    ) -> Predictions:
        """Return what the neighbours say of all (M, dim) queries; each rank asks for its share."""
        own = ranks.share(len(queries))
        none = torch.zeros(0, self.classes)  # a rank may have no share
        votes = torch.cat([none, *self.scores(queries[own])])
        confidence = votes.amax(dim=1) / votes.sum(dim=1)
        return Predictions.of_votes(votes, labels[own], confidence).gathered(ranks, labels)

    def accuracy(
        self, queries: torch.Tensor, labels: torch.Tensor, ranks: Ranks = Ranks()
    ) -> float:
        """Return the percentage of (M, dim) queries whose top vote is their label."""
        return self.predict(queries, labels, ranks).top(1)

    def _votes(self, queries: torch.Tensor, screen: Screen | None) -> torch.Tensor:
        found = screen.nearest(queries, self.k) if screen else None
        # Too small a bank for the screen, or one in which too much is equally near.
        similarity, index = found or self._plainly(queries)
        # A factor that all votes share changes nothing, and large ones would overflow.
        weights = ((similarity - similarity.amax(dim=1, keepdim=True)) / self.t).exp()
        votes = torch.zeros(len(queries), self.classes)
        return votes.scatter_add_(1, self.labels[index], weights)

    def _plainly(self, queries: torch.Tensor) -> Nearest:
        return (queries @ self._bank.T).topk(min(self.k, len(self._bank)), dim=1)

    @cached_property
    def _bank(self) -> torch.Tensor:
        return normalize(self.features, dim=1)

    @cached_property
    def _screen(self) -> Screen | None:
        return Screen(self._bank) if pays(self._bank, self.k) else None


@contextmanager
def _workers() -> Iterator[tuple[ThreadPoolExecutor, int]]:
    """Divide torch's threads among workers, since many a stage would use but one of them."""
    threads = torch.get_num_threads()
    count = min(threads, _WORKERS)
    share = threads // count
    try:
        with ThreadPoolExecutor(
            count, initializer=torch.set_num_threads, initargs=(share,)
        ) as pool:
            yield pool, count
    finally:
        torch.set_num_threads(threads)  # else later threads of the process got a worker's share
