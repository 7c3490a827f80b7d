"""Every random choice that fastmoco makes for itself: a pure function of (seed, stream, number).

All of it comes from numpy's counter-based Philox, whose raw words are promised never to change; so
nothing has a state that a resumed run would have to restore, no rank has to tell another what it
drew, and each number can be had without those before it. Only weights and the queue start from
torch's generators, seeded by the recipe's `seed`, as is what `finetune --noise` drops.
"""

from collections.abc import Callable, Iterator
from enum import Enum
from typing import Any

import numpy as np
import numpy.typing as npt

Ids = npt.NDArray[np.int64]

DRAWS = 32  # numbers reserved for a view; a multiple of 4, the words of one Philox counter
_ROUNDS = 10
_MIX = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


class Stream(Enum):
    """What a random number is for: choices under one seed stay independent of each other.

    The values are added to the number of the choice, the second half of Philox's key. They are part
    of the on-disk contract: another value is another order of every run that is resumed.
    """

    ORDER = 0  # of samples: of each epoch; and that of a packed set (number 0)
    SPLIT = 2  # of a source into parts, by class; -1 is a class here
    WINDOW = 1 << 32  # the order within a window of shards
    SUBSET = 1 << 33  # a share of every class, by class
    QUERY = 3 << 33  # samples to ask labels for
    NOISE = 7 << 32  # of semi-supervised training, by step and rank
    STUDY = 1 << 34  # the pictures and samples of a report
    VIEWS = 0x766965777300
    NEGATIVES = 1 << 62  # of a memory bank, by step
    SHUFFLE_BN = 1 << 63  # by step
    WEIGHTS = 5 << 33  # which samples an epoch shows once more than others of their weight
    HARDNESS = 7 << 33  # views to measure by how hard a sample is


def raw_words(seed: int, stream: Stream, number: int, count: int) -> npt.NDArray[np.uint64]:
    """Return the first (count,) 64-bit words of a choice."""
    return philox(seed, stream, number).random_raw(count)


def philox(seed: int, stream: Stream, number: int = 0) -> np.random.Philox:
    """Return the bits of a choice."""
    if stream is Stream.WINDOW:  # numbered by epoch and window, with no bound: apart by the seed
        return np.random.Philox(key=np.array([seed ^ stream.value, number], np.uint64))
    return np.random.Philox(key=np.array([seed, stream.value + number], np.uint64))


def uniforms(
    seed: int, first: int, count: int, views: int, stream: Stream = Stream.VIEWS
) -> npt.NDArray[np.float64]:
    """Return (views, count, DRAWS) uniform numbers in [0, 1) of consecutive positions.

    Args:
        seed: of the run.
        first: absolute position of the first sample.
        count: number of consecutive positions.
        views: views a sample; every position owns views * DRAWS numbers.
        stream: what they are for.
    """
    bits = philox(seed, stream)
    bits.advance(first * views * DRAWS // 4)
    raw = bits.random_raw(count * views * DRAWS) >> np.uint64(11)
    return (raw * np.float64(2.0**-53)).reshape(count, views, DRAWS).transpose(1, 0, 2)


def shuffled(seed: int, stream: Stream, number: int, count: int) -> Ids:
    """Return a permutation of 0..count-1 in O(count) memory, by sorting raw words.

    `Generator.permutation` is not used: numpy may change it.
    """
    return np.argsort(raw_words(seed, stream, number, count), kind="stable")


class Permutation:
    """A seeded permutation of 0..size-1 in O(1) memory, evaluated at any indices.

    A balanced Feistel network over the next even power of two, walked until it lands inside
    (Black and Rogaway, "Ciphers with Arbitrary Finite Domains", 2002, method 3). Four rounds are
    measurably non-uniform on small sets, hence more.

    Args:
        size: number of elements, 1 to 2**62.
        seed, stream, number: another of these, an unrelated permutation.
    """

    def __init__(self, size: int, seed: int, stream: Stream, number: int = 0) -> None:
        self.size = size
        half = (max(size - 1, 1).bit_length() + 1) // 2
        self._half, self._mask = np.uint64(half), np.uint64((1 << half) - 1)
        self._keys = raw_words(seed, stream, number, _ROUNDS)

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


def stratified(labels: npt.NDArray[np.int32], fraction: float, seed: int) -> Ids:
    """Return the ids of a share of every class, at least one of each, sorted.

    The share of a smaller fraction is part of that of a larger one under the same seed.

    Args:
        labels: (N,) class numbers; -1, no label, counts as a class of its own.
        fraction: of each class, in 0..1.
        seed: of the choice.
    """
    return first_of_each(labels, seed, lambda size: max(1, round(fraction * size)))


def first_of_each(
    labels: npt.NDArray[np.integer[Any]], seed: int, count: Callable[[int], int]
) -> Ids:
    """Return the ids, sorted, of the first of every class in an order that the seed decides.

    Args:
        labels: (N,) class numbers; -1, no label, counts as a class of its own.
        seed: of the choice.
        count: how many of a class, by its size.
    """
    chosen = [order[: count(len(order))] for order in _by_class(labels, seed)]
    return np.sort(np.concatenate(chosen))


def assign_folds(labels: npt.NDArray[np.integer[Any]], seed: int, folds: int = 5) -> Ids:
    """Return the (n,) fold of each sample, dealt class by class; -1: the only one of its class.

    There are as many as the smallest class of several can fill, at most `folds`.
    """
    orders = [order for order in _by_class(labels, seed) if len(order) > 1]
    found = np.full(len(labels), -1, dtype=np.int64)
    for order in orders:
        found[order] = np.arange(len(order)) % min(folds, *map(len, orders))
    return found


def repeat_evenly(labels: npt.NDArray[np.integer[Any]], seed: int) -> Ids:
    """Return as many ids of every class as the largest has: a smaller one's again and again.

    Where that does not come out even, the seed decides which stand once more than others.
    """
    orders = list(_by_class(labels, seed))
    largest = max(map(len, orders))
    return np.concatenate([np.resize(order, largest) for order in orders])


def _by_class(labels: npt.NDArray[np.integer[Any]], seed: int) -> Iterator[Ids]:
    """Yield the ids of each class, permuted."""
    for label in np.unique(labels).tolist():
        ids = np.flatnonzero(labels == label)
        order = Permutation(len(ids), seed, Stream.SUBSET, label + 1)
        yield ids[order(np.arange(len(ids)))]
