"""A CSV manifest: one line an image, with columns path and, where wanted, label and split.

The whole file is refused for what is a fault of the file: no header, a row of another length, a
path that is absolute or goes up by `..`, the same path twice. What is a fault of one image - it is
missing, or a link leads out of the folder - is listed, and the others are taken.
"""

import csv
import os
import posixpath
import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs
from fastmoco.pack.sources.base import Names, Reject, Source, by_name, check_labels, numbered
from fastmoco.pack.sources.raw import as_labels, number_names

COLUMNS = ("path", "label", "split")
SPLIT = re.compile(r"[A-Za-z0-9_-]*")  # names a folder of the packed set
# Not 007: numbers with zeros before them are names of classes (001.cat), and 1 another than 01.
NUMBER = re.compile(r"0|[1-9]\d{0,8}", re.ASCII)


class Row(NamedTuple):
    """One line of the manifest."""

    name: str
    label: str
    split: str


def open_table(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the images that a CSV file lists.

    Labels that are all whole numbers keep their number, and the classes are named by it; other
    labels are class names, numbered in the order of their bytes. All splits have the same classes.

    Args:
        path: of the CSV; UTF-8, comma-separated, with a header. Paths in it are relative to its
            folder. An empty label means none.
        unlabelled: do not read the column label.

    Returns:
        The source of each split, in the order of the names; "" without the column split.

    Raises:
        DataError: a fault of the file, by line; see the module.
    """
    rows = _read(path)
    if not rows:
        raise DataError(f"{path} lists no images.")
    if len({bool(row.split) for row in rows}) > 1:
        raise DataError(f"{path} names a split in some lines only: name it in all or in none.")
    rows.sort(key=lambda row: os.fsencode(row.name))
    labels, classes = (None, []) if unlabelled else _labels([row.label for row in rows], path)
    sources = {}
    for split in sorted({row.split for row in rows}):
        chosen = [number for number, row in enumerate(rows) if row.split == split]
        names = [rows[number].name for number in chosen]
        numbers = np.full(len(names), -1, np.int32) if labels is None else labels[chosen]
        sources[split] = _split(path, names, numbers, classes, f"{path} {split}".rstrip())
    return sources


def _read(path: Path) -> list[Row]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as stream:
            reader = csv.reader(stream, strict=True)
            columns = _columns(next(reader, []), path)
            lines: dict[str, int] = {}
            return [
                _row(fields, columns, lines, line, f"{path}, line {line}")
                for line, fields in ((reader.line_num, fields) for fields in reader if fields)
            ]
    except (csv.Error, UnicodeDecodeError) as error:
        raise DataError(f"{path} is not a CSV file in UTF-8: {error}.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _columns(header: Sequence[str], path: Path) -> list[str]:
    columns = [name.strip() for name in header]
    doubled = [name for name in COLUMNS if columns.count(name) > 1]
    if "path" not in columns or doubled:
        raise DataError(
            f"{path} must open with a header that names the column path once, and label and split "
            f"if there are any; it opens with: {', '.join(columns[:8])}."
        )
    return columns


def _row(
    fields: list[str], columns: list[str], lines: dict[str, int], line: int, where: str
) -> Row:
    if len(fields) != len(columns):
        raise DataError(
            f"{where}: {len(fields)} fields, the header has {len(columns)}; a name with a comma "
            "needs quotes."
        )
    values = dict(zip(columns, fields, strict=True))
    name, split = _name(values["path"], where), values.get("split", "").strip()
    if not SPLIT.fullmatch(split):
        raise DataError(f"{where}: the split {split!r} may hold letters, digits, _ and - only.")
    if name in lines:
        raise DataError(f"{where}: {name} stands in line {lines[name]} already: keep one.")
    lines[name] = line
    return Row(name, values.get("label", "").strip(), split)


def _name(text: str, where: str) -> str:
    parts = text.split("/")
    if not text or "\0" in text or text.startswith("/") or ".." in parts:
        raise DataError(
            f"{where}: {text!r} is no path below the folder of the file: write it relative to that "
            "folder, without `..`."
        )
    return posixpath.normpath(text)


def _labels(labels: list[str], path: Path) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return class numbers, -1 for none, and class names."""
    rows = np.array([row for row, label in enumerate(labels) if label], dtype=np.int64)
    given = [labels[row] for row in rows.tolist()]
    if all(map(NUMBER.fullmatch, given)):
        whole = np.array([int(label) for label in given], dtype=np.int64)
        numbers = as_labels(whole, len(given), str(path))
        classes = number_names(numbers)
    else:
        numbers, classes = numbered(given)
    found = np.full(len(labels), -1, dtype=np.int32)
    found[rows] = numbers
    return found, classes


def _split(
    path: Path, names: list[str], labels: npt.NDArray[np.int32], classes: list[str], where: str
) -> Source:
    reasons = [_why_not(str(path.parent / name), str(path.parent)) for name in names]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    left_out = [Reject(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
    if not kept:
        raise DataError(f"{where}: none of the images is there ({names[0]}: {reasons[0]}).")
    check_labels(labels[kept], classes, where)
    held = Names(names[row] for row in kept)
    inputs = FileInputs(path.parent, held)
    return Source(held, labels[kept], classes, inputs, sorted(left_out, key=by_name))


@lru_cache(maxsize=4096)
def _real(folder: str) -> str:
    return os.path.realpath(folder)


def _why_not(path: str, root: str) -> str | None:
    """Return why an image cannot be taken, None if it can."""
    folder, name = os.path.split(path)
    real = os.path.join(_real(folder), name)
    real = os.path.realpath(real) if os.path.islink(real) else real
    if os.path.commonpath([real, _real(root)]) != _real(root):
        return "is a link that leaves the source folder"
    if not os.path.lexists(real):
        return "does not exist"
    return None if os.path.isfile(real) else "is not a regular file"
