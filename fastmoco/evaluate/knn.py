"""The weighted kNN classifier of instance discrimination (Wu et al. 2018, section 3.4)."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import normalize

from fastmoco.core.distributed import World
from fastmoco.evaluate.features import Stopped, never
from fastmoco.evaluate.predictions import Predictions

# So many queries, of all ranks together, by so many rows of a rank's bank at a time: 128 MiB of
# similarities, however large the bank.
_CHUNK, _BLOCK = 512, 65_536


class KNNClassifier:
    """A labelled bank of features, divided among the ranks, to look queries up in.

    Making one is a collective of the ranks, and so is each method but `nearest`. Which of several
    neighbors that are equally near at place k votes is not defined.

    Args:
        features: (n, dim) fp32, this rank's share of the bank; normalized here, in a copy.
        labels: (n,) int64, 0..classes-1, on the same device.
        classes: their number.
        k: neighbors that vote; the whole bank where it is smaller.
        t: temperature of their weights exp(similarity / t).
        world: that hold the bank.
    """

    def __init__(
        self,
        features: torch.Tensor,
        labels: torch.Tensor,
        classes: int,
        k: int = 200,
        t: float = 0.1,
        world: World = World(),
    ) -> None:
        shares = world.gather_object(len(features))
        self.k, self.t = min(k, sum(shares)), t
        self._bank, self._labels, self._classes = normalize(features, dim=1), labels, classes
        self._world, self._longest = world, max(shares)

    def predict(
        self, queries: torch.Tensor, labels: torch.Tensor, stop: Callable[[], bool] = never
    ) -> Predictions:
        """Return what the neighbors say of the queries of all ranks, in host memory.

        Args:
            queries: (n, dim) fp32, this rank's share of them, on the device of the bank.
            labels: (n,) int64, the truth.
            stop: whether to give up, the same on all ranks; asked before each product with a block
                of the bank, equally often on every rank.

        Raises:
            Stopped: `stop` was true.
        """
        parts: list[Predictions] = []
        done = 0
        for votes in self.scores(queries, stop):
            parts.append(Predictions.of_votes(votes, labels[done : done + len(votes)]))
            done += len(votes)
        return Predictions.cat(parts).gathered(self._world)

    def accuracy(
        self, queries: torch.Tensor, labels: torch.Tensor, stop: Callable[[], bool] = never
    ) -> float:
        """Return the percentage of the queries whose top vote is their label; see `predict`."""
        return self.predict(queries, labels, stop).top(1)

    def scores(
        self, queries: torch.Tensor, stop: Callable[[], bool] = never
    ) -> Iterator[torch.Tensor]:
        """Yield (chunk, classes) votes for this rank's queries; that of the nearest neighbor is 1.

        All ranks take equally many chunks; those of a rank with fewer queries end empty. See
        `predict`.
        """
        chunk = -(-_CHUNK // self._world.size)
        longest = max(self._world.gather_object(len(queries)))
        for first in range(0, longest, chunk):
            own = queries[first : first + chunk]
            # The ranks gather equally many.
            asked = own.new_zeros(min(chunk, longest - first), own.shape[1])
            asked[: len(own)] = normalize(own, dim=1)
            yield self._votes(*self._merged(asked, stop))[: len(own)]

    def nearest(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, count) cosine similarities and rows of this rank's share, the nearest first.

        Args:
            queries: (n, dim) fp32.
            count: at most; a share with fewer rows gives them all.
        """
        count = min(count, len(self._bank))
        rows = torch.arange(len(self._bank), device=self._bank.device)
        return self._nearest(normalize(queries, dim=1), count, rows)

    def _merged(
        self, queries: torch.Tensor, stop: Callable[[], bool]
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, k) similarities and labels in the whole bank of this rank's n queries."""
        world, count = self._world, len(queries)
        found = self._nearest(world.gather(queries), self.k, self._labels, stop)
        if world.size == 1:
            return found
        similarity, labels = (
            world.gather(part)
            .view(world.size, world.size, count, self.k)[:, world.rank]
            .transpose(0, 1)
            .reshape(count, -1)
            for part in found
        )
        return _highest(similarity, labels, self.k)

    def _nearest(
        self,
        queries: torch.Tensor,
        k: int,
        tags: torch.Tensor,
        stop: Callable[[], bool] = never,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, k) similarities to this rank's share, the highest first, and their rows' tags.

        Where the share has too few rows, similarities are -inf.
        """
        best = queries.new_full((len(queries), k), -torch.inf)
        found = tags.new_zeros(best.shape)
        for first in range(0, self._longest, _BLOCK):
            if stop():
                raise Stopped
            block = slice(first, first + _BLOCK)
            rows = self._bank[block]
            some, index = (queries @ rows.T).topk(min(k, len(rows)), dim=1)
            best, found = _highest(
                torch.cat([best, some], dim=1), torch.cat([found, tags[block][index]], dim=1), k
            )
        return best, found

    def _votes(self, similarity: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        """Return the (n, classes) votes of (n, k) neighbors, the nearest first."""
        # A factor that all votes share changes nothing, and large ones would overflow.
        weights = ((similarity - similarity[:, :1]) / self.t).exp()
        votes = weights.new_zeros(len(weights), self._classes)
        return votes.scatter_add_(1, labels, weights)


def _highest(
    similarity: torch.Tensor, tags: torch.Tensor, k: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the k highest of (n, c) similarities, and their tags; of equal ones, the first."""
    order = similarity.argsort(dim=1, descending=True, stable=True)[:, :k]
    return similarity.gather(1, order), tags.gather(1, order)
