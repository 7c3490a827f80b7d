"""Packing a source: shuffle, check, tar, index, tables, manifest."""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from itertools import groupby
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
from PIL import __version__ as pillow_version

from fastmoco import __version__
from fastmoco.core.files import resumed_folder
from fastmoco.dataset.manifest import FORMAT_VERSION, Manifest
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.dedupe import without_duplicates
from fastmoco.pack.finalize import first, write_tables
from fastmoco.pack.levels import SAMPLE, Span, judge
from fastmoco.pack.options import PackOptions, reject_limit
from fastmoco.pack.parallel import ordered_map
from fastmoco.pack.shard_layout import Schedule, divided
from fastmoco.pack.shard_writer import Journal
from fastmoco.pack.sources import open_sources
from fastmoco.pack.sources.base import Reject, Source, refuse_lost_class
from fastmoco.pack.worker import Fragment, make_fragment

SHOWN_REJECTS = 3
_SCRATCH = ".runs-"
Progress = Callable[[int, int], None]  # images done, their total


def pack(
    source: Path, out: Path, options: PackOptions, on_progress: Progress | None = None
) -> dict[str, Manifest]:
    """Pack a source into a new shard set, or into one for each of its splits.

    Args:
        source: a folder, an archive or another source of images.
        out: the set's folder, or that of the splits' folders; appears when everything in it is
            whole. After an interruption the same call goes on where the last one was stopped.
        options: see `PackOptions`.
        on_progress: called with the number of images done and their total.

    Returns:
        The manifest of each split; "" for a source without splits.

    Raises:
        UsageError: `source` is missing or `out` exists.
        DataError: nothing sound to pack, too many unfit images, or a failure to write.
    """
    return pack_sources(sources_for(source, out, options), out, options, on_progress)


def sources_for(source: Path, out: Path, options: PackOptions) -> dict[str, Source]:
    """Open a source, once it is sure that its sets can be written to `out`.

    Raises:
        UsageError: `source` is missing, or `out` exists or lies inside of it.
        DataError: nothing sound to pack.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already: remove it or choose another name.")
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies inside {source}: choose a place outside of it.")
    return open_sources(
        source,
        options.format,
        options.unlabelled,
        _get_classes(options.like),
        options.classes_at,
        options.root,
    )


def _get_classes(like: Path | None) -> list[str] | None:
    if like is None:
        return None
    classes = ShardSet(like).manifest.classes
    if not classes:
        raise UsageError(f"--like {like}: that set has no labels; name one that has, or drop it.")
    return classes


def pack_sources(
    sources: dict[str, Source],
    out: Path,
    options: PackOptions,
    on_progress: Progress | None = None,
) -> dict[str, Manifest]:
    """Pack sources that are open; see `pack`. The same input gives the same bytes."""
    rejects = _Rejects(sources, options)  # before repeated images are left out, which is asked for
    sources = _arranged(sources, options)
    total, done = sum(map(len, sources.values())), 0

    def report(images: int) -> None:
        nonlocal done
        done += images
        if on_progress:
            on_progress(done, total)

    try:
        with resumed_folder(out, _fingerprint(sources, options)) as folder:
            manifests = {
                split: _write_set(folder / split, source, options, rejects, report)
                for split, source in sources.items()
            }
            rejects.refuse_too_many()
            return {split: manifest for split, manifest in manifests.items() if manifest}
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}. Finished shards are kept: the "
            "same command goes on."
        ) from error


def _arranged(sources: dict[str, Source], options: PackOptions) -> dict[str, Source]:
    """Return the sources of the sets that will be written."""
    if options.dedupe:
        unique = without_duplicates(sources, options.rules.max_bytes, options.workers)
        for split, source in sources.items():
            why = "came before, which --dedupe leaves out"
            refuse_lost_class(source.labels, unique[split].labels, source.classes, why)
        sources = unique
    if not options.splits:
        return sources
    if list(sources) != [""]:
        raise UsageError(f"The source has splits of its own ({', '.join(sources)}).")
    parts = divided(sources[""], dict(options.splits), options.seed)
    for name, part in parts.items():
        if not len(part):
            raise UsageError(
                f"--splits: {name} gets no image, for each class is divided by itself: give it a "
                f"larger share, or pack without --splits."
            )
    return parts


def _fingerprint(sources: dict[str, Source], options: PackOptions) -> str:
    """Return a hash of everything that decides what is written."""
    versions = [FORMAT_VERSION, __version__, pillow_version]
    prints = {split: source.fingerprint() for split, source in sources.items()}
    state = json.dumps([versions, options.recorded(), prints])
    return hashlib.sha256(state.encode()).hexdigest()


class _Rejects:
    """What is left out of all sets, and how much of it is put up with.

    Args:
        sources: all that is packed.
        options: hold the limit.
    """

    def __init__(self, sources: Mapping[str, Source], options: PackOptions) -> None:
        total = sum(len(source) + len(source.left_out) for source in sources.values())
        self.limit = reject_limit(options.max_rejects, total)
        self.total, self.count = total, 0
        self.first: list[Reject] = []
        for source in sources.values():
            self.add(source.left_out)

    def add(self, rejects: Sequence[Reject]) -> None:
        """Count what is left out."""
        self.count += len(rejects)
        self.first += rejects[: SHOWN_REJECTS - len(self.first)]

    @property
    def too_many(self) -> bool:
        """Whether there are more than are put up with."""
        return self.count > self.limit

    def refuse_too_many(self) -> None:
        """Stop if there are too many, once all are counted.

        Raises:
            DataError: with the number that would pass.
        """
        if self.too_many:
            raise DataError(
                f"{self.count} of {self.total} images would be left out, more than {self.limit}, "
                f"so nothing was packed: --max-rejects {self.count} puts up with them. The first:"
                f"{first(self.first)}"
            )


def _write_set(
    folder: Path,
    source: Source,
    options: PackOptions,
    rejects: _Rejects,
    report: Callable[[int], None],
) -> Manifest | None:
    """Write a set; or only count what would be left out, once that is too much."""
    if (folder / "manifest.json").exists():  # of an attempt that was stopped in another split
        report(len(source))
        manifest = ShardSet(folder).manifest
        rejects.count += manifest.rejected - len(source.left_out)
        return manifest
    folder.mkdir(exist_ok=True)
    schedule = Schedule(source, options.seed, options.shard_mb * 10**6, options.rules)
    journal = Journal(folder, options.gray)
    unfit = _Unfit(schedule, rejects)
    spans: list[Span] = []
    missing = []
    for shard in range(schedule.shards):
        record = journal.finished(shard)
        if record is None:
            missing.append(shard)
            continue
        report(schedule.bounds[shard + 1] - schedule.bounds[shard])
        unfit.add(record.rejects)
        spans += record.spans
    _clear(folder)
    with (
        # Workers outlive a killed attempt for a moment. In a folder of its own what they still
        # write meets nothing of this attempt's.
        TemporaryDirectory(prefix=_SCRATCH, dir=folder) as scratch,
        closing(
            ordered_map(
                make_fragment,
                (run for shard in missing for run in schedule.runs(shard, Path(scratch))),
                options.workers,
            )
        ) as fragments,
    ):
        watched = _watched(fragments, unfit, report)
        if options.levels is None:
            watched = _judged(watched, spans)
        try:
            for shard, its_fragments in groupby(watched, key=lambda fragment: fragment.shard):
                journal.write(shard, its_fragments)
        except _TooManyRejects:
            unfit.refuse_lost_class()
            return None
    _clear(folder)
    unfit.refuse_lost_class()
    return write_tables(folder, schedule, journal, options)


def _clear(folder: Path) -> None:
    """Remove what attempts that were killed have left."""
    for left in folder.glob(f"{_SCRATCH}*"):
        shutil.rmtree(left, ignore_errors=True)


class _Unfit:
    """The images of one set that are left out because they cannot be stored."""

    def __init__(self, schedule: Schedule, rejects: _Rejects) -> None:
        self.schedule, self.rejects = schedule, rejects
        self.found: list[tuple[int, str]] = []

    def add(self, found: Sequence[tuple[int, str]]) -> None:
        """Note images by their positions, with the reasons."""
        self.found += found
        self.rejects.add([Reject(self.schedule.name_at(p), reason) for p, reason in found])

    def refuse_lost_class(self) -> None:
        """Refuse a set without a class that its source has: no number would tell of it.

        Raises:
            DataError: all images of a class are unfit.
        """
        source = self.schedule.source
        if len(self.found) == len(source):  # told as such
            return
        labels = source.labels[self.schedule.order[[position for position, _ in self.found]]]
        lost = np.bincount(labels[labels >= 0], minlength=len(source.classes))
        there = np.bincount(source.labels[source.labels >= 0], minlength=len(source.classes))
        for number in np.flatnonzero((there > 0) & (lost == there)).tolist():
            its = [pair for pair, label in zip(self.found, labels, strict=True) if label == number]
            named = [Reject(self.schedule.name_at(p), reason) for p, reason in its]
            raise DataError(
                f"All {there[number]} images of the class {source.classes[number]} would be left "
                f"out: mend them, or take the class out of the source. The first:{first(named)}"
            )


class _TooManyRejects(Exception):
    """No set will be written: raised once all of its images are checked."""


def _watched(
    fragments: Iterable[Fragment], unfit: _Unfit, report: Callable[[int], None]
) -> Iterator[Fragment]:
    """Pass fragments on while the rejects are few enough; then only count them to the end."""
    for fragment in fragments:
        unfit.add(fragment.rejects)
        report(fragment.count)
        if unfit.rejects.too_many:
            os.unlink(fragment.tar)
        else:
            yield fragment
    if unfit.rejects.too_many:
        raise _TooManyRejects


def _judged(fragments: Iterator[Fragment], spans: list[Span]) -> Iterator[Fragment]:
    """Pass fragments on unless the set's images of more than 8 bits need levels.

    Args:
        fragments: of the shards to be made.
        spans: of the finished shards; those of the fragments are added until they are enough.
    """
    for fragment in fragments:
        if len(spans) < SAMPLE:
            spans += fragment.spans
            if len(spans) >= SAMPLE:
                judge(spans[:SAMPLE])
        yield fragment
    if len(spans) < SAMPLE:
        judge(spans)
