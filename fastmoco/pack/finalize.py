"""The tables and the manifest of a set, made when its last shard is finished."""

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.dali_index import index_path
from fastmoco.dataset.manifest import (
    FORMAT_VERSION,
    GRAY_VERSION,
    Manifest,
    Shard,
    count_classes,
    hash_set,
    write_manifest,
)
from fastmoco.dataset.shard_set import SAMPLE_DTYPE
from fastmoco.errors import DataError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.shard_layout import Schedule
from fastmoco.pack.shard_writer import Journal, ShardRecord
from fastmoco.pack.sources.base import Reject, by_name
from fastmoco.pack.worker import ChannelStats

_OFFSET_DTYPE = np.dtype("<u8")  # of names.idx.npy


def write_tables(
    folder: Path, schedule: Schedule, journal: Journal, options: PackOptions
) -> Manifest:
    """Write samples, names, rejects and, last, the manifest of a set whose shards are finished.

    The records are read shard by shard, twice: no table need fit into memory.

    Raises:
        DataError: no image was fit.
    """
    if not any(record.shard.samples for record in _records(schedule, journal)):
        rejects = (r for record in _records(schedule, journal) for r in _rejects(schedule, record))
        raise DataError(f"None of the images is fit. The first:{first(list(islice(rejects, 3)))}")
    left_out = list(schedule.source.left_out)
    with new_tables(folder, options.gray) as tables:
        for record in _records(schedule, journal):
            left_out += _rejects(schedule, record)
            if not len(record.rows):  # stock readers do not expect a shard without samples
                (folder / record.shard.name).unlink()
                index_path(folder / record.shard.name).unlink()
                continue
            names = (os.fsencode(schedule.name_at(p)) for p in record.positions.tolist())
            tables.add(record.shard, record.rows, names, record.totals)
        for reject in sorted(left_out, key=by_name):
            tables.reject(*reject)
    manifest = tables.write_manifest(schedule.source.classes, options.recorded())
    for number in range(schedule.shards):
        journal.forget(number)
    return manifest


def first(rejects: Sequence[Reject]) -> str:
    """Return the first three rejects as lines of an error."""
    return "".join(f"\n  {name!r} {reason}" for name, reason in rejects[:3])


def _records(schedule: Schedule, journal: Journal) -> Iterator[ShardRecord]:
    return map(journal.read, range(schedule.shards))


def _rejects(schedule: Schedule, record: ShardRecord) -> list[Reject]:
    return [Reject(schedule.name_at(position), reason) for position, reason in record.rejects]


class Tables:
    """The tables of a set in the making, and what goes into its manifest.

    They grow on the disk, for a set may have more rows than fit into memory. See `new_tables`.

    Attributes:
        shards: those added.
        samples, rejected: how many there are.
        totals: over the samples.
    """

    def __init__(
        self,
        folder: Path,
        gray: bool,
        rows: BinaryIO,
        names: BinaryIO,
        ends: BinaryIO,
        rejects: TextIO,
    ) -> None:
        self.folder, self.gray = folder, gray
        self._rows, self._names, self._ends, self._rejects = rows, names, ends, rejects
        self.shards: list[Shard] = []
        self.samples = self.rejected = 0
        self.totals = ChannelStats.of(gray)
        self._end = np.uint64(0)  # of names.txt
        ends.write(self._end.tobytes())

    def add(
        self,
        shard: Shard,
        rows: npt.NDArray[np.void],
        names: Iterable[bytes],
        totals: ChannelStats,
    ) -> None:
        """Write the rows of the next shard, whose number they are given, and their names."""
        rows["shard"] = len(self.shards)
        self._rows.write(rows.tobytes())
        lines = (name + b"\n" for name in names)
        lengths = np.fromiter(map(self._names.write, lines), _OFFSET_DTYPE, len(rows))
        ends = self._end + lengths.cumsum(dtype=_OFFSET_DTYPE)
        self._end = ends[-1] if len(ends) else self._end
        self._ends.write(ends.tobytes())
        self.shards.append(shard)
        self.samples += len(rows)
        self.totals.add(totals)

    def reject(self, name: str, reason: str) -> None:
        """Write down an input that is left out."""
        self._rejects.write(json.dumps({"name": name, "reason": reason}) + "\n")
        self.rejected += 1

    def write_manifest(self, classes: list[str], options: dict[str, Any]) -> Manifest:
        """Write the manifest, once the tables are closed."""
        rows = np.load(self.folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        mean, std = self.totals.mean_and_deviation()
        version = GRAY_VERSION if self.gray else FORMAT_VERSION
        manifest = Manifest(
            format_version=version,
            set_id=hash_set(self.shards, rows, version),
            samples=self.samples,
            rejected=self.rejected,
            progressive=self.totals.progressive,
            classes=classes,
            class_counts=count_classes(rows["label"], len(classes)),
            mean=mean,
            std=std,
            channels=1 if self.gray else 3,
            bits=16 if self.totals.deep else 8,
            options=options,
            shards=self.shards,
        )
        return write_manifest(self.folder, manifest)


@contextmanager
def new_tables(folder: Path, gray: bool = False) -> Iterator[Tables]:
    """Yield the tables of a set in a folder, of one channel if gray, open for writing."""
    with (
        _growing_array(folder / "samples.npy", SAMPLE_DTYPE) as rows,
        _growing_array(folder / "names.idx.npy", _OFFSET_DTYPE) as ends,
        (folder / "names.txt").open("wb") as names,
        (folder / "rejects.jsonl").open("w", encoding="ascii") as rejects,
    ):
        yield Tables(folder, gray, rows, names, ends, rejects)


@contextmanager
def _growing_array(path: Path, dtype: np.dtype[Any]) -> Iterator[BinaryIO]:
    """Yield a `.npy` file to which the bytes of rows are written; it learns their number last."""
    with path.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (0,)})
        start = stream.tell()
        yield stream
        rows = (stream.tell() - start) // dtype.itemsize
        # In place: numpy leaves room in every header for any number of rows.
        stream.seek(0)
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (rows,)})
