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

import hashlib
import json
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fastmoco.errors import DataError
from fastmoco.files import write_json

FORMAT_VERSION = 1

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


class Shard(BaseModel):
    """One tar file of a set."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[^./\\][^/\\]*$")  # in this folder, and not above it
    samples: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: what a set holds. No time, host, path or worker count enters it."""

    model_config = ConfigDict(extra="forbid")

    format_version: int
    set_id: str
    samples: int
    rejected: int
    progressive: int
    classes: list[str]
    class_counts: list[int]
    mean: list[float]
    std: list[float]
    options: dict[str, Any]
    shards: list[Shard]


def set_id_of(shards: Sequence[Shard], samples: npt.NDArray[np.void]) -> str:
    """Return the identity of a set: SHA-256 over format version, shard hashes and sample table."""
    digest = hashlib.sha256(f"fastmoco {FORMAT_VERSION}\n".encode())
    for shard in shards:
        digest.update(f"{shard.sha256}\n".encode())
    digest.update(np.ascontiguousarray(samples).tobytes())
    return digest.hexdigest()


class ShardSet:
    """One opened set. Opening reads the manifest; tables are memory-mapped on first use.

    Args:
        root: the folder that `fastmoco shard` wrote.

    Raises:
        DataError: no set there, a newer format, or a table or shard whose size does not fit.
    """

    def __init__(self, root: Path) -> None:
        self.root = Path(root)
        self.manifest = _read_manifest(self.root)
        self._check_shards()

    def __len__(self) -> int:
        return self.manifest.samples

    def _check_shards(self) -> None:
        for shard in self.manifest.shards:
            path = self.root / shard.name
            found = path.stat().st_size if path.is_file() else None
            if found != shard.bytes:
                what = "is missing" if found is None else f"has {found} bytes, not {shard.bytes}"
                raise DataError(f"{path} {what}: copy the set again, or pack it anew.")

    @cached_property
    def samples(self) -> npt.NDArray[np.void]:
        """The sample table: (N,) structured rows with at least the columns of `SAMPLE_DTYPE`."""
        table: npt.NDArray[np.void] = self._load("samples.npy", len(self))
        missing = set(SAMPLE_DTYPE.names or ()) - set(table.dtype.names or ())
        if missing:
            raise DataError(f"{self.root}/samples.npy lacks the columns {sorted(missing)}.")
        return table

    def _load(self, name: str, rows: int) -> npt.NDArray[Any]:
        path = self.root / name
        try:
            table: npt.NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
        except (OSError, ValueError) as error:
            raise DataError(f"{path} cannot be read ({error}): pack the set anew.") from error
        if len(table) != rows:
            raise DataError(f"{path} has {len(table)} rows, the manifest says {rows}.")
        return table

    @cached_property
    def _name_bytes(self) -> npt.NDArray[np.uint8]:
        return np.memmap(self.root / "names.txt", dtype=np.uint8, mode="r")

    @cached_property
    def _name_offsets(self) -> npt.NDArray[np.uint64]:
        return self._load("names.idx.npy", len(self) + 1)

    def name_of(self, row: int) -> str:
        """Return the original name of a sample: its path below the source folder."""
        start, stop = (int(x) for x in self._name_offsets[row : row + 2])
        return self._name_bytes[start : stop - 1].tobytes().decode("utf-8", "surrogateescape")

    def describe(self, row: int) -> str:
        """Return the words that name a sample in an error: id, original name, shard."""
        shard = self.manifest.shards[int(self.samples["shard"][row])].name
        return f"sample {row} ({self.name_of(row)}) in {self.root / shard}"

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


def _read_manifest(root: Path) -> Manifest:
    path = root / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{root} is not a shard set (no manifest.json): make it by `fastmoco shard`."
        )
    try:
        raw = json.loads(path.read_text())
        version = int(raw["format_version"])
        if version > FORMAT_VERSION:
            raise DataError(
                f"{root} has format version {version}, this fastmoco reads up to "
                f"{FORMAT_VERSION}: upgrade fastmoco."
            )
        return Manifest.model_validate(raw)
    except (ValueError, KeyError, TypeError, ValidationError) as error:
        raise DataError(f"{path} is damaged: pack the set anew.") from error


def _label_path(shard_set: ShardSet, table: str | Path) -> Path:
    named = shard_set.root / "labels" / f"{table}.npy"
    return Path(table) if str(table).endswith(".npy") else named


def read_labels(shard_set: ShardSet, table: str | Path) -> tuple[npt.NDArray[np.void], list[str]]:
    """Return a side table's rows (`LABEL_DTYPE`, sorted by id) and its class names.

    Raises:
        DataError: the table is missing, damaged or belongs to another set.
    """
    path = _label_path(shard_set, table)
    try:
        about = json.loads(path.with_suffix(".json").read_text())
        rows: npt.NDArray[np.void] = np.load(path, allow_pickle=False)
        owner, classes = str(about["set_id"]), [str(name) for name in about["classes"]]
    except (OSError, ValueError, KeyError) as error:
        raise DataError(f"The label table {path} cannot be read: {error}.") from error
    if owner != shard_set.manifest.set_id:
        raise DataError(
            f"The label table {path} belongs to set {owner[:12]}, "
            f"{shard_set.root} is set {shard_set.manifest.set_id[:12]}."
        )
    return rows, classes


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
    """
    rows = np.sort(rows.astype(LABEL_DTYPE), order="id")
    ids, labels = rows["id"], rows["label"]
    if len(np.unique(ids)) != len(ids):
        raise DataError("The labels name a sample twice.")
    if len(ids) and (ids[0] < 0 or ids[-1] >= len(shard_set)):
        raise DataError(f"Sample ids must lie in 0..{len(shard_set) - 1}.")
    if len(ids) and (labels.min() < 0 or labels.max() >= len(classes)):
        raise DataError(f"Labels must lie in 0..{len(classes) - 1}, one for each class name.")
    path = _label_path(shard_set, table)
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.with_name(f".{path.name}.partial").open("wb") as stream:
        np.save(stream, rows)
    path.with_name(f".{path.name}.partial").replace(path)
    about = {"set_id": shard_set.manifest.set_id, "classes": list(classes), "origin": origin}
    write_json(path.with_suffix(".json"), about)
    return path


class Collection:
    """Several sets as one: ids run through them in the order given.

    Attributes:
        sets: the opened sets.
        starts: (len(sets) + 1,) int64, the first id of each set and the total.
    """

    def __init__(self, sets: Sequence[ShardSet]) -> None:
        self.sets = list(sets)
        self.starts = np.cumsum([0, *(len(s) for s in sets)], dtype=np.int64)

    @classmethod
    def open(cls, roots: Sequence[Path]) -> "Collection":
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

    def describe(self, sample_id: int) -> str:
        """Return the words that name a sample in an error."""
        which, row = self.locate(np.array([sample_id]))
        return self.sets[int(which[0])].describe(int(row[0]))


def labelled_pair(bank: Path, queries: Path) -> tuple[ShardSet, ShardSet]:
    """Open a labelled training set and a labelled test set that agree on their classes.

    Raises:
        DataError: one has no labels, one class only, or other classes than the other.
    """
    opened = ShardSet(bank), ShardSet(queries)
    for one in opened:
        if len(one.manifest.classes) < 2:
            raise DataError(
                f"{one.root} has {len(one.manifest.classes)} classes; an accuracy needs two or "
                "more: pack a folder with one subfolder a class."
            )
    first, second = (one.manifest.classes for one in opened)
    if first != second:
        odd = sorted(set(first) ^ set(second))[:5] or ["the same names in another order"]
        raise DataError(
            f"{bank} and {queries} differ in their classes ({', '.join(odd)}): pack the second "
            "with --like the first."
        )
    return opened
