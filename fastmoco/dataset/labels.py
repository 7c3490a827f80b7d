"""The labelled samples of sets: what a classifier is trained on, and tested on."""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.classes import Known
from fastmoco.dataset.shard_set import ShardSet, label_path, read_labels
from fastmoco.errors import DataError


@dataclass(frozen=True)
class Labelled:
    """The labelled samples of a set.

    Attributes:
        set: the set.
        ids: (n,) int64, ascending: the samples that have a label.
        labels: (n,) int64, theirs.
        classes: names of the labels 0, 1, ...
        table: the side table that the labels come from; None: they were packed with the set.
    """

    set: ShardSet
    ids: npt.NDArray[np.int64]
    labels: npt.NDArray[np.int64]
    classes: list[str]
    table: str | None = None

    @classmethod
    def of(cls, shard_set: ShardSet, table: str | None = None) -> "Labelled":
        """Return the samples that have a label, in the set or in one of its side tables.

        Raises:
            DataError: the table is missing, damaged or belongs to another set.
        """
        if table is not None:
            rows, classes = read_labels(shard_set, table)
            ids, labels = (rows[column].astype(np.int64) for column in ("id", "label"))
            return cls(shard_set, ids, labels, classes, table)
        everything = shard_set.labels()
        ids = np.flatnonzero(everything >= 0)
        labels = everything[ids].astype(np.int64)
        return cls(shard_set, ids, labels, shard_set.manifest.classes)


def labelled_pair(bank: Path, queries: Path, table: str | None = None) -> tuple[Labelled, Labelled]:
    """Open a labelled training set and a labelled test set, its classes numbered as the first's.

    The test set may lack classes of the training set; a class is found as `Known` finds it.

    Args:
        bank: the training set.
        queries: the test set.
        table: name of a side table of the training set. The test set is held to its own table of
            that name if it has one, else to the labels that it was packed with.

    Raises:
        DataError: one has no labels, images of one class only or labels without a class, or the
            test set has a class that the training set has not.
    """
    first = Labelled.of(ShardSet(bank), table)
    asked = ShardSet(queries)
    second = Labelled.of(asked, table if table and _has_table(asked, table) else None)
    for one in (first, second):
        _refuse_unfit(one)
    return first, _numbered_like(first, second, table)


def _numbered_like(first: Labelled, second: Labelled, table: str | None) -> Labelled:
    """Return the second with the class numbers of the first, which may have further classes."""
    codes = Known(first.classes).codes(second.classes)
    odd = [second.classes[label] for label in np.unique(second.labels) if codes[label] < 0]
    if odd:
        mend = "give both tables the same --classes" if table else "pack the test set without them"
        raise DataError(
            f"{first.set.root} and {second.set.root} differ in their classes "
            f"({', '.join(odd[:5])}): only the test set has these; {mend}."
        )
    return replace(second, labels=codes[second.labels].astype(np.int64), classes=first.classes)


def _has_table(one: ShardSet, table: str) -> bool:
    """Return whether a side table of that name is the set's; one outside of it has one owner."""
    about = label_path(one, table).with_suffix(".json")
    if not table.endswith(".npy"):
        return about.exists()
    try:
        return bool(json.loads(about.read_text())["set_id"] == one.manifest.set_id)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _refuse_unfit(one: Labelled) -> None:
    if len(one.classes) < 2:
        raise DataError(
            f"{one.set.root} has {len(one.classes)} classes; an accuracy needs two or more: pack "
            "a folder with one subfolder a class, or name a table of labels by --labels."
        )
    if not len(one.ids):
        raise DataError(f"{one.set.root} has classes, but no sample has a label.")
    if one.labels.max() >= len(one.classes):
        raise DataError(
            f"{one.set.root} has a label {one.labels.max()}, but only {len(one.classes)} classes: "
            "name every class, or leave those samples unlabelled."
        )
    if len(one.ids) > 1 and one.labels.min() == one.labels.max():
        raise DataError(
            f"All labelled images of {one.set.root} are of one class "
            f"({one.classes[one.labels[0]]!r}): any guess of it would be 100 % right. Look at how "
            "its folders were packed, by `fastmoco inspect`."
        )
