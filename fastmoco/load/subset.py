"""Choosing some of the samples: a list of ids, or a share of every class."""

from pathlib import Path

import numpy as np

from fastmoco.config.data import Subset
from fastmoco.core.files import load_array
from fastmoco.core.rng import Ids, stratified
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DataError


def chosen_ids(subset: Subset, data: ConcatShardSets) -> Ids:
    """Return the sample ids that a recipe's `subset` means, sorted.

    Raises:
        DataError: the list or the table of labels is missing, damaged, or does not fit the data.
    """
    if subset.ids is not None:
        return read_ids(subset.ids, len(data))
    fraction = subset.fraction or 1.0
    # Set by set: their classes need not be the same.
    shares = [stratified(one.labels(subset.labels), fraction, subset.seed) for one in data.sets]
    return np.concatenate([start + ids for start, ids in zip(data.starts, shares, strict=False)])


def read_ids(path: Path, samples: int) -> Ids:
    """Return the ids that a file lists, sorted.

    Args:
        path: a `.npy` of integers, or a text of one id a line.
        samples: the size of the data.

    Raises:
        DataError: the file cannot be read, an id stands twice, or lies outside the data.
    """
    try:
        if path.suffix == ".npy":
            ids = load_array(path).astype(np.int64, casting="safe")
        else:
            ids = np.array(path.read_text().split(), dtype=np.int64)
    except (OSError, ValueError, TypeError, OverflowError) as error:
        raise DataError(f"The ids in {path} cannot be read: {error}.") from error
    found, counts = np.unique(ids, return_counts=True)
    if not len(found):
        raise DataError(f"{path} lists no ids.")
    if (counts > 1).any():
        raise DataError(f"{path} lists the id {found[counts > 1][0]} twice.")
    if found[0] < 0 or found[-1] >= samples:
        odd = found[0] if found[0] < 0 else found[-1]
        raise DataError(f"{path} lists the id {odd}; those of the data are 0..{samples - 1}.")
    return found
