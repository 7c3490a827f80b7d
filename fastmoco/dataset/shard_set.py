"""The contract between packing and loading: a folder of tar shards, its table and its manifest.

shard-000000.tar     plain USTAR WebDataset shards
shard-000000.idx     DALI v1.2 index of each
samples.npy          one `SAMPLE_DTYPE` row a sample; the row number is the sample id, for ever
names.txt            original names; row i is names.txt[names.idx.npy[i]:names.idx.npy[i + 1]]
names.idx.npy        (N + 1,) uint64 byte offsets into names.txt
manifest.json        `Manifest`
rejects.jsonl        one {"name", "reason"} a line for every input left out
labels/NAME.npy      side tables: labels that came later (`LABEL_DTYPE`), beside NAME.json
"""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import (
    hash_file,
    load_array,
    locked,
    make_parent,
    new_file,
    sync,
    write_json,
)
from fastmoco.dataset.manifest import Shard, read_manifest
from fastmoco.errors import DataError, UsageError

SAMPLE_DTYPE = np.dtype(
    [
        ("offset", "<u8"),  # of the image bytes in the shard
        ("hash", "<u8"),  # first 64 bits of the SHA-256 of the image bytes
        ("size", "<u4"),  # of the image, in bytes
        ("shard", "<u4"),
        ("label", "<i4"),  # -1: none
        ("height", "<u2"),
        ("width", "<u2"),
    ]
)
LABEL_DTYPE = np.dtype([("id", "<i4"), ("label", "<i4"), ("weight", "<f4")])
PSEUDO = "pseudo-labels"
"""What the origin of a side table begins with if no person gave its labels."""


class ShardSet:
    """One opened set. Opening reads the manifest; tables are memory-mapped on first use.

    Args:
        root: the folder that `fastmoco shard` wrote.
        check: the sizes of the shards; `fastmoco verify` opens sets that are damaged.

    Raises:
        DataError: no set there, a newer format, or a table or shard whose size does not fit.
    """

    def __init__(self, root: Path, *, check: bool = True) -> None:
        self.root = Path(root)
        self.manifest = read_manifest(self.root)
        if check:
            self._check_shards()

    def __len__(self) -> int:
        return self.manifest.samples

    def _check_shards(self) -> None:
        for shard in self.manifest.shards:
            what = self.size_fault(shard)
            if what:
                raise DataError(
                    f"{self.root / shard.name} {what}: copy the set again, or pack it anew."
                )

    def size_fault(self, shard: Shard) -> str | None:
        """Return what is wrong with the size of a shard's file, None if nothing is."""
        try:
            # One call a shard and no `Path`: a set has up to 100,000 of them.
            found = os.stat(f"{self.root}/{shard.name}").st_size
        except OSError:
            return "is missing"
        return None if found == shard.bytes else f"has {found} bytes, not {shard.bytes}"

    @cached_property
    def samples(self) -> npt.NDArray[np.void]:
        """The sample table: (N,) structured rows with at least the columns of `SAMPLE_DTYPE`."""
        table: npt.NDArray[np.void] = self._load("samples.npy", len(self))
        names = table.dtype.names or ()
        missing = [
            name
            for name in SAMPLE_DTYPE.names or ()
            if name not in names or table.dtype[name] != SAMPLE_DTYPE[name]
        ]
        if missing:
            raise DataError(f"{self.root}/samples.npy lacks the columns {missing}.")
        return table

    def _load(self, name: str, rows: int) -> npt.NDArray[Any]:
        path = self.root / name
        try:
            table = load_array(path)
        except ValueError as error:
            raise DataError(f"{path} cannot be read ({error}): pack the set anew.") from error
        if len(table) != rows:
            raise DataError(f"{path} has {len(table)} rows, the manifest says {rows}.")
        return table

    @cached_property
    def name_bytes(self) -> npt.NDArray[np.uint8]:
        """The names, each with a line feed behind it; memory-mapped."""
        path = self.root / "names.txt"
        try:
            return np.memmap(path, dtype=np.uint8, mode="r")
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): pack the set anew.") from error

    @cached_property
    def name_offsets(self) -> npt.NDArray[np.uint64]:
        """(N + 1,): where each name starts in `names.txt`, and where the last one ends."""
        return self._load("names.idx.npy", len(self) + 1)

    def get_name(self, row: int) -> str:
        """Return the original name of a sample: its path below the source folder."""
        return self.names(row, row + 1)[0].decode("utf-8", "surrogateescape")

    def names(self, start: int, stop: int) -> list[bytes]:
        """Return the original names of a range of samples, as stored."""
        ends = self.name_offsets[start : stop + 1].tolist()
        # A name may hold a line feed: the offsets decide, not the line feeds.
        content = self.name_bytes[ends[0] : ends[-1]].tobytes()
        return [content[a - ends[0] : b - 1 - ends[0]] for a, b in pairwise(ends)]

    def rejects(self) -> Iterator[str]:
        """Yield the names of what was left out when the set was made, as far as they are known."""
        path = self.root / "rejects.jsonl"
        with suppress(OSError, ValueError, KeyError, TypeError), path.open() as lines:
            for line in lines:
                yield str(json.loads(line)["name"])

    def describe(self, row: int) -> str:
        """Return the words that name a sample in an error: id, original name, shard."""
        shard = self.manifest.shards[int(self.samples["shard"][row])].name
        return f"sample {row} ({self.get_name(row)}) in {self.root / shard}"

    def labels(self, table: str | Path | None = None) -> npt.NDArray[np.int32]:
        """Return (N,) int32 labels, -1 where there is none, from the set or from a side table.

        Args:
            table: name of a table below `labels/`, or the path of a `.npy` that lies elsewhere.

        Raises:
            DataError: the table is missing, damaged or belongs to another set.
        """
        if table is None:
            return np.array(self.samples["label"], dtype=np.int32)
        rows, _ = read_labels(self, table)
        labels = np.full(len(self), -1, dtype=np.int32)
        labels[rows["id"]] = rows["label"]
        return labels


def label_path(shard_set: ShardSet, table: str | Path) -> Path:
    """Return where a side table lies: below `labels/`, or at its own path if that ends in .npy."""
    named = shard_set.root / "labels" / f"{table}.npy"
    return Path(table) if str(table).endswith(".npy") else named


def read_labels(shard_set: ShardSet, table: str | Path) -> tuple[npt.NDArray[np.void], list[str]]:
    """Return a side table's rows (`LABEL_DTYPE`, sorted by id) and its class names.

    Raises:
        DataError: the table is missing, damaged or belongs to another set.
    """
    path = label_path(shard_set, table)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        owner, classes = str(about["set_id"]), [str(name) for name in about["classes"]]
        rows = np.array(load_array(path))
        changed = "sha256" in about and about["sha256"] != hash_file(path)  # none in older tables
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise DataError(f"The label table {path} cannot be read: {error}.") from error
    if owner != shard_set.manifest.set_id:
        raise DataError(
            f"The label table {path} belongs to set {owner[:12]}, "
            f"{shard_set.root} is set {shard_set.manifest.set_id[:12]}."
        )
    fault = _label_fault(rows, len(shard_set), len(classes))
    if fault:
        raise DataError(f"The label table {path} is damaged: {fault}.")
    if changed:
        raise DataError(
            f"The label table {path} was changed after it was written: label the set anew."
        )
    return rows, classes


def _label_fault(rows: npt.NDArray[np.void], samples: int, classes: int) -> str | None:
    """Return what is wrong with a side table sorted by id, None if nothing is."""
    if rows.dtype != LABEL_DTYPE or rows.ndim != 1:
        return f"its rows are not {LABEL_DTYPE.names}"
    ids, labels = rows["id"], rows["label"]
    if (np.diff(ids) <= 0).any():
        return "a sample is named twice, or the rows are not sorted by id"
    if len(ids) and (ids[0] < 0 or ids[-1] >= samples):
        return f"sample ids must lie in 0..{samples - 1}"
    if len(ids) and (labels.min() < 0 or labels.max() >= classes):
        return f"labels must lie in 0..{classes - 1}, one for each class name"
    return None


def write_labels(
    shard_set: ShardSet,
    table: str | Path,
    rows: npt.NDArray[np.void],
    classes: Sequence[str],
    origin: str,
) -> Path:
    """Write a side table for a set, without touching its shards.

    Args:
        shard_set: the set that the ids refer to.
        table: a name (goes below `labels/`) or the path of a `.npy`.
        rows: `LABEL_DTYPE` rows in any order, one an id.
        classes: names of the labels 0, 1, ...
        origin: where the labels come from, in words.

    Raises:
        DataError: an id twice or out of range, or a label without a class.
        UsageError: another process is writing the table.
    """
    rows = np.sort(rows.astype(LABEL_DTYPE), order="id")
    fault = _label_fault(rows, len(shard_set), len(classes))
    if fault:
        raise DataError(f"{fault[0].upper()}{fault[1:]}.")
    path = label_path(shard_set, table)
    about = {"set_id": shard_set.manifest.set_id, "classes": list(classes), "origin": origin}
    make_parent(path)
    with (
        locked(path.with_name(f".{path.name}.lock"), path),
        new_file(path.with_suffix(".json")) as about_aside,
        new_file(path) as rows_aside,
    ):
        with rows_aside.open("wb") as stream:
            np.save(stream, rows)
        # Both are on the disk before the first takes the place of an older table.
        write_json(about_aside, about | {"sha256": hash_file(rows_aside)})
        sync(rows_aside)
    sync(path.parent)
    return path


def holds_pseudo_labels(shard_set: ShardSet, table: str | Path) -> bool:
    """Return whether a side table that can be read is of labels that a program is sure of."""
    about = json.loads(label_path(shard_set, table).with_suffix(".json").read_text())
    return str(about.get("origin")).startswith(PSEUDO)


def refuse_strangers(path: Path) -> None:
    """Check that what stands where a label table goes, if anything, is one.

    Raises:
        UsageError: it is not.
    """
    for file, is_ours in ((path, _is_rows), (path.with_suffix(".json"), _is_about)):
        if os.path.lexists(file) and not is_ours(file):
            raise UsageError(
                f"{file} is there and is no label table: choose another name, or move it away."
            )


def _is_rows(path: Path) -> bool:
    try:
        return load_array(path).dtype == LABEL_DTYPE
    except ValueError:
        return False


def _is_about(path: Path) -> bool:
    try:
        return {"set_id", "classes", "origin"} <= set(json.loads(path.read_text()))
    except (OSError, ValueError, TypeError, RecursionError):
        return False


class ConcatShardSets:
    """Several sets as one: ids run through them in the order given.

    Attributes:
        sets: the opened sets.
        starts: (len(sets) + 1,) int64, the first id of each set and the total.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *(len(s) for s in sets)], dtype=np.int64)

    @classmethod
    def open(cls, roots: Sequence[Path]) -> "ConcatShardSets":
        """Open the sets at `roots`."""
        return cls([ShardSet(root) for root in roots])

    def __len__(self) -> int:
        return int(self.starts[-1])

    @property
    def set_ids(self) -> list[str]:
        """The identities of the sets, in order."""
        return [s.manifest.set_id for s in self.sets]

    def locate(
        self, ids: npt.NDArray[np.int64]
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
        """Return the set number and the row in that set of each id."""
        which = np.searchsorted(self.starts, ids, side="right") - 1
        return which, ids - self.starts[which]

    def rows(self, ids: npt.NDArray[np.int64]) -> npt.NDArray[np.void]:
        """Return a copy of the table rows (`SAMPLE_DTYPE`) of the ids."""
        which, rows = self.locate(ids)
        found = np.empty(len(ids), dtype=SAMPLE_DTYPE)
        for number in np.unique(which):
            mask = which == number
            table = self.sets[number].samples[rows[mask]]
            for column in SAMPLE_DTYPE.names or ():
                found[column][mask] = table[column]
        return found

    def get_name(self, sample_id: int) -> str:
        """Return the original name of a sample."""
        which, row = self.locate(np.array([sample_id]))
        return self.sets[int(which[0])].get_name(int(row[0]))

    def describe(self, sample_id: int) -> str:
        """Return the words that name a sample in an error."""
        which, row = self.locate(np.array([sample_id]))
        return self.sets[int(which[0])].describe(int(row[0]))
