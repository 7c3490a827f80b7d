"""Tables of labels as people and programs write them: CSVs with a header.

    sample,name,label,weight,confidence

One of `sample` (its number in the set) and `name` (of its file) must be there, and `label`; where
both are, they must agree. `weight` is what a sample counts in training, `confidence` how sure a
program is of the label. Everything wrong with a table is told at once. Memory goes with the CSV,
not with the set.
"""

from array import array
from bisect import insort
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Ids
from fastmoco.dataset.classes import Found, Known, few, is_no_label, is_utf8, parse_number
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import LABEL_DTYPE, ShardSet
from fastmoco.errors import DataError
from fastmoco.label.names import Names, find_samples, get_left_out, guess_meaning, is_name_of
from fastmoco.pack.listing import Listing, opened, tidied

_SHOWN = 5  # faults
_LEAST, _MOST = (float(getattr(np.finfo(np.float32), name)) for name in ("tiny", "max"))
_NUMBERS = {"weight": (1.0, _MOST), "confidence": (np.nan, 1.0)}  # in an empty cell; at most


@dataclass(frozen=True)
class LabelTable:
    """The rows of a CSV that have a label, in its order.

    Attributes:
        ids: (n,) int64, of the samples; each once.
        labels: (n,) int64, theirs.
        weights: (n,) fp32, above 0; 1 where the CSV has none.
        confidences: (n,) fp32 of 0..1, NaN in empty cells; None: the CSV has no such column.
        classes: names of the labels 0, 1, ...
        notes: what a person should know of how the CSV was read.
    """

    ids: Ids
    labels: Ids
    weights: npt.NDArray[np.float32]
    confidences: npt.NDArray[np.float32] | None
    classes: list[str]
    notes: list[str] = field(default_factory=list)

    @property
    def rows(self) -> npt.NDArray[np.void]:
        """`LABEL_DTYPE` rows, as `write_labels` takes them."""
        rows = np.zeros(len(self.ids), dtype=LABEL_DTYPE)
        rows["id"], rows["label"], rows["weight"] = self.ids, self.labels, self.weights
        return rows


def read_table(
    shard_set: ShardSet,
    path: Path,
    classes: Sequence[str] | None = None,
    folder: str | None = None,
) -> LabelTable:
    """Read the labels that a CSV has for the samples of a set.

    Args:
        shard_set: the set.
        path: of the CSV.
        classes: the names of the labels 0, 1, ...; by default those of the set if the labels are
            among them, and if none of them is, or if not all of a CSV with confidences are, those
            of the CSV: see `Known` and `Found`.
        folder: what stands before the names of the set in those of the CSV.

    Raises:
        DataError: the CSV cannot be read, has faults, the first of which are listed, or no label.
    """
    faults = _Faults(path)
    table = _read(path, faults)
    labels, names, note = _classes(table, shard_set.manifest.classes, classes, faults)
    ids = _ids(table, shard_set, folder, faults)
    _refuse_doubles(ids, table, faults)
    faults.check()
    kept = (ids >= 0) & (np.array(table.codes) >= 0)
    if not kept.any():
        raise DataError(f"{path} has no label for a sample of the set.")
    notes = [note, *_counts(table, ids, int(kept.sum()), len(shard_set))]
    numbers = {role: np.array(column)[kept] for role, column in table.numbers.items()}
    return LabelTable(
        ids[kept],
        labels[np.array(table.codes)[kept]].astype(np.int64),
        numbers.get("weight", np.ones(int(kept.sum()), np.float32)),
        numbers.get("confidence"),
        names,
        [note for note in notes if note],
    )


def read_labelled(root: Path, table: str) -> Labelled:
    """Return the samples of a set that a table labels.

    Args:
        root: the set.
        table: the name of a side table, or the path of a `.npy` or of a CSV, see `read_table`.

    Raises:
        DataError: no set there, or the table does not fit it.
    """
    shard_set = ShardSet(root)
    if Path(table).suffix.lower() not in (".csv", ".jsonl"):
        return Labelled.of(shard_set, table)
    found = read_table(shard_set, Path(table))
    return Labelled.of_rows(shard_set, found.ids, found.labels, found.weights, found.classes, table)


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
                f"{self.path} has {self.count} fault(s), so none of its labels was taken. "
                f"The first:{lines}{hints}"
            )


class _Table:
    """The rows of a CSV in columns, by sample number or by name.

    Attributes:
        listing: the CSV.
        by_name: whether the CSV gives no sample numbers.
        given, names: of each row, if the CSV gives them.
        codes, lines: of each row; code -1: no label.
        numbers: of each row, for the roles of `_NUMBERS` that the CSV has.
        found: the different labels.
    """

    def __init__(self, listing: Listing) -> None:
        self.listing, self.by_name = listing, "sample" not in listing.columns
        self.given, self.names = array("q"), Names()
        self.codes, self.lines = array("i"), array("q")
        self.numbers = {role: array("f") for role in _NUMBERS if role in listing.columns}
        self.found = Found()

    @property
    def has_names(self) -> bool:
        """Whether names are compared: beside numbers, only a column that is called just so."""
        return "name" in self.listing.columns and (
            self.by_name or self.listing.called("name") == "name"
        )


def _read(path: Path, faults: _Faults) -> _Table:
    with opened(path, ("sample", "name", "label", *_NUMBERS)) as listing:
        columns = listing.columns
        if "label" not in columns or not {"sample", "name"} & set(columns):
            raise DataError(
                f"{path} has the columns {', '.join(map(repr, listing.header)) or 'none'}: it "
                "needs a header with `label`, and `name` (of the file) or `sample` (its number in "
                "the set)."
            )
        table = _Table(listing)
        for line, fields in listing.rows:
            if fault := _add(table, fields, line):
                faults.add(line, fault)
    if not table.lines and not faults.count:
        raise DataError(f"{path} has no rows.")
    return table


def _add(table: _Table, fields: list[str], line: int) -> str | None:
    """Add a row if it is sound; else return what is wrong with it."""
    columns = table.listing.columns
    if len(fields) != len(table.listing.header):
        return "has another number of fields than the header"
    cells = {role: fields[place].strip() for role, place in columns.items()}
    number = parse_number(cells.get("sample", ""))
    if not table.by_name and number is None:
        given = fields[columns["sample"]]
        return f"{given!r} is no sample number: call a column of names `name`"
    if not is_utf8(cells["label"]):
        return f"the label {cells['label']!r} is not UTF-8: save the file in UTF-8"
    numbers = {role: _parse(role, cells[role]) for role in table.numbers}
    for role, value in numbers.items():
        if value is None:
            most = "" if role == "weight" else " and at most 1"
            return f"the {role} {cells[role]!r}: it must be a number above 0{most}"
    for role, value in numbers.items():
        table.numbers[role].append(value or 0)
    if table.has_names:
        table.names.append(fields[columns["name"]])
    table.given.append(number or 0)
    table.codes.append(-1 if is_no_label(cells["label"]) else table.found.code(cells["label"]))
    table.lines.append(line)
    return None


def _parse(role: str, cell: str) -> float | None:
    """Return a number, None if it is none that the role allows."""
    empty, most = _NUMBERS[role]
    if not cell:
        return empty
    try:
        value = float(cell)
    except ValueError:
        return None
    return value if _LEAST <= value <= most else None


def _classes(
    table: _Table, packed: list[str], given: Sequence[str] | None, faults: _Faults
) -> tuple[npt.NDArray[np.int32], list[str], str | None]:
    """Return the label of each code, the class names, and a note if they are not the set's."""
    known = Known(given, by_place=True) if given else Known(packed)
    codes = known.codes(table.found.values)
    strange = np.flatnonzero(codes < 0)
    by_program = "confidence" in table.numbers  # writes the names of what it has learnt
    if not given and len(strange) >= (1 if by_program else len(codes)):  # of another kind
        if not by_program:
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
    for row, name in enumerate(table.names):
        (stored,) = shard_set.names(int(ids[row]), int(ids[row]) + 1) if ids[row] >= 0 else (b"",)
        if name.strip() and ids[row] >= 0 and not is_name_of(name, stored):
            own = stored.decode("utf-8", "surrogateescape")
            what = f"sample {ids[row]} is {own!r}, not {name!r}: the file is of another set"
            faults.add(table.lines[row], what)
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


def _look_up(
    shard_set: ShardSet, table: _Table, folder: str | None, faults: _Faults
) -> npt.NDArray[np.int64]:
    """Return the sample of each row by its name."""
    names = table.names
    ids, others = find_samples(shard_set, names, folder)
    for row in np.flatnonzero(others >= 0).tolist():
        one, two = (shard_set.get_name(int(found[row])) for found in (ids, others))
        what = f"{names[row]!r} could be {one!r} or {two!r}: write the whole name"
        faults.add(table.lines[row], what)
    missing = np.flatnonzero(ids < 0)
    if len(missing):
        left_out = get_left_out(shard_set)
        strange = [row for row in missing.tolist() if tidied(names[row]) not in left_out]
        for row in strange:
            faults.add(table.lines[row], f"the set has no sample {names[row]!r}")
        if strange:
            column = table.listing.called("name")
            faults.hints += guess_meaning(shard_set, column, names[strange[0]])
    return ids
