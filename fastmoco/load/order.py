"""Orders of the samples: for every epoch, computed for any index alone."""

from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Ids, Permutation, Stream, raw_words

# A loader asks for those of the current epoch with every batch.
_permutation = lru_cache(maxsize=8)(Permutation)


class Order(Protocol):
    """A way through the samples."""

    def __len__(self) -> int:
        """Return the number of indices of an epoch."""

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """Return the sample ids at (n,) int64 `indices` of an epoch, each in 0..len - 1."""


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
        return _permutation(self.samples, self.seed, Stream.ORDER, epoch)(indices)


@dataclass(frozen=True)
class Weighted:
    """Samples as often as their weights say, in an epoch of as many indices as there are samples.

    Systematic sampling (Madow and Madow 1944): before the shuffle of the epoch, index j shows the
    sample in whose interval of the cumulative weights, scaled to n, j + u lies, with one uniform u
    an epoch. So a sample comes floor or ceil of n w / sum w times, on average exactly as often, and
    equal weights are `Shuffled`. 8 bytes a sample.

    Attributes:
        weights: (n,) fp64, not negative, not all 0.
        seed: of the run.
    """

    weights: npt.NDArray[np.float64]
    seed: int

    def __len__(self) -> int:
        return len(self.weights)

    def __call__(self, epoch: int, indices: Ids) -> Ids:
        """See `Order`."""
        places = Shuffled(len(self), self.seed)(epoch, indices)
        # 22 bits, so that place + u is exact, and clear of the end, for up to 2**30 samples.
        (word,) = raw_words(self.seed, Stream.WEIGHTS, epoch, 1) >> np.uint64(42)
        return np.searchsorted(self._ends, places + float(word) * 2.0**-22, side="right")

    @cached_property
    def _ends(self) -> npt.NDArray[np.float64]:
        """Where the interval of each sample ends, in 0..n."""
        sums = np.cumsum(self.weights)
        ends: npt.NDArray[np.float64] = sums * (len(sums) / sums[-1])
        return ends


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
            number = epoch * len(order) + window
            permuted = _permutation(stop - start, self.seed, Stream.WINDOW, number)
            within = permuted(indices[mask] - start)
            shard = np.searchsorted(ends[first + 1 : last + 1], within + start, side="right")
            ids[mask] = self._starts[order[first + shard]] + within + start - ends[first + shard]
        return ids

    @property
    def _starts(self) -> Ids:
        """The first id of each shard."""
        return np.cumsum([0, *self.shards[:-1]], dtype=np.int64)

    def _epoch(self, epoch: int) -> tuple[Ids, Ids]:
        """Return the order of the shards, and the index at which each one begins."""
        permuted = _permutation(len(self.shards), self.seed, Stream.ORDER, epoch)
        order = permuted(np.arange(len(self.shards)))
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
