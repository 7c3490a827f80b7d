"""`fastmoco label`: labels that come later, from a CSV into a side table.

The CSV has a header (see `listing`) with a column of labels, and one of names or of sample numbers
(`sample`). Everything wrong with it is told at once, and then nothing is written. Memory goes with
the CSV, not with the set.
"""

import hashlib
import os
import posixpath
import re
import shlex
import unicodedata
from array import array
from bisect import insort
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import hash_file
from fastmoco.dataset.classes import Found, Known, few, is_no_label, is_utf8, parse_number
from fastmoco.dataset.shard_set import (
    CHUNK,
    LABEL_DTYPE,
    ShardSet,
    label_path,
    refuse_strangers,
    write_labels,
)
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.listing import Listing, opened, tidied

_SHOWN = 5  # faults
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")
_DIGEST = 16  # bytes of a name's hash: among 10^9 names, two agree with probability 10^-21
_UNMATCHED = 127


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
    faults = _Faults(path)
    table = _read(path, faults)
    labels, names, note = _classes(table, shard_set.manifest.classes, classes, faults)
    ids = _ids(table, shard_set, folder, faults)
    _refuse_doubles(ids, table, faults)
    faults.check()
    kept = (ids >= 0) & (np.array(table.codes) >= 0)
    if not kept.any():
        raise DataError(f"{path} has no label for a sample of the set: nothing was written.")
    rows = np.zeros(int(kept.sum()), dtype=LABEL_DTYPE)
    rows["id"], rows["weight"] = ids[kept], 1
    rows["label"] = labels[np.array(table.codes)[kept]]
    notes = [note, *_counts(table, ids, len(rows), len(shard_set))]
    origin = f"{path.name}, SHA-256 {hash_file(path)}"
    try:
        written = write_labels(shard_set, name, rows, names, origin)
    except OSError as error:
        raise DataError(
            f"{label_path(shard_set, name)} cannot be written ({error.strerror or error}); labels "
            "of that name that were there still are."
        ) from error
    return Written(written, len(rows), names, [note for note in notes if note])


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


class _Faults:
    """What is wrong with a CSV: the first few faults by their line, and how many there are."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.count = 0
        self.first: list[tuple[int, str]] = []
        self.hints: list[str] = []

    def add(self, line: int, what: str) -> None:
        """Note a fault of a line."""
        self.count += 1
        insort(self.first, (line, what))
        del self.first[_SHOWN:]

    def check(self) -> None:
        """Refuse the CSV if there was any fault.

        Raises:
            DataError: listing the first ones, their number, and what may be meant.
        """
        if self.count:
            lines = "".join(f"\n  line {line}: {what}" for line, what in self.first)
            hints = "".join(f"\n{hint}" for hint in self.hints)
            raise DataError(
                f"{self.path} has {self.count} fault(s), so no labels were written. "
                f"The first:{lines}{hints}"
            )


class _Table:
    """The rows of a CSV in columns, by sample number or by name.

    Attributes:
        listing: the CSV.
        given: the sample numbers, if the CSV gives those.
        names, ends: the names one after the other, and where each ends, if the CSV gives those.
        codes, lines: of each row; code -1: no label.
        found: the different labels.
    """

    def __init__(self, listing: Listing) -> None:
        self.listing, self.by_name = listing, "sample" not in listing.columns
        self.given, self.names, self.ends = array("q"), bytearray(), array("q", [0])
        self.codes, self.lines = array("i"), array("q")
        self.found = Found()

    def __len__(self) -> int:
        return len(self.lines)

    def add(self, key: str, value: str, line: int) -> None:
        """Add a sound row."""
        if self.by_name:
            self.names += key.encode("utf-8", "surrogateescape")
            self.ends.append(len(self.names))
        else:
            self.given.append(parse_number(key) or 0)
        self.codes.append(-1 if is_no_label(value) else self.found.code(value))
        self.lines.append(line)

    def name(self, row: int) -> str:
        """Return the name in a row."""
        stored = bytes(self.names[self.ends[row] : self.ends[row + 1]])
        return stored.decode("utf-8", "surrogateescape")


def _read(path: Path, faults: _Faults) -> _Table:
    with opened(path, ("sample", "name", "label", "weight")) as listing:
        columns = listing.columns
        if "label" not in columns or not {"sample", "name"} & set(columns):
            raise DataError(
                f"{path} has the columns {', '.join(map(repr, listing.header)) or 'none'}: it "
                "needs a header with `label`, and `name` (of the file) or `sample` (its number in "
                "the set)."
            )
        table = _Table(listing)
        for line, fields in listing.rows:
            _add(table, fields, line, faults)
    if not table.lines and not faults.count:
        raise DataError(f"{path} has no rows.")
    return table


def _add(table: _Table, fields: list[str], line: int, faults: _Faults) -> None:
    columns = table.listing.columns
    if len(fields) != len(table.listing.header):
        return faults.add(line, "has another number of fields than the header")
    key, value = fields[columns["name" if table.by_name else "sample"]], fields[columns["label"]]
    if not table.by_name and parse_number(key.strip()) is None:
        return faults.add(line, f"{key!r} is no sample number: call a column of names `name`")
    if not is_utf8(value):
        return faults.add(line, f"the label {value!r} is not UTF-8: save the file in UTF-8")
    if "weight" in columns and not _is_one(fields[columns["weight"]]):
        weight = fields[columns["weight"]]
        return faults.add(line, f"the weight {weight!r}: weights are not used yet, leave them out")
    return table.add(key if table.by_name else key.strip(), value.strip(), line)


def _is_one(weight: str) -> bool:
    try:
        return float(weight or 1) == 1
    except ValueError:
        return False


def _classes(
    table: _Table, packed: list[str], given: Sequence[str] | None, faults: _Faults
) -> tuple[npt.NDArray[np.int32], list[str], str | None]:
    """Return the label of each code, the class names, and a note if they are not the set's."""
    known = Known(given, by_place=True) if given else Known(packed)
    codes = known.codes(table.found.values)
    strange = np.flatnonzero(codes < 0)
    if not given and len(strange) == len(codes):  # of another kind than those of the set
        _refuse_other_case(table, packed)
        own, names = table.found.as_classes()
        told = f"classes of its own ({few(names, 3)}), not the set's ({few(packed, 3)})"
        if all(parse_number(name) is not None for name in names):
            told += "; where numbers are places among the set's, pass --classes SET"
        return own, names, told if packed and names else None
    if len(strange):
        values = list(table.found.values)
        for row in np.flatnonzero(np.isin(table.codes, strange)):
            what = f"the label {values[table.codes[row]]!r} is none of {len(known.names)} classes"
            faults.add(table.lines[row], what)
        if not given:
            faults.hints.append(
                f"Other labels are classes of the set ({few(packed, 3)}): mend these, or name all "
                "classes, one a line of a text file, by --classes FILE."
            )
    return codes, known.names, None


def _refuse_other_case(table: _Table, packed: list[str]) -> None:
    alike = {name.casefold(): name for name in packed}
    for value in table.found.values:
        if value.casefold() in alike:
            raise DataError(
                f"The label {value!r} of {table.listing.path} differs from the class "
                f"{alike[value.casefold()]!r} of the set in case only: write it alike, or name all "
                "classes, one a line of a text file, by --classes FILE."
            )


def _counts(table: _Table, ids: npt.NDArray[np.int64], kept: int, samples: int) -> Iterator[str]:
    """Yield what was passed over."""
    empty = sum(code < 0 for code in table.codes)
    if empty:
        yield f"{empty} rows have no label (empty or -1)"
    absent = int((ids < 0).sum())
    if absent:
        yield f"{absent} rows name images that were left out when the set was packed"
    if kept < samples:
        yield f"{samples - kept} of {samples} samples stay without a label"
    unread = table.listing.unread()
    if unread:
        yield f"columns that were not read: {', '.join(map(repr, unread))}"


def _ids(
    table: _Table, shard_set: ShardSet, folder: str | None, faults: _Faults
) -> npt.NDArray[np.int64]:
    """Return the sample of each row; -1 where there is none, which is a fault if not told."""
    if table.by_name:
        return _look_up(shard_set, table, folder, faults)
    ids = np.array(table.given, dtype=np.int64)
    for row in np.flatnonzero(ids >= len(shard_set)).tolist():
        faults.add(table.lines[row], f"there is no sample {ids[row]}, only 0..{len(shard_set) - 1}")
        ids[row] = -1
    return ids


def _refuse_doubles(ids: npt.NDArray[np.int64], table: _Table, faults: _Faults) -> None:
    lines, codes = table.lines, table.codes
    order = np.argsort(ids, kind="stable")
    ordered = ids[order]
    doubled = np.flatnonzero((ordered[1:] == ordered[:-1]) & (ordered[1:] >= 0)) + 1
    first = np.searchsorted(ordered, ordered[doubled])
    for row, earlier in zip(order[doubled].tolist(), order[first].tolist(), strict=True):
        other = "" if codes[row] == codes[earlier] else ": an image has one label"
        what = f"names sample {ids[row]} again, as line {lines[earlier]} does{other}"
        faults.add(lines[row], what)


class _Wanted:
    """The names of a CSV, and the sample that each one means.

    A name is the whole name of a sample, that without the extension, its last part, or that
    without the extension; the first of these that fits counts, and must fit one sample alone. In
    each it may be as it is written, tidied, or normalized.
    """

    def __init__(self, table: _Table, folder: str | None) -> None:
        roots = [] if folder is None else [tidied(folder), tidied(os.path.abspath(folder))]
        hashes, rows, forms = [], array("q"), array("b")
        for row in range(len(table)):
            for form, name in enumerate(_forms(table.name(row), roots)):
                hashes.append(_hash(name.encode("utf-8", "surrogateescape")))
                rows.append(row)
                forms.append(form)
        found = np.array(hashes, dtype=f"S{_DIGEST}")
        order = np.argsort(found, kind="stable")
        self.hashes, self.rows = found[order], np.array(rows)[order]
        self.forms = np.array(forms)[order]
        self.ids = np.full(len(table), -1, dtype=np.int64)
        self.other = np.full(len(table), -1, dtype=np.int64)  # another sample that fits as well
        self.rank = np.full(len(table), _UNMATCHED, dtype=np.int8)

    def offer(self, names: Sequence[bytes], start: int) -> None:
        """Look at the names of the samples from `start` on."""
        keys = [
            (key, rank, start + row) for row, name in enumerate(names) for key, rank in _keys(name)
        ]
        hashes = np.array([_hash(key) for key, _, _ in keys], dtype=f"S{_DIGEST}")
        first, last = (np.searchsorted(self.hashes, hashes, side) for side in ("left", "right"))
        for place in np.flatnonzero(last > first).tolist():
            _, rank, sample = keys[place]
            for at in range(first[place], last[place]):
                self._match(int(self.rows[at]), sample, max(rank, rank // 3 * 3 + self.forms[at]))

    def _match(self, row: int, sample: int, rank: int) -> None:
        if rank < self.rank[row]:
            self.rank[row], self.ids[row], self.other[row] = rank, sample, -1
        elif rank == self.rank[row] and sample != self.ids[row]:
            self.other[row] = sample


def _forms(name: str, roots: Sequence[str]) -> Iterator[str]:
    yield name
    tidy = tidied(name)
    tidy = next((tidy[len(root) + 1 :] for root in roots if tidy.startswith(f"{root}/")), tidy)
    normal = unicodedata.normalize("NFC", tidy)
    if tidy != name or normal != tidy:
        yield tidy
    if normal != tidy:
        yield normal


def _keys(name: bytes) -> Iterator[tuple[bytes, int]]:
    """Yield what a sample may be called, with 3 x how far that is from its name, + 2 if normal."""
    member = name.partition(b".tar!")[2] or name  # of a shard that was adopted
    base = member.rpartition(b"/")[2]
    stems = (posixpath.splitext(member)[0], base, posixpath.splitext(base)[0])
    seen = set()
    for level, key in enumerate((name, member, *stems)):
        if key in seen:
            continue
        seen.add(key)
        yield key, 3 * level
        if not key.isascii():
            text = unicodedata.normalize("NFC", key.decode("utf-8", "surrogateescape"))
            yield text.encode("utf-8", "surrogateescape"), 3 * level + 2


def _hash(name: bytes) -> bytes:
    return hashlib.blake2b(name, digest_size=_DIGEST).digest()


def _look_up(
    shard_set: ShardSet, table: _Table, folder: str | None, faults: _Faults
) -> npt.NDArray[np.int64]:
    """Return the sample of each row by its name, in one pass over the names of the set."""
    wanted = _Wanted(table, folder)
    for names, start in _names(shard_set):
        wanted.offer(names, start)
    for row in np.flatnonzero(wanted.other >= 0).tolist():
        one, two = (shard_set.get_name(int(ids[row])) for ids in (wanted.ids, wanted.other))
        what = f"{table.name(row)!r} could be {one!r} or {two!r}: write the whole name"
        faults.add(table.lines[row], what)
    missing = np.flatnonzero(wanted.ids < 0)
    if len(missing):
        left_out = _left_out(shard_set)
        strange = [row for row in missing.tolist() if tidied(table.name(row)) not in left_out]
        for row in strange:
            faults.add(table.lines[row], f"the set has no sample {table.name(row)!r}")
        if strange:
            faults.hints += _hints(shard_set, table, table.name(strange[0]))
    return wanted.ids


def _names(shard_set: ShardSet) -> Iterator[tuple[list[bytes], int]]:
    for start in range(0, len(shard_set), CHUNK):
        yield shard_set.names(start, min(start + CHUNK, len(shard_set))), start


def _left_out(shard_set: ShardSet) -> set[str]:
    """Return what the rejects of a set may be called."""
    found: set[str] = set()
    for name in shard_set.rejects():
        keys = _keys(name.encode("utf-8", "surrogateescape"))
        found |= {key.decode("utf-8", "surrogateescape") for key, _ in keys}
    return found


def _hints(shard_set: ShardSet, table: _Table, name: str) -> Iterable[str]:
    """Yield what may be meant by a column whose name `name` no sample has."""
    if table.listing.called("name") == "id" and parse_number(name.strip()) is not None:
        yield "If these are the numbers of samples in the set, call the column `sample`."
    parts = tidied(name).split("/")
    tails = {
        "/".join(parts[cut:]).encode("utf-8", "surrogateescape"): cut
        for cut in range(1, len(parts))
    }
    for names, _ in _names(shard_set):
        for found in tails.keys() & set(names):
            root = "/".join(parts[: tails[found]]) or "/"
            yield f"If the names of the set begin behind {root}, pass --root {shlex.quote(root)}."
            return
