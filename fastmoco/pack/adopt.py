"""`fastmoco index`: tar shards that others wrote (webdataset, img2dataset), adopted in place.

Tables, indexes and manifest are made beside the shards, of which no byte is touched. An image is a
sample if the training decoder reads its bytes as they are; what would have to be re-encoded is left
out and listed. Rotated by EXIF, an image is kept: training reads it as it is stored, and the
manifest says how many there are.
"""

import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from fastmoco.dataset.classes import Found, Known
from fastmoco.dataset.dali_index import index_path
from fastmoco.dataset.manifest import (
    CHUNK,
    FORMAT_VERSION,
    Manifest,
    Shard,
    hash_set,
    write_manifest,
)
from fastmoco.dataset.shard_set import SAMPLE_DTYPE
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.finalize import OFFSET_DTYPE, growing_array
from fastmoco.pack.foreign import BESIDE, Adopted, AdoptTask, adopt_shard
from fastmoco.pack.options import reject_limit
from fastmoco.pack.parallel import mapped
from fastmoco.pack.place import link, new, place, told
from fastmoco.pack.sources.tree import is_training
from fastmoco.pack.sources.webdataset import get_splits
from fastmoco.pack.worker import ChannelStats

ADOPTED = "adopted"  # the option that marks such a set
_COMPRESSED = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".tar.zst")
_SHOWN = 5


@dataclass(frozen=True)
class AdoptOptions:
    """How to adopt.

    Attributes:
        label_key: a field of the samples' JSON that is their label; None: their `.cls` member.
        unlabelled: store no labels.
        classes: the names of the labels 0, 1, ...; by default the values that occur, and for
            whole numbers all from 0 to the largest.
        workers: processes that decode; what is written does not depend on it.
        max_rejects: the number of images left out above which nothing is adopted; by default 1 %
            of the images, and at least 10.
    """

    label_key: str | None = None
    unlabelled: bool = False
    classes: tuple[str, ...] = ()
    workers: int = 1
    max_rejects: int | None = None


def adopt(
    folder: Path,
    out: Path | None = None,
    options: AdoptOptions = AdoptOptions(),
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Make a shard set of a folder of tars.

    Args:
        folder: holds `*.tar`; those in subfolders do not count.
        out: a new folder for the set, in which links stand for the shards; None: `folder` itself.
        options: see `AdoptOptions`.
        on_progress: called with the shards done and their total.

    Returns:
        The manifest as written. Its options tell that the set was adopted, and how many images
        are rotated by EXIF, with the names of the first.

    Raises:
        UsageError: no tars there, a set already, files in the way, or shards of several splits.
        DataError: a shard is damaged or compressed, or too little in them is fit.
    """
    shards = _shards(folder)
    splits = get_splits(shards)
    if len(splits) > 1:
        held = ", ".join(f"{split} {len(mine)}" for split, mine in splits.items())
        raise UsageError(
            f"{folder} holds shards of several splits ({held}), and a set is one of them: "
            f"--out DIR makes a set of each, {', '.join(f'DIR/{split}' for split in splits)}."
        )
    with told(out or folder), place(folder, out, shards) as aside:
        return _write_set(aside, shards, options, on_progress)


def adopt_each(
    folder: Path,
    out: Path | None = None,
    options: AdoptOptions = AdoptOptions(),
    on_progress: Callable[[int, int], None] | None = None,
) -> dict[str, Manifest]:
    """Make a shard set of each split that the names of the shards say; see `adopt`.

    The classes are those of the first split to train on.

    Returns:
        The manifests, by split; "" without splits.
    """
    splits = get_splits(_shards(folder))
    if len(splits) == 1 or out is None:
        return {"": adopt(folder, out, options, on_progress)}
    manifests: dict[str, Manifest] = {}
    with told(out), new(out) as aside:
        for split in sorted(splits, key=lambda split: not is_training(split)):
            (aside / split).mkdir()
            link(splits[split], aside / split)
            found = _write_set(aside / split, splits[split], options, on_progress)
            manifests[split] = found
            options = replace(options, classes=options.classes or tuple(found.classes))
    return manifests


def _shards(folder: Path) -> list[Path]:
    if not folder.is_dir():
        raise UsageError(f"{folder} is not a folder.")
    if (folder / "manifest.json").exists():
        raise UsageError(f"{folder} is a shard set already: it has a manifest.json.")
    compressed = sorted(p.name for p in folder.iterdir() if p.name.endswith(_COMPRESSED))
    if compressed:
        raise DataError(
            f"{folder} has compressed shards ({', '.join(compressed[:3])}), whose images cannot "
            "be read in place: decompress them first (gzip -d, zstd -d)."
        )
    tars = (path for path in folder.glob("[!.]*.tar") if path.is_file())
    shards = sorted(tars, key=lambda path: os.fsencode(path.name))
    if not shards:
        raise UsageError(f"{folder} holds no *.tar: name the folder that holds the shards.")
    for shard in shards:
        _refuse_name(shard.name)
    return shards


def _refuse_name(name: str) -> None:
    try:
        Shard(name=name, samples=0, bytes=0, sha256="")
    except ValidationError as error:
        raise UsageError(f"{name!r} cannot be the name of a shard: rename it.") from error


@dataclass
class _Gathered:
    """What the shards have told so far, beside what is in the tables.

    Attributes:
        known: the classes that were given, if any.
        values: the labels in the shards, and their codes in the table, if none were.
        labelled: whether any sample has a label.
        rotated: names of the first images that EXIF rotates.
        rotations: their number.
        damaged: what is wrong with shards that cannot be used.
        seen: the codes of all labels, those of unfit images included.
    """

    known: Known
    values: Found = field(default_factory=Found)
    labelled: bool = False
    shards: list[Shard] = field(default_factory=list)
    totals: ChannelStats = field(default_factory=ChannelStats)
    rotated: list[str] = field(default_factory=list)
    rotations: int = 0
    damaged: list[str] = field(default_factory=list)
    seen: set[int] = field(default_factory=set)

    def add(self, path: Path, found: Adopted) -> None:
        """Note a shard.

        Raises:
            DataError: it has a label that is no class.
        """
        if found.damage:
            self.damaged.append(f"{path.name} {found.damage}")
        self.shards.append(_entry(path, found))
        self.totals.add(found.totals)
        self.rotations += len(found.rotated)
        self.rotated += found.rotated[: _SHOWN - len(self.rotated)]
        codes = [self._code(path, value) for value in found.values]
        self.seen.update(codes)
        labelled = found.rows["label"] >= 0
        self.labelled |= bool(labelled.any())
        found.rows["label"][labelled] = np.array(codes)[found.rows["label"][labelled]]
        found.rows["shard"] = len(self.shards) - 1

    def _code(self, path: Path, value: str) -> int:
        if not self.known.names:
            return self.values.code(value)
        code = self.known.code(value)
        if code is None:
            count = len(self.known.names)
            raise DataError(f"{path} has the label {value!r}, which is none of {count} classes.")
        return code

    def labels(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the label of each code in the table, and the class names."""
        if self.known.names:
            return np.arange(len(self.known.names), dtype=np.int32), self.known.names
        return self.values.as_classes()


def _entry(path: Path, found: Adopted) -> Shard:
    return Shard(name=path.name, samples=len(found.rows), bytes=found.size, sha256=found.sha256)


class _Tables:
    """The tables in the making; they grow shard by shard on the disk, not in memory."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.samples = self.rejected = self.lost = 0  # the lost are those rejects that count
        self._end = np.uint64(0)  # of names.txt

    def __enter__(self) -> "_Tables":
        with ExitStack() as stack:
            self._rows, self._ends, self._names, self._rejects = (
                stack.enter_context((self.folder / name).open("wb"))
                for name in (".rows", ".ends", "names.txt", "rejects.jsonl")
            )
            self._open = stack.pop_all()
        self._ends.write(np.zeros(1, np.uint64).tobytes())
        return self

    def __exit__(self, *_: object) -> None:
        self._open.close()

    def add(self, path: Path, found: Adopted) -> None:
        """Write what was found in a shard."""
        self._rows.write(found.rows.tobytes())
        lengths = np.array([len(name) + 1 for name in found.names], dtype=np.uint64)
        ends = self._end + lengths.cumsum(dtype=np.uint64)
        self._end = np.uint64(self._end + lengths.sum(dtype=np.uint64))
        self._ends.write(ends.tobytes())
        self._names.write(b"".join(name + b"\n" for name in found.names))
        for name, reason in found.rejects:
            line = json.dumps({"name": name, "reason": reason}) + "\n"
            self._rejects.write(line.encode())
        self.samples += len(found.rows)
        self.rejected += len(found.rejects)
        self.lost += sum(reason != BESIDE for _, reason in found.rejects)
        header = f"v1.2 {len(found.rows)}\n".encode()
        index_path(self.folder / path.name).write_bytes(header + found.index)

    def finish(self, labels: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        """Make the tables of the rows and the names; return the samples of each label.

        Args:
            labels: (codes,) the label of each code.
        """
        counts = np.zeros(int(labels.max(initial=-1)) + 1, dtype=np.int64)
        final = np.append(labels, np.int32(-1))  # code -1, the last one, stays -1
        with growing_array(self.folder / "samples.npy", SAMPLE_DTYPE, self.samples) as stream:
            for rows in _stored(self.folder / ".rows", SAMPLE_DTYPE):
                rows["label"] = final[rows["label"]]
                counts += np.bincount(rows["label"][rows["label"] >= 0], minlength=len(counts))
                stream.write(rows.tobytes())
        with growing_array(self.folder / "names.idx.npy", OFFSET_DTYPE, self.samples + 1) as stream:
            for part in _stored(self.folder / ".ends", OFFSET_DTYPE):
                stream.write(part.tobytes())
        return counts


def _stored(path: Path, dtype: np.dtype[Any]) -> Iterator[npt.NDArray[Any]]:
    """Yield what was stored in a file of rows, part by part, and remove it."""
    with path.open("rb") as stream:
        while content := stream.read(CHUNK * dtype.itemsize):
            yield np.frombuffer(bytearray(content), dtype)
    path.unlink()


def _write_set(
    aside: Path,
    shards: Sequence[Path],
    options: AdoptOptions,
    on_progress: Callable[[int, int], None] | None,
) -> Manifest:
    tasks = [AdoptTask(path, options.label_key, options.unlabelled) for path in shards]
    gathered = _Gathered(Known(options.classes, by_place=True))
    with _Tables(aside) as tables, closing(mapped(adopt_shard, tasks, options.workers)) as results:
        for done, (path, found) in enumerate(zip(shards, results, strict=True), 1):
            gathered.add(path, found)
            tables.add(path, found)
            if on_progress:
                on_progress(done, len(shards))
    _refuse_unusable(gathered, tables, options, shards[0].parent)
    if options.label_key and not gathered.labelled:
        raise DataError(
            f"No sample has a label in the field {options.label_key!r} of its JSON: name another "
            "one by --label-key, or pass --unlabelled."
        )
    labels, classes = gathered.labels()
    counts = tables.finish(labels)
    there = set(np.flatnonzero(counts).tolist())
    gone = sorted({int(labels[code]) for code in gathered.seen} - there)
    if gone:
        raise DataError(
            f"All images of the class {classes[gone[0]]} would be left out: "
            f"fastmoco shard {shards[0].parent} OUT re-encodes what can be read."
        )
    return write_manifest(aside, _manifest(aside, gathered, tables, classes, counts, options))


def _refuse_unusable(
    gathered: _Gathered, tables: _Tables, options: AdoptOptions, folder: Path
) -> None:
    if gathered.damaged:
        named = "".join(f"\n  {what}" for what in gathered.damaged[:_SHOWN])
        raise DataError(
            f"{len(gathered.damaged)} shard(s) are damaged; fetch them again, or move them away. "
            f"The first:{named}"
        )
    total = tables.samples + tables.lost
    limit = reject_limit(options.max_rejects, total)
    if tables.samples and tables.lost <= limit:
        return
    with (tables.folder / "rejects.jsonl").open() as lines:
        rejects = [json.loads(line) for line in islice(lines, _SHOWN)]
    first = "".join(f"\n  {reject['name']!r} {reject['reason']}" for reject in rejects)
    if not tables.samples:
        raise DataError(f"The shards hold no image that can be read in place.{first}")
    raise DataError(
        f"{tables.lost} of {total} images would be left out, more than {limit}, so nothing was "
        f"adopted: --max-rejects {tables.lost} puts up with them; fastmoco shard {folder} OUT "
        f"re-encodes what can be read. The first:{first}"
    )


def _manifest(
    aside: Path,
    gathered: _Gathered,
    tables: _Tables,
    classes: list[str],
    counts: npt.NDArray[np.int64],
    options: AdoptOptions,
) -> Manifest:
    rows = np.load(aside / "samples.npy", mmap_mode="r", allow_pickle=False)
    found = np.zeros(len(classes), dtype=np.int64)
    found[: len(counts)] = counts
    mean, std = gathered.totals.mean_and_deviation()
    return Manifest(
        format_version=FORMAT_VERSION,
        set_id=hash_set(gathered.shards, rows),
        samples=tables.samples,
        rejected=tables.rejected,
        progressive=gathered.totals.progressive,
        classes=classes,
        class_counts=found.tolist(),
        mean=mean,
        std=std,
        options={
            ADOPTED: True,
            "label_key": options.label_key,
            "unlabelled": options.unlabelled,
            "rotated": gathered.rotations,
            "rotated_first": [_readable(name) for name in gathered.rotated],
        },
        shards=gathered.shards,
    )


def _readable(name: str) -> str:
    """Return a name that a manifest can hold, whatever its bytes are."""
    return name.encode("utf-8", "replace").decode()
