"""The tables and the manifest of a set, made when its last shard is finished."""

import json
import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.files import write_json
from fastmoco.pack.fragment import Totals
from fastmoco.pack.journal import Journal, ShardRecord
from fastmoco.pack.options import PackOptions
from fastmoco.pack.schedule import Schedule
from fastmoco.pack.sources.base import Reject, by_name
from fastmoco.shardset import FORMAT_VERSION, Manifest, set_id_of


def write_tables(
    folder: Path, schedule: Schedule, journal: Journal, options: PackOptions
) -> Manifest:
    """Write samples, names, rejects and, last, the manifest of a set whose shards are finished.

    Raises:
        DataError: no image was fit.
    """
    records = [journal.read(number) for number in range(schedule.shards)]
    filled = [record for record in records if len(record.rows)]
    if not filled:
        raise DataError(
            f"None of the images is fit. The first:{first(_rejects(schedule, records))}"
        )
    for record in records:
        if not len(record.rows):  # stock readers do not expect a shard without samples
            (folder / record.shard.name).unlink()
            (folder / record.shard.name).with_suffix(".idx").unlink()
    rows = np.concatenate([record.rows for record in filled])
    rows["shard"] = np.repeat(np.arange(len(filled)), [len(record.rows) for record in filled])
    np.save(folder / "samples.npy", rows)
    _write_names(folder, schedule, filled)
    rejects = sorted(_rejects(schedule, records) + schedule.source.left_out, key=by_name)
    lines = [json.dumps(reject._asdict()) + "\n" for reject in rejects]
    (folder / "rejects.jsonl").write_text("".join(lines))
    manifest = _manifest(rows, schedule.source.classes, filled, len(rejects), options)
    write_json(folder / "manifest.json", manifest.model_dump())
    for number in range(schedule.shards):
        journal.forget(number)
    return manifest


def first(rejects: Sequence[Reject]) -> str:
    """Return the first three rejects as lines of an error."""
    return "".join(f"\n  {name!r} {reason}" for name, reason in rejects[:3])


def _rejects(schedule: Schedule, records: Sequence[ShardRecord]) -> list[Reject]:
    return [
        Reject(schedule.name_at(position), reason)
        for record in records
        for position, reason in record.rejects
    ]


def _write_names(folder: Path, schedule: Schedule, records: Sequence[ShardRecord]) -> None:
    offsets = [0]
    with (folder / "names.txt").open("wb") as stream:
        for record in records:
            for position in record.positions.tolist():
                stream.write(os.fsencode(schedule.name_at(position)) + b"\n")
                offsets.append(stream.tell())
    np.save(folder / "names.idx.npy", np.array(offsets, dtype=np.uint64))


def _manifest(
    rows: npt.NDArray[np.void],
    classes: list[str],
    records: Sequence[ShardRecord],
    rejected: int,
    options: PackOptions,
) -> Manifest:
    totals = Totals()
    for record in records:
        totals.add(record.totals)
    shards = [record.shard for record in records]
    labels = rows["label"][rows["label"] >= 0] if classes else np.zeros(0, dtype=np.int32)
    mean, std = totals.mean_and_deviation()
    return Manifest(
        format_version=FORMAT_VERSION,
        set_id=set_id_of(shards, rows),
        samples=len(rows),
        rejected=rejected,
        progressive=totals.progressive,
        classes=classes,
        class_counts=np.bincount(labels, minlength=len(classes)).tolist(),
        mean=mean,
        std=std,
        options=options.recorded(),
        shards=shards,
    )
