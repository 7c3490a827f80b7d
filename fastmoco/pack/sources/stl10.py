"""STL-10 in its binary files, memory-mapped: 113,000 images of 96 x 96.

The layout is that of https://cs.stanford.edu/~acoates/stl10: 3 planes an image, each in columns;
labels are one byte, from 1.
"""

from pathlib import Path

from fastmoco.errors import DataError
from fastmoco.pack.inputs import PixelInputs
from fastmoco.pack.sources.base import Source
from fastmoco.pack.sources.raw import as_labels, counted_names, make_source, mapped, records

FOLDER = "stl10_binary"
CLASS_NAMES = "class_names.txt"
SPLITS = ("train", "test", "unlabeled")


def is_stl10(path: Path) -> bool:
    """Return whether a path is the folder of the binary files, or the one above it."""
    return any((_folder(path) / f"{split}_X.bin").is_file() for split in SPLITS)


def open_stl10(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open those of the splits train, test and unlabeled whose files are there.

    Args:
        path: the folder `stl10_binary` or the one above it.
        unlabelled: give no labels.

    Raises:
        DataError: a file is missing, cut off, or holds a label that is none.
    """
    folder = _folder(path)
    found = [split for split in SPLITS if (folder / f"{split}_X.bin").is_file()]
    if not found:
        raise DataError(f"{path} holds none of {', '.join(f'{s}_X.bin' for s in SPLITS)}.")
    return {split: _split(folder, split, unlabelled or split == "unlabeled") for split in found}


def _folder(path: Path) -> Path:
    return path / FOLDER if (path / FOLDER).is_dir() else path


def _split(folder: Path, split: str, unlabelled: bool) -> Source:
    path = folder / f"{split}_X.bin"
    columns = records(mapped(path), (3, 96, 96), str(path))
    images = columns.transpose(0, 3, 2, 1)  # plane, column, row -> row, column, channel
    names = counted_names(f"{split}_X", len(images))
    inputs = PixelInputs(images, path)
    if unlabelled:
        return make_source(names, inputs, None, [], str(path))
    labels = folder / f"{split}_y.bin"
    if not labels.is_file():
        raise DataError(f"{labels} is missing: put it there, or pass --unlabelled.")
    numbers = as_labels(mapped(labels), len(images), str(labels), first=1)
    return make_source(names, inputs, numbers, _class_names(folder), str(labels))


def _class_names(folder: Path) -> list[str]:
    path = folder / CLASS_NAMES
    if not path.is_file():
        raise DataError(f"{path} is missing: put it there, or pass --unlabelled.")
    return mapped(path).tobytes().decode("latin-1").split()
