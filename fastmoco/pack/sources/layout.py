"""What the layout of folders says: which split and which class an image belongs to."""

import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, Picked
from fastmoco.pack.sources.base import Names, Reject, Source, numbered

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


def split_by_layout(names: Sequence[str], where: str, unlabelled: bool) -> dict[str, Part]:
    """Return the parts that the folders of the names make, by split; "" where there are none.

    `train/cat/1.jpg` is of the split train and the class cat, `cat/1.jpg` of the class cat;
    folders below the class do not count.

    Args:
        names: posix paths.
        where: what holds them, for errors.
        unlabelled: take all as one part without labels.

    Raises:
        DataError: a layout that does not give sound labels.
    """
    rows = np.arange(len(names), dtype=np.int64)
    tops = [first_folder(name) for name in names]
    if unlabelled:
        return {"": _part(rows, [""] * len(rows), where)}
    if not all(SPLIT.fullmatch(top) for top in tops):
        return {"": _part(rows, tops, where)}
    parts = {}
    for split in sorted(set(tops)):
        chosen = [row for row, top in enumerate(tops) if top == split]
        below = [first_folder(names[row][len(split) + 1 :]) for row in chosen]
        parts[split] = _part(np.array(chosen, dtype=np.int64), below, f"{where}/{split}")
    _refuse_other_classes(parts, where)
    return parts


def sources_by_layout(
    names: Sequence[str],
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
    parts = split_by_layout([name[wrapping:] for name in names], where, unlabelled)
    return {
        split: Source(
            Names(names[row] for row in part.rows.tolist()),
            part.labels,
            part.classes,
            Picked(inputs, part.rows),
            [r for r in left_out if not split or first_folder(r.name[wrapping:]) == split],
        )
        for split, part in parts.items()
    }


def first_folder(name: str) -> str:
    """Return the first folder of a posix path, "" if it has none."""
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def _part(rows: npt.NDArray[np.int64], folders: list[str], where: str) -> Part:
    found = set(folders)
    if found == {""}:
        return Part(rows, np.full(len(rows), -1, dtype=np.int32), [])
    if "" in found:
        raise DataError(
            f"{where} holds images beside class folders: move them into a class, or pass "
            "--unlabelled."
        )
    if len(found) == 1:
        raise DataError(
            f"{where} has a single class folder ({folders[0]}), and everything in one class gives "
            "100 % accuracy: pass --unlabelled to pack without labels."
        )
    return Part(rows, *numbered(folders))


def _refuse_other_classes(parts: dict[str, Part], where: str) -> None:
    labelled = {split: part.classes for split, part in parts.items() if part.classes}
    lists = list(labelled.values())
    if any(classes != lists[0] for classes in lists):
        odd = sorted({name for one in lists for other in lists for name in set(one) - set(other)})
        raise DataError(
            f"The splits of {where} ({', '.join(labelled)}) differ in their classes "
            f"({', '.join(odd[:5])}): add what is missing, or pack each by itself."
        )
