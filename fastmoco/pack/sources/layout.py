"""What the layout of folders says: which split and which class an image belongs to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, Picked
from fastmoco.pack.sources.base import Names, Reject, Source, no_labels, numbered

SPLIT = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|unlabell?ed", re.IGNORECASE)

# A suffix only says which files are meant as images; what they are, `check` reads from the bytes.
SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|avif|p[bgpn]m)", re.IGNORECASE)


@dataclass(frozen=True)
class Part:
    """One split of a layout.

    Attributes:
        rows: of its images among all names.
        labels: (len(rows),) int32, -1 for none.
        classes: empty without labels.
    """

    rows: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int32]
    classes: list[str]


def split_by_layout(
    names: Sequence[str], where: str, unlabelled: bool, wrapping: int = 0
) -> dict[str, Part]:
    """Return the parts that the folders of the names make, by split; "" where there are none.

    `train/cat/1.jpg` is of the split train and the class cat, `cat/1.jpg` of the class cat;
    folders below the class do not count.

    Args:
        names: posix paths.
        where: what holds them, for errors.
        unlabelled: take all as one part without labels.
        wrapping: characters at the start of each name that do not belong to the layout.

    Raises:
        DataError: a layout that does not give sound labels.
    """
    rows = np.arange(len(names), dtype=np.int64)
    if unlabelled:
        return {"": Part(rows, no_labels(len(rows)), [])}
    numbers, tops = numbered(first_folder(name, wrapping) for name in names)
    if not all(map(SPLIT.fullmatch, tops)):
        return {"": _part(rows, numbers, tops, where)}
    parts = {}
    for number, split in enumerate(tops):
        chosen = np.flatnonzero(numbers == number)
        start = wrapping + len(split) + 1
        below = numbered(first_folder(names[row], start) for row in map(int, chosen))
        parts[split] = _part(chosen, *below, f"{where}/{split}")
    _refuse_other_classes(parts, where)
    return parts


def sources_by_layout(
    names: Names,
    inputs: Inputs,
    left_out: Sequence[Reject],
    where: str,
    unlabelled: bool,
    wrapping: int = 0,
) -> dict[str, Source]:
    """Return the source of each split of some names; see `split_by_layout`.

    Args:
        names: posix paths.
        inputs: of each name.
        left_out: what was passed over, named as `names` are.
        where: what holds them, for errors.
        unlabelled: take all as one part without labels.
        wrapping: characters at the start of each name that do not belong to the layout.

    Raises:
        DataError: there are no images, or the layout does not give sound labels.
    """
    if not names:
        first = "".join(f" ({reject.name}: {reject.reason})" for reject in left_out[:1])
        raise DataError(f"{where} holds no images{first}.")
    sources = {}
    for split, part in split_by_layout(names, where, unlabelled, wrapping).items():
        passed = [r for r in left_out if not split or first_folder(r.name, wrapping) == split]
        sources[split] = _source(names, inputs, part, passed)
    return sources


def first_folder(name: str, start: int = 0) -> str:
    """Return the first folder of a posix path that begins at `start`, "" if it has none."""
    return name[start : max(start, name.find("/", start))]


def _source(names: Names, inputs: Inputs, part: Part, left_out: list[Reject]) -> Source:
    if len(part.rows) < len(names):  # else a copy of all that there is
        names, inputs = names.pick(part.rows), Picked(inputs, part.rows)
    return Source(names, part.labels, part.classes, inputs, left_out)


def _part(
    rows: npt.NDArray[np.int64], numbers: npt.NDArray[np.int32], classes: list[str], where: str
) -> Part:
    if classes == [""]:
        return Part(rows, no_labels(len(rows)), [])
    if "" in classes:
        raise DataError(
            f"{where} holds images beside class folders: move them into a class, or pass "
            "--unlabelled."
        )
    if len(classes) == 1:
        raise DataError(
            f"{where} has a single class folder ({classes[0]}), and everything in one class gives "
            "100 % accuracy: pass --unlabelled to pack without labels."
        )
    return Part(rows, numbers, classes)


def _refuse_other_classes(parts: dict[str, Part], where: str) -> None:
    labelled = {split: part.classes for split, part in parts.items() if part.classes}
    lists = list(labelled.values())
    if any(classes != lists[0] for classes in lists):
        odd = sorted({name for one in lists for other in lists for name in set(one) - set(other)})
        raise DataError(
            f"The splits of {where} ({', '.join(labelled)}) differ in their classes "
            f"({', '.join(odd[:5])}): add what is missing, or pack each by itself."
        )
