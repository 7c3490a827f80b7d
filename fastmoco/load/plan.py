"""Which sample stands at which position: a pure function of (seed, position), with no state.

A position is the absolute index in the endless stream of samples: epoch * N + index. Every epoch
has its own permutation of the N ids, computed for any index alone, so memory is O(1), resuming is
a number, and a global batch does not depend on how many ranks share it.
"""

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from fastmoco.errors import UsageError

Ids = npt.NDArray[np.int64]
_ROUNDS = 10
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


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
class Plan:
    """The order of a run: positions, ids and steps.

    Attributes:
        samples: N, the size of the data.
        batch: images a step over all ranks.
        seed: of the run.

    Raises:
        UsageError: the batch is larger than the data.
    """

    samples: int
    batch: int
    seed: int

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

    def order(self, positions: Ids) -> Ids:
        """Return the sample id at each position."""
        epochs, indices = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs):
            mask = epochs == epoch
            ids[mask] = _epoch_order(self.samples, self.seed, int(epoch))(indices[mask])
        return ids


@lru_cache(maxsize=4)
def _epoch_order(samples: int, seed: int, epoch: int) -> Permutation:
    return Permutation(samples, (seed, epoch))
