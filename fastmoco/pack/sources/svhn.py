"""SVHN's cropped digits in their MATLAB files.

The layout is that of http://ufldl.stanford.edu/housenumbers (format 2): `X` of 32 x 32 x 3 x N,
`y` of N labels 1..10, where 10 stands for the digit 0.
"""

from functools import cached_property
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Input, Inputs, PixelInputs
from fastmoco.pack.sources.base import Source
from fastmoco.pack.sources.matlab import get_shape, load_mat
from fastmoco.pack.sources.raw import as_labels, counted_names, make_source

SIDES = (32, 32, 3)
SPLITS = ("train", "test", "extra")
DIGITS = [str(digit) for digit in range(10)]


class MatInputs(Inputs):
    """The images of one file, which packs them all in one: read when the first is asked for.

    Opening a source opens all of its splits, and `extra` takes 1.6 GB.
    """

    def __init__(self, path: Path, count: int) -> None:
        self.path, self.count = path, count
        self.sizes = np.full(count, int(np.prod(SIDES)), dtype=np.int64)

    @cached_property
    def _pixels(self) -> PixelInputs:
        pixels = load_mat(self.path, "X", str(self.path)).reshape(*SIDES, self.count, order="F")
        return PixelInputs(pixels.transpose(3, 0, 1, 2), self.path)

    def __getitem__(self, row: int) -> Input:
        return self._pixels[row]

    def state(self) -> bytes:
        """Return size and time of the file, and the number of images."""
        found = self.path.stat()
        return repr((found.st_size, found.st_mtime_ns, self.count)).encode()


def is_svhn(path: Path) -> bool:
    """Return whether a path is a .mat file or a folder with one of the splits."""
    if path.is_dir():
        return any(_file(path, split).is_file() for split in SPLITS)
    return path.suffix.lower() == ".mat"


def open_svhn(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open SVHN.

    Args:
        path: a folder with any of train_32x32.mat, test_32x32.mat and extra_32x32.mat, or one file.
        unlabelled: give no labels.

    Returns:
        The splits found, or "" for one file.

    Raises:
        UsageError: scipy is not installed.
        DataError: a file is damaged or of another kind.
    """
    files = {"": path}
    if path.is_dir():
        files = {split: _file(path, split) for split in SPLITS if _file(path, split).is_file()}
    if not files:
        raise DataError(f"{path} holds none of {', '.join(f'{s}_32x32.mat' for s in SPLITS)}.")
    return {split: _split(file, unlabelled) for split, file in files.items()}


def _file(folder: Path, split: str) -> Path:
    return folder / f"{split}_32x32.mat"


def _split(path: Path, unlabelled: bool) -> Source:
    shape = get_shape(path, "X")
    if shape[:3] != SIDES or len(shape) not in (3, 4):
        raise DataError(f"{path} holds X of shape {shape}, not (32, 32, 3, N).")
    count = shape[3] if len(shape) == 4 else 1
    names = counted_names(path.stem, count)
    labels = None if unlabelled else _labels(path, count)
    return make_source(names, MatInputs(path, count), labels, DIGITS, str(path))


def _labels(path: Path, count: int) -> npt.NDArray[np.int32]:
    values = np.atleast_1d(load_mat(path, "y", str(path)))
    if values.dtype.kind == "f" and (values == np.floor(values)).all():
        values = values.astype(np.int64)  # MATLAB writes numbers as doubles unless told
    labels = as_labels(values, count, str(path), first=1)
    if (labels >= len(DIGITS)).any():
        raise DataError(f"{path} holds the label {labels.max() + 1}; they run from 1 to 10.")
    return (labels + np.int32(1)) % np.int32(10)
