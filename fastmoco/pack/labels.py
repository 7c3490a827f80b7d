"""`fastmoco label`: labels that come later, from a CSV into a side table.

The CSV has a header with the columns `label` and either `id` or `name` (the original name of a
sample), and `weight` if wanted. Everything wrong with it is told at once, and then nothing is
written. Memory goes with the CSV, not with the set.
"""

import csv
import hashlib
import math
import re
from array import array
from bisect import insort
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError, UsageError
from fastmoco.files import sha256_of
from fastmoco.pack.classes import Classes
from fastmoco.shardset import CHUNK, LABEL_DTYPE, ShardSet, label_path, write_labels

_SHOWN = 5  # faults
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_ID = re.compile(r"[0-9]{1,18}")
_DIGEST = 16  # bytes of a name's hash: among 10^9 names, two agree with probability 10^-21


def label(
    root: Path,
    path: Path,
    name: str,
    classes: Sequence[str] | None = None,
    replace: bool = False,
) -> Path:
    """Write the labels of a CSV as a side table of a set; its shards are not touched.

    Args:
        root: the set.
        path: of the CSV.
        name: of the table; or, if it ends in `.npy`, a path that may lie outside of the set.
        classes: the names of the labels 0, 1, ...; by default those of the set, or, if it has
            none, what the CSV holds: see `Classes`.
        replace: a table of that name.

    Returns:
        The path of the table.

    Raises:
        UsageError: a name that cannot be used or is taken.
        DataError: no set there, or a CSV with faults; the first of them are listed.
    """
    shard_set = ShardSet(root)
    _refuse_name(shard_set, name, replace)
    faults = _Faults(path)
    table = _read(path, Classes(classes or shard_set.manifest.classes), faults)
    ids = table.ids(shard_set, faults)
    _refuse_doubles(ids, table.lines, faults)
    faults.check()
    rows = np.zeros(len(ids), dtype=LABEL_DTYPE)
    rows["id"], rows["weight"] = ids, table.weights
    labels, names = table.labels.finished()
    rows["label"] = labels[table.codes]
    return write_labels(shard_set, name, rows, names, f"{path.name}, SHA-256 {sha256_of(path)}")


def _refuse_name(shard_set: ShardSet, name: str, replace: bool) -> None:
    if not name.endswith(".npy") and not _NAME.fullmatch(name):
        raise UsageError(
            f"{name!r} cannot name a label table: use letters, digits, dots and dashes, or a path "
            "that ends in .npy."
        )
    path = label_path(shard_set, name)
    if path.with_suffix(".json").exists() and not replace:
        raise UsageError(f"{path} exists already: choose another name, or pass --replace.")


class _Faults:
    """What is wrong with a CSV: the first few faults by their line, and how many there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.first: list[tuple[int, str]] = []

    def add(self, line: int, what: str) -> None:
        """Note a fault of a line."""
        self.count += 1
        insort(self.first, (line, what))
        del self.first[_SHOWN:]

    def check(self) -> None:
        """Refuse the CSV if there was any fault.

        Raises:
            DataError: listing the first ones and their number.
        """
        if self.count:
            lines = "".join(f"\n  line {line}: {what}" for line, what in self.first)
            raise DataError(
                f"{self.path} has {self.count} fault(s), so no labels were written. "
                f"The first:{lines}"
            )


class _Table:
    """The rows of a CSV in columns, by id or by name.

    Attributes:
        ids: of the samples, if the CSV gives them.
        names, ends: the names one after the other, and where each ends, if the CSV gives those.
        codes, weights, lines: of each row.
    """

    def __init__(self, labels: Classes, by_name: bool) -> None:
        self.labels, self.by_name = labels, by_name
        self.given, self.names, self.ends = array("q"), bytearray(), array("q", [0])
        self.codes, self.weights, self.lines = array("i"), array("f"), array("q")

    def add(self, key: str, code: int, weight: float, line: int) -> None:
        """Add a sound row."""
        if self.by_name:
            self.names += key.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.names))
        else:
            self.given.append(int(key))
        self.codes.append(code)
        self.weights.append(weight)
        self.lines.append(line)

    def ids(self, shard_set: ShardSet, faults: _Faults) -> npt.NDArray[np.int64]:
        """Return the id of each row; -1, and a fault, where there is no such sample."""
        if self.by_name:
            return _look_up(shard_set, self, faults)
        ids = np.array(self.given, dtype=np.int64)
        for place in np.flatnonzero(ids >= len(shard_set)).tolist():
            what = f"there is no id {ids[place]}, only 0..{len(shard_set) - 1}"
            faults.add(self.lines[place], what)
            ids[place] = -1
        return ids

    def name(self, place: int) -> bytes:
        """Return the name in a row."""
        return bytes(self.names[self.ends[place] : self.ends[place + 1]])


def _read(path: Path, labels: Classes, faults: _Faults) -> _Table:
    try:
        # A name that is not UTF-8 is written as it is stored.
        with path.open(encoding="utf-8-sig", errors="surrogateescape", newline="") as stream:
            reader = csv.DictReader(stream, strict=True)
            table = _Table(labels, by_name=_keys(path, reader.fieldnames or []) == "name")
            for row in reader:
                _add(table, row, reader.line_num, faults)
    except OSError as error:
        raise UsageError(f"{path} cannot be read ({error.strerror}).") from error
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV: line {reader.reader.line_num}: {error}.") from error
    if not table.lines and not faults.count:
        raise DataError(f"{path} has no rows.")
    return table


def _keys(path: Path, columns: Sequence[str]) -> str:
    """Return the column that names the samples.

    Raises:
        DataError: columns are missing, unknown or given twice.
    """
    keys = [column for column in columns if column in ("id", "name")]
    unknown = sorted(set(columns) - {"id", "name", "label", "weight"})
    sound = len(keys) == 1 and "label" in columns and len(set(columns)) == len(columns)
    if unknown or not sound:
        raise DataError(
            f"{path} has the columns {', '.join(map(repr, columns)) or 'none'}: it needs a header "
            "with `label`, and one of `id` and `name`; `weight` is optional, others are not known."
        )
    return keys[0]


def _add(table: _Table, row: dict[str, str], line: int, faults: _Faults) -> None:
    key, value, weight = row.get("name" if table.by_name else "id"), row["label"], row.get("weight")
    if None in row or None in row.values():
        return faults.add(line, "has another number of fields than the header")
    assert key is not None
    if not table.by_name and not _ID.fullmatch(key.strip()):
        return faults.add(line, f"the id {key!r} is not that of a sample")
    if not value.strip():
        return faults.add(line, "the label is empty")
    number = _weight(weight)
    if number is None:
        return faults.add(line, f"the weight {weight!r} is not a number of 0 or more")
    code = table.labels.code(value.strip())
    if code is None:
        return faults.add(line, f"the label {value!r} is none of {len(table.labels.given)} classes")
    table.add(key if table.by_name else key.strip(), code, number, line)


def _weight(text: str | None) -> float | None:
    try:
        number = 1.0 if text is None else float(text)
    except ValueError:
        return None
    return number if math.isfinite(number) and number >= 0 else None


def _refuse_doubles(ids: npt.NDArray[np.int64], lines: Sequence[int], faults: _Faults) -> None:
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    doubled = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)) + 1
    first = np.searchsorted(ordered, ordered[doubled])
    for place, earlier in zip(order[doubled].tolist(), order[first].tolist(), strict=True):
        faults.add(lines[place], f"names sample {ids[place]} again, as line {lines[earlier]} does")


def _look_up(shard_set: ShardSet, table: _Table, faults: _Faults) -> npt.NDArray[np.int64]:
    """Return the id of each row by its name, in one pass over the names of the set."""
    wanted = _hashes(map(table.name, range(len(table.lines))), len(table.lines))
    order = np.argsort(wanted, kind="stable")
    ordered = wanted[order]
    ids = np.full(len(wanted), -1, dtype=np.int64)
    for start in range(0, len(shard_set), CHUNK):
        names = shard_set.names(start, min(start + CHUNK, len(shard_set)))
        hashes = _hashes(names, len(names))
        first, last = (np.searchsorted(ordered, hashes, side) for side in ("left", "right"))
        for found in np.flatnonzero(last > first).tolist():
            for place in order[first[found] : last[found]].tolist():
                if ids[place] >= 0:
                    what = f"names two samples, {ids[place]} and {start + found}: give ids"
                    faults.add(table.lines[place], what)
                ids[place] = start + found
    for place in np.flatnonzero(ids < 0).tolist():
        name = table.name(place).decode("utf-8", "surrogateescape")
        faults.add(table.lines[place], f"the set has no sample {name!r}")
    return ids


def _hashes(names: Iterable[bytes], count: int) -> npt.NDArray[np.bytes_]:
    found = (hashlib.blake2b(name, digest_size=_DIGEST).digest() for name in names)
    return np.fromiter(found, dtype=f"S{_DIGEST}", count=count)
