"""Orders of the samples: for every epoch a permutation that is computed for any index alone."""

from dataclasses import dataclass
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]
_ROUNDS = 10
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)
_WINDOW = 1 << 32  # keeps the permutations of windows apart from those of epochs


class Order(Protocol):
    """A way through the samples."""

    def __len__(self) -> int:
        """Return the number of indices of an epoch."""

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """Return the sample ids at (n,) int64 `indices` of an epoch, each in 0..len - 1."""


class Permutation:
    """A seeded permutation of 0..size-1 in O(1) memory, evaluated at any indices.

    A balanced Feistel network over the next even power of two, walked until it lands inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, method 3). Four rounds are
    measurably non-uniform on small sets, hence more.

    Args:
        size: number of elements, 1 to 2**62.
        key: two integers, such as (seed, epoch): different keys, unrelated permutations.
    """

    def __init__(self, size: int, key: tuple[int, int]) -> None:
        self.size = size
        half = (max(size - 1, 1).bit_length() + 1) // 2
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = np.random.Philox(key=np.array(key, dtype=np.uint64)).random_raw(_ROUNDS)

    def __call__(self, indices: Ids) -> Ids:
        """Return the elements at `indices`, an int64 array of any shape within 0..size-1."""
        values = np.array(indices, dtype=np.uint64).reshape(-1)
        outside = np.arange(len(values))
        while len(outside):
            values[outside] = self._encrypt(values[outside])
            outside = outside[values[outside] >= self.size]
        return values.astype(np.int64).reshape(np.shape(indices))

    def _encrypt(self, values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = values >> self._half, values & self._mask
        for key in self._keys:
            left, right = right, left ^ (_scramble(right ^ key) & self._mask)
        return (left << self._half) | right


def _scramble(words: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Mix 64-bit words (the finalizer of SplitMix64, Steele et al. 2014)."""
    words = (words ^ (words >> np.uint64(30))) * _MIX[0]
    words = (words ^ (words >> np.uint64(27))) * _MIX[1]
    return words ^ (words >> np.uint64(31))


@dataclass(frozen=True)
class Shuffled:
    """All samples, permuted anew each epoch. O(1) memory.

    Attributes:
        samples: their number.
        seed: of the run.
    """

    samples: int
    seed: int

    def __len__(self) -> int:
        return self.samples

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """See `Order`."""
        return _permutation(self.samples, self.seed, epoch)(indices)


@dataclass(frozen=True)
class Windowed:
    """Shards in random order, samples shuffled within a window of shards, anew each epoch.

    For storage that cannot seek: at any time only the shards of a window or two are read.

    Attributes:
        shards: samples of each shard; ids run through them in order.
        window: shards shuffled together.
        seed: of the run.
    """

    shards: tuple[int, ...]
    window: int
    seed: int

    def __len__(self) -> int:
        return sum(self.shards)

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """See `Order`."""
        order, ends = self._epoch(epoch)
        windows = np.searchsorted(ends[:: self.window][1:], indices, side="right")
        ids = np.empty_like(indices)
        for window in np.unique(windows).tolist():
            mask = windows == window
            first, last = window * self.window, min((window + 1) * self.window, len(order))
            start, stop = int(ends[first]), int(ends[last])
            key = self.seed ^ _WINDOW, epoch * len(order) + window
            within = _permutation(stop - start, *key)(indices[mask] - start)
            shard = np.searchsorted(ends[first + 1 : last + 1], within + start, side="right")
            ids[mask] = self._starts[order[first + shard]] + within + start - ends[first + shard]
        return ids

    @property
    def _starts(self) -> Ids:
        """The first id of each shard."""
        return np.cumsum([0, *self.shards[:-1]], dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the order of the shards, and the index at which each one begins."""
        order = _permutation(len(self.shards), self.seed, epoch)(np.arange(len(self.shards)))
        return order, np.cumsum([0, *np.array(self.shards)[order]], dtype=np.int64)


@dataclass(frozen=True)
class SubsetOrder:
    """Some of the samples.

    Attributes:
        ids: (n,) int64, which ones.
        order: the way through 0..n-1, the places in `ids`.
    """

    ids: Ids
    order: Order

    def __len__(self) -> int:
        return len(self.ids)

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """See `Order`."""
        return self.ids[self.order(epoch, indices)]


@dataclass(frozen=True)
class Repeated:
    """Every sample several times an epoch: short epochs of small sets become long ones.

    Attributes:
        order: what is repeated.
        times: how often; each time in another order.
    """

    order: Order
    times: int

    def __len__(self) -> int:
        return self.times * len(self.order)

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """See `Order`."""
        rounds, within = np.divmod(indices, len(self.order))
        ids = np.empty_like(indices)
        for number in np.unique(rounds).tolist():
            mask = rounds == number
            ids[mask] = self.order(epoch * self.times + number, within[mask])
        return ids


@lru_cache(maxsize=8)
def _permutation(size: int, seed: int, number: int) -> Permutation:
    return Permutation(size, (seed, number))
