"""What the adapters of uncompressed sources share: mapped files, labels, numbered names."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.classes import several_labels
from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs
from fastmoco.pack.sources.base import Names, Source, check_labels, no_labels

Bytes = npt.NDArray[np.uint8]
MAX_CLASSES = 2**20  # a label of 10^9 is a damaged file, and its class list would fill the memory


def mapped(path: Path) -> Bytes:
    """Return the bytes of a file, memory-mapped.

    Raises:
        DataError: it is empty or cannot be read.
    """
    try:
        if not path.stat().st_size:
            raise DataError(f"{path} is empty: get it again.")
        return np.memmap(path, dtype=np.uint8, mode="r")
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def records(content: Bytes, shape: tuple[int, ...], where: str) -> Bytes:
    """Return bytes as (N, *shape) without a copy.

    Raises:
        DataError: they are no whole number of records.
    """
    each = int(np.prod(shape))
    if not len(content) or len(content) % each:
        raise DataError(
            f"{where} has {len(content)} bytes, no whole number of records of {each}: it is cut "
            "off or another kind of file; get it again."
        )
    return content.reshape(-1, *shape)


def as_labels(
    values: Any, count: int, where: str, first: int = 0, missing: bool = False
) -> npt.NDArray[np.int32]:
    """Return labels as class numbers, checked before the conversion, which would wrap around.

    Args:
        values: (N,), (N, 1) or (1, N) whole numbers, also as floats or bools; or (N, classes) with
            one 1 in each row.
        count: of the images.
        where: what holds the labels, for errors.
        first: the label of class number 0.
        missing: whether -1 and NaN mean no label, as -1 in the result.

    Raises:
        DataError: another type, shape or number, or a label that is no class number.
    """
    try:
        array = np.asarray(values)
    except ValueError as error:
        raise DataError(f"{where} must hold one whole number an image.") from error
    flat = array.reshape(-1) if array.ndim == 2 and 1 in array.shape else array
    if flat.ndim == 2 and flat.dtype.kind in "biuf":
        flat = _from_one_hot(flat, where)
    if missing and flat.dtype.kind == "f":
        flat = np.nan_to_num(flat, nan=-1)
    if flat.dtype.kind == "b" or (flat.dtype.kind == "f" and (flat == np.rint(flat)).all()):
        flat = flat.astype(np.int64)
    if flat.ndim != 1 or flat.dtype.kind not in "iu":
        raise DataError(
            f"{where} must hold one whole number an image, not {array.dtype} values of shape "
            f"{array.shape}."
        )
    if len(flat) != count:
        raise DataError(f"{where} holds {len(flat)} labels for {count} images.")
    bad = (flat < first - missing) | (flat >= MAX_CLASSES)
    if bad.any():
        raise DataError(f"{where}: {flat[bad][0]} is no label; they run from {first}.")
    return flat.astype(np.int32) - np.int32(first)


def _from_one_hot(rows: npt.NDArray[Any], where: str) -> npt.NDArray[Any]:
    """Return (N,) the column of the one 1 in each row."""
    if ((rows != 0) & (rows != 1)).any() or (rows == 0).all(axis=1).any():
        raise DataError(f"{where}: {rows.shape[1]} columns, but no single 1 in each row.")
    if (rows.sum(axis=1) > 1).any():
        raise several_labels(where)
    columns: npt.NDArray[np.int64] = rows.argmax(axis=1)
    return columns


def number_names(labels: npt.NDArray[np.int32]) -> list[str]:
    """Return "0", "1", ... up to the largest label."""
    return [str(number) for number in range(int(labels.max(initial=-1)) + 1)]


def counted_names(stem: str, count: int) -> Names:
    """Return `STEM/00000`, `STEM/00001`, ...: the names of images that have none."""
    width = max(5, len(str(count - 1)))
    return Names(f"{stem}/{index:0{width}d}" for index in range(count))


def make_source(
    names: Names,
    inputs: Inputs,
    labels: npt.NDArray[np.int32] | None,
    classes: Sequence[str],
    where: str,
) -> Source:
    """Return the source of one split, its labels checked.

    Args:
        labels: None for an unlabelled source; `classes` then does not count.
        where: what holds the labels, for errors.

    Raises:
        DataError: see `check_labels`.
    """
    if labels is None:
        return Source(names, no_labels(len(names)), [], inputs, [])
    check_labels(labels, classes, where)
    return Source(names, labels, list(classes), inputs, [])
