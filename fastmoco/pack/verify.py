"""`fastmoco verify`: is a set what its manifest says, down to every image?"""

import json
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.core.files import hash_file
from fastmoco.dataset.dali_index import index_path, read_header
from fastmoco.dataset.manifest import (
    CHUNK,
    HASHED,
    MANIFEST,
    Shard,
    count_classes,
    hash_set,
    manifest_sha256,
)
from fastmoco.dataset.shard_set import SAMPLE_DTYPE, ShardSet, read_labels
from fastmoco.errors import DataError
from fastmoco.pack.adopt import ADOPTED
from fastmoco.pack.parallel import mapped
from fastmoco.pack.shardcheck import (
    TABLE,
    Fault,
    ShardTask,
    check_shard,
    lost_rows,
)


@dataclass(frozen=True)
class Finding:
    """One defect.

    Attributes:
        file: in the folder of the set.
        what: in words.
        sample: the id of the sample that it is about, if it is about one.
        name: the original name of that sample.
    """

    file: str
    what: str
    sample: int | None = None
    name: str | None = None

    def __str__(self) -> str:
        file = self.file if self.file.isprintable() else repr(self.file)
        about = "" if self.sample is None else f"sample {self.sample} ({self.name!r}): "
        return f"{file}: {about}{self.what}"


def verify(
    root: Path,
    full: bool,
    on_progress: Callable[[int, int], None] | None = None,
    workers: int = 1,
) -> list[Finding]:
    """Return the defects of a set, one a defect; an empty list if there are none.

    Args:
        root: the set.
        full: also read every byte and decode every image; without it, sizes and counts.
        on_progress: called with the samples checked and their total, when `full`.
        workers: processes that decode, when `full`.

    Raises:
        DataError: there is no manifest that can be read, or a worker was killed.
    """
    shard_set = ShardSet(root, check=False)
    samples, names = _sample_table(shard_set), _name_table(shard_set)
    sizes = _sizes(shard_set, sound=not samples)
    indexes = _indexes(shard_set)
    deep: list[Finding] = []
    if full:
        checks = _Full(shard_set, set(indexes), not samples, not names)
        deep = [*checks.of_shards(on_progress, workers), *checks.of_tables()]
        for number in checks.swapped & set(sizes):  # of one defect, the better word
            del sizes[number]
    found = [*samples, *names, *_rejects(shard_set), *sizes.values(), *_extras(shard_set)]
    found += [*indexes.values(), *deep, *_label_tables(shard_set)]
    told = {finding.file for finding in found}
    return [*found, *(one for one in _changed(shard_set, full) if one.file not in told)]


def unhashed(root: Path) -> list[str]:
    """Return the files of a set that have no hash, because an older version wrote them."""
    shard_set = ShardSet(root, check=False)
    known = shard_set.manifest.sha256
    tables = (shard_set.root / "labels").glob("*.json")
    older = sorted(f"labels/{path.stem}.npy" for path in tables if "sha256" not in _json(path))
    return [*(name for name in (MANIFEST, *HASHED) if name not in known), *older]


def _json(path: Path) -> Any:
    return json.loads(path.read_bytes())


def _changed(shard_set: ShardSet, full: bool) -> Iterator[Finding]:
    """Yield the tables whose bytes are not those of the manifest, and the manifest if changed."""
    hashes = shard_set.manifest.sha256
    if not hashes:  # of an older set
        return
    found = {MANIFEST: manifest_sha256(_json(shard_set.root / MANIFEST))}
    if full:
        present = (name for name in HASHED if (shard_set.root / name).is_file())
        found |= {name: hash_file(shard_set.root / name) for name in present}
    for name, digest in found.items():
        if hashes.get(name) != digest:
            yield Finding(name, "its SHA-256 has changed")


def _sample_table(shard_set: ShardSet) -> list[Finding]:
    """Return what is wrong with the table that the shards are held against."""
    found = []
    total = sum(shard.samples for shard in shard_set.manifest.shards)
    if total != len(shard_set):
        what = f"says {len(shard_set)} samples, its shards have {total}"
        found.append(Finding("manifest.json", what))
    try:
        _ = shard_set.samples
    except DataError as error:
        found.append(Finding(TABLE, str(error)))
    return found


def _name_table(shard_set: ShardSet) -> list[Finding]:
    file = "names.idx.npy"
    try:
        end = int(shard_set.name_offsets[-1])
        file = "names.txt"
        size = len(shard_set.name_bytes)
    except DataError as error:
        return [Finding(file, str(error))]
    what = f"has {size} bytes, not {end}, where its index ends"
    return [] if end == size else [Finding("names.txt", what)]


def _rejects(shard_set: ShardSet) -> list[Finding]:
    path, wanted = shard_set.root / "rejects.jsonl", shard_set.manifest.rejected
    try:
        with path.open("rb") as lines:
            count = sum(1 for _ in lines)
    except OSError as error:
        return [Finding(path.name, f"cannot be read ({error.strerror})")]
    what = f"has {count} lines, the manifest says {wanted}"
    return [] if count == wanted else [Finding(path.name, what)]


def _sizes(shard_set: ShardSet, sound: bool) -> dict[int, Finding]:
    """Return what is wrong with the sizes of shards, by their number."""
    found, first = {}, 0
    for number, shard in enumerate(shard_set.manifest.shards):
        fault = shard_set.size_fault(shard)
        if fault:
            lost = _lost(shard_set, shard, first) if sound else []
            found[number] = _size_finding(shard_set, shard, fault, lost)
        first += shard.samples
    return found


def _lost(shard_set: ShardSet, shard: Shard, first: int) -> list[int]:
    """Return the ids of the samples that a shard no longer holds."""
    path = shard_set.root / shard.name
    size = path.stat().st_size if path.is_file() else 0
    rows = shard_set.samples[first : first + shard.samples]
    lost: list[int] = (first + lost_rows(rows, size)).tolist()
    return lost


def _size_finding(shard_set: ShardSet, shard: Shard, fault: str, lost: list[int]) -> Finding:
    if not lost:
        return Finding(shard.name, f"{fault}; all its samples are there")
    what = f"{fault}; {len(lost)} of its {shard.samples} samples are lost, this is the first"
    return Finding(shard.name, what, lost[0], _name(shard_set, lost[0]))


def _name(shard_set: ShardSet, row: int) -> str | None:
    try:
        return shard_set.get_name(row)
    except (DataError, IndexError, ValueError):  # the names may be damaged too
        return None


def _extras(shard_set: ShardSet) -> list[Finding]:
    known = {shard.name for shard in shard_set.manifest.shards}
    extra = sorted(path.name for path in shard_set.root.glob("[!.]*.tar") if path.name not in known)
    return [Finding(name, "is not part of the set") for name in extra]


def _indexes(shard_set: ShardSet) -> dict[int, Finding]:
    """Return what is wrong with the number of lines of indexes, by the number of the shard."""
    found = {}
    for number, shard in enumerate(shard_set.manifest.shards):
        path = index_path(shard_set.root / shard.name)
        what = _index_fault(path, shard.samples)
        if what:
            found[number] = Finding(path.name, what)
    return found


def _index_fault(path: Path, samples: int) -> str | None:
    try:
        with path.open("rb") as stream:
            header, lines = read_header(stream), sum(1 for _ in stream)
    except FileNotFoundError:
        return "is missing"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    if header is None:
        return "does not begin with `v1.2 N`"
    if (header, lines) != (samples, samples):
        return f"has {lines} lines and says {header}, the shard has {samples} samples"
    return None


def _label_tables(shard_set: ShardSet) -> list[Finding]:
    found = []
    paths = (shard_set.root / "labels").glob("[!.]*.*")
    tables = {path.with_suffix(".npy") for path in paths if path.suffix in (".npy", ".json")}
    for path in sorted(tables):
        try:
            read_labels(shard_set, path)
        except DataError as error:
            found.append(Finding(f"labels/{path.name}", str(error)))
    return found


class _Full:
    """The check of every byte.

    Args:
        shard_set: opened without a check.
        bad_indexes: numbers of the shards whose index has the wrong number of lines.
        sound: whether the table of samples can be held against the shards.
        named: whether the names can be read.

    Attributes:
        swapped: numbers of the shards that have the content of another one.
    """

    def __init__(
        self, shard_set: ShardSet, bad_indexes: set[int], sound: bool, named: bool
    ) -> None:
        self.set, self.bad_indexes, self.sound, self.named = shard_set, bad_indexes, sound, named
        self.swapped: set[int] = set()
        self.shards = shard_set.manifest.shards
        self.starts = np.cumsum([0, *(shard.samples for shard in self.shards)])
        self.owners = {shard.sha256: shard.name for shard in self.shards}
        self.table_is_wrong = False

    def of_shards(
        self, on_progress: Callable[[int, int], None] | None, workers: int
    ) -> Iterator[Finding]:
        """Yield the defects of shards and indexes, and of the table where it fits no shard."""
        numbers = [n for n, s in enumerate(self.shards) if (self.set.root / s.name).is_file()]
        done = 0
        with closing(mapped(check_shard, map(self._task, numbers), workers)) as reports:
            for number, report in zip(numbers, reports, strict=True):
                yield from self._findings(number, *report)
                done += self.shards[number].samples
                if on_progress:
                    on_progress(done, len(self.set))

    def _task(self, number: int) -> ShardTask:
        shard = self.shards[number]
        rows = np.zeros(0, SAMPLE_DTYPE)
        if self.sound:
            rows = np.array(self.set.samples[self.starts[number] : self.starts[number + 1]])
        return ShardTask(
            path=self.set.root / shard.name,
            bytes=shard.bytes,
            sha256=shard.sha256,
            rows=rows,
            holds_labels=not self.set.manifest.options.get(ADOPTED),
            check_index=self.sound and number not in self.bad_indexes,
        )

    def _findings(self, number: int, digest: str, faults: list[Fault]) -> list[Finding]:
        shard = self.shards[number]
        owner = self.owners.get(digest)
        if owner and digest != shard.sha256:  # two shards may rightly be equal
            self.swapped.add(number)
            what = f"has the content of {owner}: the shards were swapped or copied"
            return [Finding(shard.name, what)]
        return [self._finding(number, fault) for fault in faults]

    def _finding(self, number: int, fault: Fault) -> Finding:
        self.table_is_wrong |= fault.file == TABLE
        if fault.row is None:
            return Finding(fault.file, fault.what)
        row = int(self.starts[number]) + fault.row
        return Finding(fault.file, fault.what, row, _name(self.set, row))

    def of_tables(self) -> Iterator[Finding]:
        """Yield the defects of the tables in themselves; call it after `of_shards`."""
        if self.named:
            for start in range(0, len(self.set), CHUNK):
                yield from self._name_faults(start, min(CHUNK, len(self.set) - start))
        if self.sound:
            for start in range(0, len(self.set), CHUNK):
                yield from self._row_faults(start)
            if not self.table_is_wrong:  # else the sums below must differ
                yield from self._sums()

    def _name_faults(self, start: int, count: int) -> Iterator[Finding]:
        ends = self.set.name_offsets[start : start + count + 1].astype(np.int64)
        if (start == 0 and ends[0] != 0) or (np.diff(ends) < 1).any():
            yield Finding("names.idx.npy", f"does not ascend, in rows {start} to {start + count}")
        elif ends[-1] <= len(self.set.name_bytes):
            wrong = np.flatnonzero(self.set.name_bytes[ends[1:] - 1] != ord("\n"))
            if len(wrong):
                yield Finding("names.txt", f"has no line feed behind name {start + wrong[0]}")

    def _row_faults(self, start: int) -> Iterator[Finding]:
        rows = self.set.samples[start : start + CHUNK]
        wanted = np.searchsorted(self.starts, np.arange(start, start + len(rows)), "right") - 1
        labels, classes = rows["label"], len(self.set.manifest.classes)
        for wrong, what in (
            (rows["shard"] != wanted, "says another shard than its own"),
            ((labels < -1) | (labels >= classes), "has a label that is no class"),
        ):
            if wrong.any():
                self.table_is_wrong = True
                row = start + int(wrong.argmax())
                others = f"; so {wrong.sum()} rows" if wrong.sum() > 1 else ""
                yield Finding(TABLE, what + others, row, _name(self.set, row))

    def _sums(self) -> Iterator[Finding]:
        """Yield what sums over the table alone can tell, such as a label of an adopted set."""
        manifest = self.set.manifest
        counts = count_classes(self.set.samples["label"], len(manifest.classes))
        if counts != manifest.class_counts:
            yield Finding("manifest.json", f"its class counts are not those of {TABLE}")
        elif hash_set(self.shards, self.set.samples, manifest.format_version) != manifest.set_id:
            what = f"its set_id does not fit its shards and {TABLE}: one of them was changed"
            yield Finding("manifest.json", what)
