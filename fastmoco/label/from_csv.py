"""`fastmoco label`: labels that come later, from a CSV into a side table."""

import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from fastmoco.core.files import hash_file
from fastmoco.dataset.shard_set import PSEUDO, ShardSet, label_path, refuse_strangers, write_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.label.table import read_table

_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


def read_classes(path: Path) -> list[str]:
    """Read the names of the labels 0, 1, ...: one a line of a text file, or those of a set.

    Raises:
        UsageError: the file cannot be read, or holds an empty line or none.
        DataError: a folder that is no set.
    """
    if path.is_dir():
        return ShardSet(path).manifest.classes
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error
    if not names or not all(names):
        raise UsageError(f"{path} must hold the name of one class a line, and no empty line.")
    return names


@dataclass(frozen=True)
class Written:
    """A table that was written.

    Attributes:
        path: of its rows.
        labels: their number.
        classes: names of the labels 0, 1, ...
        notes: what a person should know of how the CSV was read.
    """

    path: Path
    labels: int
    classes: list[str]
    notes: list[str]


def label(
    root: Path,
    path: Path,
    name: str,
    classes: Sequence[str] | None = None,
    replace: bool = False,
    folder: str | None = None,
) -> Written:
    """Write the labels of a CSV as a side table of a set; its shards are not touched.

    Args:
        root: the set.
        path: of the CSV.
        name: of the table; or, if it ends in `.npy`, a path that may lie outside of the set.
        classes: the names of the labels 0, 1, ...; by default those of the set if the labels are
            among them, and if none of them is, those of the CSV: see `Known` and `Found`.
        replace: a table of that name.
        folder: what stands before the names of the set in those of the CSV.

    Raises:
        UsageError: a name that cannot be used or is taken.
        DataError: no set there, a CSV with faults, the first of which are listed, or a disk that
            cannot be written to.
    """
    shard_set = ShardSet(root)
    _refuse_name(shard_set, name, replace)
    table = read_table(shard_set, path, classes, folder)
    notes = list(table.notes)
    origin = f"{path.name}, SHA-256 {hash_file(path)}"
    if table.confidences is not None:  # people have none
        notes.append("confidences are not kept: what shall count in training is a `weight`")
        origin = f"{PSEUDO} of {origin}"
    try:
        written = write_labels(shard_set, name, table.rows, table.classes, origin)
    except OSError as error:
        raise DataError(
            f"{label_path(shard_set, name)} cannot be written ({error.strerror or error}); labels "
            "of that name that were there still are."
        ) from error
    return Written(written, len(table.ids), table.classes, notes)


def _refuse_name(shard_set: ShardSet, name: str, replace: bool) -> None:
    if not name.endswith(".npy") and not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a label table: use letters, digits, dots and dashes, or a path "
            "that ends in .npy."
        )
    path = label_path(shard_set, name)
    refuse_strangers(path)
    if any(map(os.path.lexists, (path, path.with_suffix(".json")))) and not replace:
        raise UsageError(f"{path} exists already: choose another name, or pass --replace.")
