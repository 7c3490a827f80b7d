"""The tables and the manifest of a set, made when its last shard is finished."""

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.manifest import (
    FORMAT_VERSION,
    GRAY_VERSION,
    Manifest,
    Shard,
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

OFFSET_DTYPE = np.dtype("<u8")  # of names.idx.npy


def write_tables(
    folder: Path, schedule: Schedule, journal: Journal, options: PackOptions
) -> Manifest:
    """Write samples, names, rejects and, last, the manifest of a set whose shards are finished.

    The records are read shard by shard, twice: no table need fit into memory.

    Raises:
        DataError: no image was fit.
    """
    samples = sum(record.shard.samples for record in _records(schedule, journal))
    if not samples:
        rejects = (r for record in _records(schedule, journal) for r in _rejects(schedule, record))
        raise DataError(f"None of the images is fit. The first:{first(list(islice(rejects, 3)))}")
    tables = _Tables(folder, schedule, options.gray)
    with (
        growing_array(folder / "samples.npy", SAMPLE_DTYPE, samples) as rows,
        growing_array(folder / "names.idx.npy", OFFSET_DTYPE, samples + 1) as ends,
        (folder / "names.txt").open("wb") as names,
    ):
        ends.write(np.zeros(1, OFFSET_DTYPE).tobytes())
        for record in _records(schedule, journal):
            tables.add(record, rows, names, ends)
    manifest = tables.finish(options)
    for number in range(schedule.shards):
        journal.forget(number)
    return manifest


def first(rejects: Sequence[Reject]) -> str:
    """Return the first three rejects as lines of an error."""
    return "".join(f"\n  {name!r} {reason}" for name, reason in rejects[:3])


@contextmanager
def growing_array(path: Path, dtype: np.dtype[Any], rows: int) -> Iterator[BinaryIO]:
    """Yield a `.npy` file of so many rows that waits for their bytes."""
    with path.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (rows,)})
        yield stream


def _records(schedule: Schedule, journal: Journal) -> Iterator[ShardRecord]:
    return map(journal.read, range(schedule.shards))


def _rejects(schedule: Schedule, record: ShardRecord) -> list[Reject]:
    return [Reject(schedule.name_at(position), reason) for position, reason in record.rejects]


class _Tables:
    """What goes into the manifest, summed while the shards' rows go into the tables."""

    def __init__(self, folder: Path, schedule: Schedule, gray: bool) -> None:
        self.folder, self.schedule = folder, schedule
        self.classes = schedule.source.classes
        self.shards: list[Shard] = []
        self.rejects = list(schedule.source.left_out)
        self.totals = ChannelStats.of(gray)
        self.counts = np.zeros(len(self.classes), dtype=np.int64)
        self._end = np.uint64(0)  # of names.txt

    def add(self, record: ShardRecord, rows: BinaryIO, names: BinaryIO, ends: BinaryIO) -> None:
        """Write the rows of a shard, their names and where these end."""
        self.rejects += _rejects(self.schedule, record)
        if not len(record.rows):  # stock readers do not expect a shard without samples
            (self.folder / record.shard.name).unlink()
            (self.folder / record.shard.name).with_suffix(".idx").unlink()
            return
        record.rows["shard"] = len(self.shards)
        rows.write(record.rows.tobytes())
        self._add_names(record.positions, names, ends)
        self.shards.append(record.shard)
        self.totals.add(record.totals)
        if self.classes:
            labels = record.rows["label"]
            self.counts += np.bincount(labels[labels >= 0], minlength=len(self.counts))

    def _add_names(self, positions: npt.NDArray[np.int64], names: BinaryIO, ends: BinaryIO) -> None:
        lines = (os.fsencode(self.schedule.name_at(p)) + b"\n" for p in positions.tolist())
        lengths = np.fromiter(map(names.write, lines), OFFSET_DTYPE, len(positions))
        found = self._end + lengths.cumsum(dtype=OFFSET_DTYPE)
        self._end = found[-1]
        ends.write(found.tobytes())

    def finish(self, options: PackOptions) -> Manifest:
        """Write the rejects and the manifest."""
        lines = [json.dumps(r._asdict()) + "\n" for r in sorted(self.rejects, key=by_name)]
        (self.folder / "rejects.jsonl").write_text("".join(lines))
        rows = np.load(self.folder / "samples.npy", mmap_mode="r", allow_pickle=False)
        mean, std = self.totals.mean_and_deviation()
        version = GRAY_VERSION if options.gray else FORMAT_VERSION
        manifest = Manifest(
            format_version=version,
            set_id=hash_set(self.shards, rows, version),
            samples=len(rows),
            rejected=len(lines),
            progressive=self.totals.progressive,
            classes=self.classes,
            class_counts=self.counts.tolist(),
            mean=mean,
            std=std,
            channels=1 if options.gray else 3,
            bits=16 if self.totals.deep else 8,
            options=options.recorded(),
            shards=self.shards,
        )
        return write_manifest(self.folder, manifest)
