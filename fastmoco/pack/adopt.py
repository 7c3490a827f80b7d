"""`fastmoco index`: tar shards that others wrote (webdataset, img2dataset), adopted in place.

Tables, indexes and manifest are made beside the shards, of which no byte is touched. An image is a
sample if the training decoder reads its bytes as they are; what would have to be re-encoded is left
out and listed. Rotated by EXIF, an image is kept: training reads it as it is stored, and the
manifest says how many there are.
"""

import json
import os
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from fastmoco.dataset.classes import Found, Known
from fastmoco.dataset.dali_index import index_path
from fastmoco.dataset.manifest import CHUNK, Manifest, Shard, count_classes
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.finalize import new_tables
from fastmoco.pack.foreign import BESIDE, Adopted, AdoptTask, adopt_shard
from fastmoco.pack.options import reject_limit
from fastmoco.pack.parallel import mapped
from fastmoco.pack.place import link, new, place, told
from fastmoco.pack.sources.tree import is_training
from fastmoco.pack.sources.webdataset import get_splits

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
        try:
            Shard(name=shard.name, samples=0, bytes=0, sha256="")
        except ValidationError as error:
            raise UsageError(f"{shard.name!r} cannot be the name of a shard: rename it.") from error
    return shards


class _Labels:
    """The labels as they are written in the shards, as codes until all of them are known.

    Attributes:
        seen: the codes of all labels, those of unfit images included.
    """

    def __init__(self, classes: Sequence[str]) -> None:
        self._known, self._found = Known(classes, by_place=True), Found()
        self.seen: set[int] = set()

    def encode(self, path: Path, found: Adopted) -> None:
        """Give the rows of a shard their codes.

        Raises:
            DataError: it has a label that is no class.
        """
        codes = [self._code(path, value) for value in found.values]
        self.seen.update(codes)
        labelled = found.rows["label"] >= 0
        found.rows["label"][labelled] = np.array(codes)[found.rows["label"][labelled]]

    def _code(self, path: Path, value: str) -> int:
        if not self._known.names:
            return self._found.code(value)
        code = self._known.code(value)
        if code is None:
            count = len(self._known.names)
            raise DataError(f"{path} has the label {value!r}, which is none of {count} classes.")
        return code

    def decode(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the label of each code, (codes,), and the class names."""
        if self._known.names:
            return np.arange(len(self._known.names), dtype=np.int32), self._known.names
        return self._found.as_classes()


def _write_set(
    aside: Path,
    shards: Sequence[Path],
    options: AdoptOptions,
    on_progress: Callable[[int, int], None] | None,
) -> Manifest:
    labels, damaged, rotated, lost = _Labels(options.classes), list[str](), list[str](), 0
    tasks = [AdoptTask(path, options.label_key, options.unlabelled) for path in shards]
    with (
        new_tables(aside) as tables,
        closing(mapped(adopt_shard, tasks, options.workers)) as results,
    ):
        for done, (path, found) in enumerate(zip(shards, results, strict=True), 1):
            damaged += [f"{path.name} {found.damage}"] if found.damage else []
            rotated += found.rotated
            labels.encode(path, found)
            count = len(found.rows)
            shard = Shard(name=path.name, samples=count, bytes=found.size, sha256=found.sha256)
            tables.add(shard, found.rows, found.names, found.totals)
            for name, reason in found.rejects:
                tables.reject(name, reason)
                lost += reason != BESIDE
            index_path(aside / path.name).write_bytes(found.index)
            if on_progress:
                on_progress(done, len(shards))
    if damaged:
        named = "".join(f"\n  {what}" for what in damaged[:_SHOWN])
        raise DataError(
            f"{len(damaged)} shard(s) are damaged; fetch them again, or move them away. "
            f"The first:{named}"
        )
    _refuse_losses(aside, tables.samples, lost, options, shards[0].parent)
    classes = _number_labels(aside, labels, options.label_key, shards[0].parent)
    recorded = {
        ADOPTED: True,
        "label_key": options.label_key,
        "unlabelled": options.unlabelled,
        "rotated": len(rotated),
        # A manifest is UTF-8, names of members need not be.
        "rotated_first": [name.encode("utf-8", "replace").decode() for name in rotated[:_SHOWN]],
    }
    return tables.write_manifest(classes, recorded)


def _refuse_losses(
    aside: Path, samples: int, lost: int, options: AdoptOptions, folder: Path
) -> None:
    limit = reject_limit(options.max_rejects, samples + lost)
    if samples and lost <= limit:
        return
    with (aside / "rejects.jsonl").open() as lines:
        rejects = [json.loads(line) for line in islice(lines, _SHOWN)]
    first = "".join(f"\n  {reject['name']!r} {reject['reason']}" for reject in rejects)
    if not samples:
        raise DataError(f"The shards hold no image that can be read in place.{first}")
    raise DataError(
        f"{lost} of {samples + lost} images would be left out, more than {limit}, so nothing was "
        f"adopted: --max-rejects {lost} puts up with them; fastmoco shard {folder} OUT "
        f"re-encodes what can be read. The first:{first}"
    )


def _number_labels(aside: Path, labels: _Labels, key: str | None, folder: Path) -> list[str]:
    """Put labels in the place of codes in the table; return the class names."""
    rows = np.load(aside / "samples.npy", mmap_mode="r+", allow_pickle=False)
    numbers, classes = labels.decode()
    final = np.append(numbers, np.int32(-1))  # code -1, the last one, stays -1
    for start in range(0, len(rows), CHUNK):
        rows["label"][start : start + CHUNK] = final[rows["label"][start : start + CHUNK]]
    counts = count_classes(rows["label"], len(classes))
    if key and not any(counts):
        raise DataError(
            f"No sample has a label in the field {key!r} of its JSON: name another "
            "one by --label-key, or pass --unlabelled."
        )
    gone = sorted({int(numbers[code]) for code in labels.seen if not counts[numbers[code]]})
    if gone:
        raise DataError(
            f"All images of the class {classes[gone[0]]} would be left out: "
            f"fastmoco shard {folder} OUT re-encodes what can be read."
        )
    return classes
