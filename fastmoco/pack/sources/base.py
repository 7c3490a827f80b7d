"""What every source is turned into: names, labels and inputs."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, Picked


class Reject(NamedTuple):
    """An input that does not enter the set."""

    name: str
    reason: str


class Names(Sequence[str]):
    """Names in one stretch of bytes: a list of strings would take six times the memory."""

    def __init__(self, names: Iterable[str]) -> None:
        encoded = [os.fsencode(name) for name in names]
        self.bytes = b"".join(encoded)
        self.ends = np.cumsum([0, *map(len, encoded)], dtype=np.int64)

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return os.fsdecode(self.bytes[self.ends[row] : self.ends[row + 1]])

    def __iter__(self) -> Iterator[str]:
        return (self[row] for row in range(len(self)))


@dataclass(frozen=True)
class Source:
    """The images of one split.

    Attributes:
        names: the original name of each image: path, archive member or index.
        labels: (N,) int32, -1 for none.
        classes: the name of each class number; empty without labels.
        inputs: where each image lies.
        left_out: what was passed over.
    """

    names: Names
    labels: npt.NDArray[np.int32]
    classes: list[str]
    inputs: Inputs
    left_out: list[Reject]

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.labels) == len(self.inputs.sizes):
            raise ValueError("names, labels and inputs differ in number")

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, rows: npt.NDArray[np.int64], left_out: Sequence[Reject] = ()) -> "Source":
        """Return the source of some of the images, in the order given."""
        return Source(
            Names(self.names[row] for row in rows.tolist()),
            self.labels[rows],
            self.classes,
            Picked(self.inputs, rows),
            [*self.left_out, *left_out],
        )

    def fingerprint(self) -> str:
        """Return a hash that changes when the source does, by names, labels, sizes and times."""
        about = json.dumps([self.classes, self.left_out, self.names.ends.tolist()[-1:]])
        parts = (
            os.fsencode(about),
            self.names.bytes,
            self.names.ends.tobytes(),
            self.labels.tobytes(),
            self.inputs.state(),
        )
        return hashlib.sha256(b"\n".join(parts)).hexdigest()


def by_name(reject: Reject) -> bytes:
    """Return the key that sorts rejects in the order of the source."""
    return os.fsencode(reject.name)


def no_labels(count: int) -> npt.NDArray[np.int32]:
    """Return the labels of an unlabelled source."""
    return np.full(count, -1, dtype=np.int32)


def numbered(names: Sequence[str]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return the class number of each image, and the class names, sorted by their bytes.

    Args:
        names: the class name of each image.
    """
    classes = sorted(set(names), key=os.fsencode)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in names], dtype=np.int32), classes


def check_labels(labels: npt.NDArray[np.int32], classes: Sequence[str], where: str) -> None:
    """Check that labels lie within the classes and that there is more than one class.

    Raises:
        DataError: they do not.
    """
    if not classes:
        return
    bad = (labels < -1) | (labels >= len(classes))
    if bad.any():
        raise DataError(
            f"{where}: label {labels[bad][0]} lies outside 0..{len(classes) - 1}, the classes "
            "that it names."
        )
    if len(np.unique(labels[labels >= 0])) == 1:
        raise DataError(
            f"{where} has a single class, and everything in one class gives 100 % accuracy: pass "
            "--unlabelled to pack without labels."
        )
