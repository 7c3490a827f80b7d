"""How often each sample is shown, from a file of numbers."""

import numpy as np

from fastmoco.config.data import Weights
from fastmoco.core.rng import Ids
from fastmoco.dataset.numbers import Numbers, read_numbers
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DataError


def read_weights(weights: Weights, data: ConcatShardSets, ids: Ids | None = None) -> Numbers:
    """Return the weights that a recipe's `data.weights` means; exactly 1 where all are equal.

    Of the number h of each sample, clip((h / mean h)^power, 1 / bound, bound).

    Args:
        weights: of the recipe.
        data: the sets; the file has a number for each of their samples.
        ids: (n,) that take part; None: all.

    Raises:
        DataError: the file does not fit the data, or a number is negative, or all are 0.
    """
    numbers = read_numbers(weights.file, data)
    if (odd := np.flatnonzero(numbers < 0)).size:
        raise DataError(f"{weights.file}: the number of sample {odd[0]} is negative.")
    if ids is not None:
        numbers = numbers[ids]
    if not numbers.any():
        raise DataError(f"{weights.file}: all numbers are 0, so no sample could be shown.")
    relative = numbers / numbers.max()
    with np.errstate(over="ignore"):  # infinity is clipped as well
        powers = (relative / relative.mean()) ** weights.power
    clipped: Numbers = np.clip(powers, 1 / weights.bound, weights.bound)
    return clipped
