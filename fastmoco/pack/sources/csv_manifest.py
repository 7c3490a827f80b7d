"""A CSV manifest: one line an image, with columns for path and, where wanted, label and split.

How it may be written: see `listing`. The whole file is refused for what is a fault of the file: no
header, a row of another length, a path that leads out of the folder, the same path twice. What is a
fault of one image - it is missing - is listed, and the others are taken.
"""

import os
import posixpath
import re
import shlex
import unicodedata
from contextlib import suppress
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.classes import get_classes, is_no_label, is_utf8, several_labels
from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs
from fastmoco.pack.listing import Listing, opened, tidied
from fastmoco.pack.sources.base import (
    Names,
    Reject,
    Source,
    by_name,
    check_labels,
    refuse_lost_class,
)

_DRIVE = re.compile(r"[A-Za-z]:/")
SPLIT = re.compile(r"[A-Za-z0-9_-]*")  # names a folder of the packed set


class Row(NamedTuple):
    """One line of the manifest, its path as it is written."""

    line: int
    path: str
    label: str
    split: str


def open_table(
    path: Path, unlabelled: bool = False, folder: Path | None = None
) -> dict[str, Source]:
    """Open the images that a CSV file lists.

    Labels that are all whole numbers keep their number, and the classes are named by it; other
    labels are class names, sorted. All splits have the same classes.

    Args:
        path: of the CSV. An empty label and -1 mean none.
        unlabelled: do not read the column label.
        folder: holds the images: the paths are below it, here or where the CSV was written;
            None: the folder of the CSV.

    Returns:
        The source of each split, in the order of the names; "" without the column split.

    Raises:
        DataError: a fault of the file, by line; see the module.
    """
    rows, origin, notes = _read(path, unlabelled)
    if not rows:
        raise DataError(f"{path} lists no images.")
    if len({bool(row.split) for row in rows}) > 1:
        raise DataError(f"{path} names a split in some lines only: name it in all or in none.")
    named = _named(rows, path, unlabelled, folder)
    names = sorted(named, key=os.fsencode)
    rows = [named[name] for name in names]
    labels, classes = get_classes(row.label for row in rows)
    sources = {}
    for split in sorted({row.split for row in rows}):
        chosen = [number for number, row in enumerate(rows) if row.split == split]
        where = f"{path} {split}".rstrip()
        its_names = [names[number] for number in chosen]
        found = _split(folder or path.parent, its_names, labels[chosen], classes, where)
        sources[split] = replace(found, labels_from=origin if classes else "", notes=notes)
    return sources


def _read(path: Path, unlabelled: bool) -> tuple[list[Row], str, list[str]]:
    """Return the rows, where their labels come from, and what is worth saying, in words."""
    with opened(path, ("name", "label", "split")) as listing:
        if "name" not in listing.columns:
            raise DataError(
                f"{path} must open with a header that names the columns: path, and label and split "
                f"if there are any; it opens with: {', '.join(listing.header[:8])}."
            )
        if not unlabelled and "label" not in listing.columns and any(listing.unread()):
            unread = ", ".join(map(repr, listing.unread()[:5]))
            raise DataError(
                f"{path} has no column `label`, but {unread}: call the one with the class of each "
                "image `label` (a column for each class is not read), or pass --unlabelled."
            )
        label = listing.columns.get("label")
        origin = "" if label is None else f"the column {listing.header[label].strip()}"
        unread = ", ".join(map(repr, listing.unread()))
        notes = [f"columns that were not read: {unread}"] if unread else []
        rows = [_row(listing, fields, line, unlabelled) for line, fields in listing.rows]
    return rows, origin, notes


def _row(listing: Listing, fields: list[str], line: int, unlabelled: bool) -> Row:
    where = f"{listing.path}, line {line}"
    if len(fields) != len(listing.header):
        raise DataError(
            f"{where}: {len(fields)} fields, the header has {len(listing.header)}; a name with a "
            "comma needs quotes."
        )
    values = {role: fields[place] for role, place in listing.columns.items()}
    split = values.get("split", "").strip()
    label = "" if unlabelled else values.get("label", "").strip()
    if not SPLIT.fullmatch(split):
        raise DataError(f"{where}: the split {split!r} may hold letters, digits, _ and - only.")
    if not is_utf8(label):
        raise DataError(f"{where}: the label {label!r} is not UTF-8: save the file in UTF-8.")
    if not values["name"].strip() or "\0" in values["name"]:
        raise DataError(f"{where}: {values['name']!r} is no path.")
    return Row(line, values["name"], "" if is_no_label(label) else label, split)


def _named(rows: list[Row], path: Path, unlabelled: bool, folder: Path | None) -> dict[str, Row]:
    """Return the rows by the names of their images below the folder."""
    below = _Below(path, folder)
    found: dict[str, Row] = {}
    next((row for row in rows if below.name(row.path)), None)  # tells what stands before the names
    for row in rows:
        where = f"{path}, line {row.line}"
        name = below.name(row.path)
        if name is None:
            raise DataError(
                f"{where}: {row.path!r} is no path below {below.folder}: name the folder that "
                f"holds the images by --root {_shared(rows, path.parent)}."
            )
        other = found.setdefault(name, row)
        if other is not row and not unlabelled:
            if other.label != row.label:
                raise several_labels(f"{where}: {name} has another label in line {other.line}")
            raise DataError(f"{where}: {name} stands in line {other.line} already: keep one.")
    return found


def _shared(rows: list[Row], home: Path) -> str:
    """Return the folder that holds all that does not lie in `home`, for the command line."""
    paths = [row.path for row in rows if os.path.isabs(row.path) or row.path.startswith("..")]
    folders = [os.path.dirname(os.path.abspath(home / path)) for path in paths]
    shared = os.path.commonpath(folders) if folders else ""
    return shlex.quote(shared) if os.path.isdir(shared) else "FOLDER"


class _Below:
    """Finds the names of images below a folder from the paths in a CSV.

    Args:
        path: of the CSV.
        folder: see `open_table`.
    """

    def __init__(self, path: Path, folder: Path | None) -> None:
        self.folder, self._is_given = folder or path.parent, folder is not None
        self._home = os.path.abspath(path.parent)
        self._root = os.path.abspath(self.folder)
        self._elsewhere = ""  # what stands before the names where the CSV was written
        self._stems: dict[str, dict[str, list[str]]] = {}  # of the names in each folder

    def name(self, text: str) -> str | None:
        """Return the name of an image, None if it cannot lie below the folder."""
        text = text if self._there(text) else tidied(text)
        path = posixpath.normpath(text)
        leads_out = bool(_DRIVE.match(path)) or path.startswith("/") or path.split("/")[0] == ".."
        if not leads_out and (found := self._there(path)):
            return found
        for full in (os.path.join(self._home, text), text):
            full = posixpath.normpath(full)
            if leads_out and full.startswith(f"{self._root}/"):
                return self._named(full[len(self._root) + 1 :])
        found = self._from_elsewhere(path.split("/")) if self._is_given else None
        return found or (None if leads_out else path)

    def _from_elsewhere(self, parts: list[str]) -> str | None:
        if not self._elsewhere:
            tails = ("/".join(parts[cut:]) for cut in range(1, len(parts)))
            tail = next(filter(self._there, tails), None)
            if tail is None:
                return None
            self._elsewhere = "/".join(parts)[: -len(tail)]
        path = "/".join(parts)
        if not path.startswith(self._elsewhere):
            return None
        return self._named(path[len(self._elsewhere) :])

    def _named(self, path: str) -> str:
        return self._there(path) or path  # which is then missing, and listed

    def _there(self, path: str) -> str | None:
        """Return a path that is there, or of which one file is the stem; None if there is none."""
        if os.path.lexists(os.path.join(self._root, path)):
            return path
        folder, stem = os.path.split(path)
        if folder not in self._stems:
            self._stems[folder] = _by_stem(os.path.join(self._root, folder))
        names = self._stems[folder].get(stem, [])
        return os.path.join(folder, names[0]) if len(names) == 1 else None


def _by_stem(folder: str) -> dict[str, list[str]]:
    """Return the names in a folder by what stands before their extensions."""
    found: dict[str, list[str]] = {}
    with suppress(OSError), os.scandir(folder) as entries:
        for entry in entries:
            found.setdefault(os.path.splitext(entry.name)[0], []).append(entry.name)
    return found


def _split(
    folder: Path, names: list[str], labels: npt.NDArray[np.int32], classes: list[str], where: str
) -> Source:
    names = _as_stored(folder, names)
    reasons = [_why_not(os.path.join(folder, name)) for name in names]
    kept = [row for row, reason in enumerate(reasons) if reason is None]
    left_out = [Reject(name, reason) for name, reason in zip(names, reasons, strict=True) if reason]
    if not kept:
        raise DataError(f"{where}: none of the images is there ({names[0]}: {reasons[0]}).")
    refuse_lost_class(labels, labels[kept], classes, f"that {where} lists are missing")
    check_labels(labels[kept], classes, where)
    held = Names(names[row] for row in kept)
    return Source(
        held, labels[kept], classes, FileInputs(folder, held), sorted(left_out, key=by_name)
    )


def _as_stored(folder: Path, names: list[str]) -> list[str]:
    """Return names as they are on the disk, where they differ by Unicode normalization alone.

    A Mac writes é as two characters. A name that fits two, or one that is listed, stays as it is.
    """
    listed = set(names)

    @cache
    def alike(parent: str) -> dict[str, list[str]]:
        found: dict[str, list[str]] = {}
        for entry in os.listdir(parent) if os.path.isdir(parent) else ():
            found.setdefault(unicodedata.normalize("NFC", entry), []).append(entry)
        return found

    def stored(name: str) -> str:
        if name.isascii() or os.path.lexists(os.path.join(folder, name)):
            return name
        path = str(folder)
        for part in name.split("/"):
            there = os.path.lexists(os.path.join(path, part))
            found = [part] if there else alike(path).get(unicodedata.normalize("NFC", part), [])
            if len(found) != 1:
                return name
            path = os.path.join(path, found[0])
        other = os.path.relpath(path, folder)
        return name if other in listed else other

    return list(map(stored, names))


def _why_not(path: str) -> str | None:
    """Return why an image cannot be taken, None if it can."""
    if not os.path.exists(path):
        return "is a link that leads nowhere" if os.path.lexists(path) else "does not exist"
    return None if os.path.isfile(path) else "is not a regular file"
