"""Which sample stands at which position: a pure function of (seed, position), with no state.

A position is the absolute index in the endless stream of samples: epoch * N + index. Every epoch
has its own permutation of the N ids, computed for any index alone, so memory is O(1), resuming is
a number, and a global batch does not depend on how many ranks share it.
"""

import hashlib
from collections.abc import Set
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastmoco.config.recipe import Recipe
from fastmoco.core.rng import Ids
from fastmoco.dataset.numbers import Numbers
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DataError, UsageError
from fastmoco.load.order import Order, Repeated, Shuffled, SubsetOrder, Weighted, Windowed
from fastmoco.load.subset import chosen_ids
from fastmoco.load.weights import read_weights

_DIGESTED = 2**16  # ids that tell one order from another


@dataclass(frozen=True)
class Plan:
    """The order of a run: positions, ids and steps.

    Attributes:
        samples: N, indices of an epoch.
        batch: images a step over all ranks.
        seed: of the run.
        through: the way through the samples; None: all of them, shuffled.
        chosen: the ids that take part; None: all.
        weights: how often each of them is shown, relative to the others; None: equally often.

    Raises:
        UsageError: the batch is larger than the data.
    """

    samples: int
    batch: int
    seed: int
    through: Order | None = None
    chosen: Ids | None = None
    weights: Numbers | None = None

    def __post_init__(self) -> None:
        if self.batch > self.samples:
            raise UsageError(
                f"batch {self.batch} is larger than the data ({self.samples} images): "
                "lower `batch` or add images."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; the tail that fills no batch is dropped, another one each epoch."""
        return self.samples // self.batch

    def positions(self, step: int, rank: int = 0, ranks: int = 1) -> Ids:
        """Return the (batch / ranks,) positions of a rank's slice of the global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = epoch * self.samples + within * self.batch
        share = self.batch // ranks
        return np.arange(start + rank * share, start + (rank + 1) * share, dtype=np.int64)

    def order(self, positions: Ids, bad: Set[int] = frozenset()) -> Ids:
        """Return the sample id at each position.

        Args:
            positions: (n,) int64.
            bad: ids that must not be shown: the next good one of the epoch stands in for each.

        Raises:
            DataError: no good one is left.
        """
        epochs, indices = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            ids[mask] = self._through(epoch, indices[mask])
        for place in np.flatnonzero(np.isin(ids, list(bad))) if bad else ():
            ids[place] = self._next_good(int(epochs[place]), int(indices[place]), bad)
        return ids

    def _next_good(self, epoch: int, index: int, bad: Set[int]) -> int:
        for further in range(1, self.samples):
            (found,) = self._through(epoch, np.array([(index + further) % self.samples])).tolist()
            if found not in bad:
                return int(found)
        raise DataError("No image of the data can be decoded: copy the set again.")

    def digest(self) -> str:
        """Return a SHA-256 over the first ids of the run, over the chosen ones and the weights.

        Another order or other samples, another digest.
        """
        first = np.arange(min(self.samples, _DIGESTED), dtype=np.int64)
        digest = hashlib.sha256(self.order(first).astype("<i8").tobytes())
        if self.chosen is not None and len(self.chosen) > _DIGESTED:  # else all are among the first
            digest.update(self.chosen.astype("<i8").tobytes())
        if self.weights is not None:
            digest.update(self.weights.astype("<f8").tobytes())
        return digest.hexdigest()

    @cached_property
    def _through(self) -> Order:
        return self.through or Shuffled(self.samples, self.seed)


def make_plan(recipe: Recipe, data: ConcatShardSets) -> Plan:
    """Return the order of a recipe's run.

    Raises:
        DataError: the subset or the weights do not fit the data.
        UsageError: the batch is larger than the data.
    """
    ids = chosen_ids(recipe.data.subset, data) if recipe.data.subset else None
    weights = read_weights(recipe.data.weights, data, ids) if recipe.data.weights else None
    order = _make_order(recipe, data, ids, weights)
    return Plan(len(order), recipe.batch, recipe.seed, order, ids, weights)


def _make_order(
    recipe: Recipe, data: ConcatShardSets, ids: Ids | None, weights: Numbers | None
) -> Order:
    count = len(data) if ids is None else len(ids)
    order: Order = Shuffled(count, recipe.seed)
    if recipe.data.window:
        order = Windowed(_shards(data, ids), recipe.data.window, recipe.seed)
    if weights is not None:
        order = Weighted(weights, recipe.seed)
    if ids is not None:
        order = SubsetOrder(ids, order)
    return Repeated(order, recipe.data.repeat) if recipe.data.repeat > 1 else order


def _shards(data: ConcatShardSets, ids: Ids | None) -> tuple[int, ...]:
    """Return how many of the samples, or of sorted `ids`, each shard holds; no empty ones."""
    counts = np.array([shard.samples for one in data.sets for shard in one.manifest.shards])
    if ids is not None:
        ends = np.searchsorted(ids, np.cumsum(counts))
        counts = np.diff(ends, prepend=0)
    return tuple(counts[counts > 0].tolist())
