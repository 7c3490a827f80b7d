"""What every source is turned into: names, labels and inputs."""

import hashlib
import json
import os
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import NamedTuple, overload

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, InputSubset


class Reject(NamedTuple):
    """An input that does not enter the set."""

    name: str
    reason: str


@dataclass
class Passed:
    """Files of one kind that are not meant as images.

    Attributes:
        first: the name of one.
        count: their number.
    """

    first: str
    count: int = 0


class Names(Sequence[str]):
    """Names in one stretch of bytes: a list of strings would take six times the memory."""

    def __init__(self, names: Iterable[str] = ()) -> None:
        self.bytes, self.ends = bytearray(), array("q", [0])
        for name in names:
            self.add(name)

    def add(self, name: str) -> None:
        """Append a name."""
        self.bytes += os.fsencode(name)
        self.ends.append(len(self.bytes))

    def pick(self, rows: npt.NDArray[np.int64]) -> "Names":
        """Return some of the names, in the order given."""
        return Names(self[row] for row in map(int, rows))

    def sorted_rows(self) -> list[int]:
        """Return the rows in the order of the bytes of their names."""
        return sorted(range(len(self)), key=self._encoded)

    def _encoded(self, row: int) -> bytes:
        return bytes(self.bytes[self.ends[row] : self.ends[row + 1]])

    def __len__(self) -> int:
        return len(self.ends) - 1

    @overload
    def __getitem__(self, row: int) -> str: ...
    @overload
    def __getitem__(self, row: slice) -> Sequence[str]: ...
    def __getitem__(self, row: int | slice) -> str | Sequence[str]:
        if isinstance(row, slice):
            return [self[i] for i in range(*row.indices(len(self)))]
        return os.fsdecode(self._encoded(row))

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
        left_out: what looks like an image, or was listed as one, and is not packed.
        passed: what is not meant as an image, by its group.
        labels_from: where the labels come from, in words; "" without labels.
        notes: what else is worth saying before anything is decoded.
    """

    names: Names
    labels: npt.NDArray[np.int32]
    classes: list[str]
    inputs: Inputs
    left_out: list[Reject]
    passed: Mapping[str, Passed] = field(default_factory=dict)
    labels_from: str = ""
    notes: Sequence[str] = ()

    def __post_init__(self) -> None:
        if not len(self.names) == len(self.labels) == len(self.inputs.sizes):
            raise ValueError("names, labels and inputs differ in number")

    def __len__(self) -> int:
        return len(self.names)

    def pick(self, rows: npt.NDArray[np.int64], left_out: Sequence[Reject] = ()) -> "Source":
        """Return the source of some of the images, in the order given."""
        return replace(
            self,
            names=self.names.pick(rows),
            labels=self.labels[rows],
            inputs=InputSubset(self.inputs, rows),
            left_out=[*self.left_out, *left_out],
        )

    def parts(self, rows: Mapping[str, npt.NDArray[np.int64]]) -> dict[str, "Source"]:
        """Return the source of each part, by its rows; what is left out is told by the first."""
        found = {name: self.pick(its) for name, its in rows.items()}
        first, *others = found
        return {first: found[first]} | {name: replace(found[name], left_out=[]) for name in others}

    def fingerprint(self) -> str:
        """Return a hash that changes when the source does, by names, labels, sizes and times."""
        about = json.dumps([self.classes, self.left_out, len(self), self.names.ends[-1]])
        digest = hashlib.sha256(os.fsencode(about))
        for part in (self.names.bytes, self.names.ends, self.labels.tobytes(), self.inputs.state()):
            digest.update(part)
        return digest.hexdigest()


def by_name(reject: Reject) -> bytes:
    """Return the key that sorts rejects in the order of the source."""
    return os.fsencode(reject.name)


def no_labels(count: int) -> npt.NDArray[np.int32]:
    """Return the labels of an unlabelled source."""
    return np.full(count, -1, dtype=np.int32)


def numbered(names: Iterable[str]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return the class number of each image, and the class names, sorted by their bytes.

    Args:
        names: the class name of each image.
    """
    codes: dict[str, int] = {}  # in the order of their first image
    each = np.fromiter((codes.setdefault(name, len(codes)) for name in names), dtype=np.int32)
    classes = sorted(codes, key=os.fsencode)
    numbers = {name: number for number, name in enumerate(classes)}
    return np.array([numbers[name] for name in codes], dtype=np.int32)[each], classes


def refuse_lost_class(
    before: npt.NDArray[np.int32],
    after: npt.NDArray[np.int32],
    classes: Sequence[str],
    why: str,
) -> None:
    """Check that no class has lost all of its images.

    Args:
        before: labels of what was listed.
        after: labels of what is left.
        classes: their names.
        why: what became of the others, in words that follow "images".

    Raises:
        DataError: naming the class.
    """
    lost = sorted(set(before[before >= 0].tolist()) - set(after.tolist()))
    if lost:
        raise DataError(
            f"All images of the class {classes[lost[0]]} {why}: mend that, or take the class out "
            "of the source."
        )


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
