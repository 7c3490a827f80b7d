"""Packing a source: shuffle, check, tar, index, tables, manifest."""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing
from itertools import groupby
from pathlib import Path

from PIL import __version__ as pillow_version

from fastmoco import __version__
from fastmoco.errors import DataError, UsageError
from fastmoco.files import resumed_folder
from fastmoco.pack.duplicates import without_duplicates
from fastmoco.pack.fragment import Fragment, make_fragment
from fastmoco.pack.journal import Journal
from fastmoco.pack.levels import SAMPLE, Span, judge
from fastmoco.pack.options import PackOptions
from fastmoco.pack.parallel import ordered_map
from fastmoco.pack.schedule import Schedule, divided
from fastmoco.pack.sources import open_sources
from fastmoco.pack.sources.base import Reject, Source
from fastmoco.pack.tables import first, write_tables
from fastmoco.shardset import FORMAT_VERSION, Manifest, ShardSet

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
    like = ShardSet(options.like).manifest.classes if options.like else None
    return open_sources(source, options.format, options.unlabelled, like, options.root)


def pack_sources(
    sources: dict[str, Source],
    out: Path,
    options: PackOptions,
    on_progress: Progress | None = None,
) -> dict[str, Manifest]:
    """Pack sources that are open; see `pack`. The same input gives the same bytes."""
    sources = _arranged(sources, options)
    total, done = sum(map(len, sources.values())), 0

    def report(images: int) -> None:
        nonlocal done
        done += images
        if on_progress:
            on_progress(done, total)

    try:
        with resumed_folder(out, _fingerprint(sources, options)) as folder:
            return {
                split: _write_set(folder / split, source, options, report)
                for split, source in sources.items()
            }
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}. Finished shards are kept: the "
            "same command goes on."
        ) from error


def _arranged(sources: dict[str, Source], options: PackOptions) -> dict[str, Source]:
    """Return the sources of the sets that will be written."""
    if options.dedupe:
        sources = without_duplicates(sources, options.rules.max_bytes, options.workers)
    if not options.splits:
        return sources
    if list(sources) != [""]:
        raise UsageError(f"The source has splits of its own ({', '.join(sources)}).")
    return divided(sources[""], dict(options.splits), options.seed)


def _fingerprint(sources: dict[str, Source], options: PackOptions) -> str:
    """Return a hash of everything that decides what is written."""
    versions = [FORMAT_VERSION, __version__, pillow_version]
    prints = {split: source.fingerprint() for split, source in sources.items()}
    state = json.dumps([versions, options.recorded(), prints])
    return hashlib.sha256(state.encode()).hexdigest()


def _write_set(
    folder: Path, source: Source, options: PackOptions, report: Callable[[int], None]
) -> Manifest:
    if (folder / "manifest.json").exists():  # of an attempt that was stopped in another split
        report(len(source))
        return ShardSet(folder).manifest
    folder.mkdir(exist_ok=True)
    for left in folder.glob(".run-*"):  # by an attempt that was killed
        left.unlink()
    schedule = Schedule(source, options.seed, options.shard_mb * 10**6, options.rules)
    journal = Journal(folder)
    rejects: list[Reject] = []
    missing = []
    for shard in range(schedule.shards):
        record = journal.finished(shard)
        if record is None:
            missing.append(shard)
            continue
        report(schedule.bounds[shard + 1] - schedule.bounds[shard])
        rejects += [Reject(schedule.name_at(p), reason) for p, reason in record.rejects]
    runs = (run for shard in missing for run in schedule.runs(shard, folder))
    with closing(ordered_map(make_fragment, runs, options.workers)) as fragments:
        watched = _watched(fragments, schedule, rejects, options.max_rejects, report)
        if options.levels is None:
            watched = _judged(watched)
        for shard, its_fragments in groupby(watched, key=lambda fragment: fragment.shard):
            journal.write(shard, its_fragments)
    return write_tables(folder, schedule, journal, options)


def _watched(
    fragments: Iterable[Fragment],
    schedule: Schedule,
    rejects: list[Reject],
    limit: int | None,
    report: Callable[[int], None],
) -> Iterator[Fragment]:
    """Pass fragments on while the rejects are few enough."""
    limit = max(10, len(schedule.source) // 100) if limit is None else limit
    for fragment in fragments:
        rejects += [Reject(schedule.name_at(p), reason) for p, reason in fragment.rejects]
        if len(rejects) > limit:
            raise DataError(
                f"More than {limit} images are unfit, nothing was packed (--max-rejects allows "
                f"more). The first:{first(rejects)}"
            )
        report(fragment.count)
        yield fragment


def _judged(fragments: Iterator[Fragment]) -> Iterator[Fragment]:
    """Pass fragments on unless their images of more than 8 bits need levels."""
    spans: list[Span] = []
    for fragment in fragments:
        if len(spans) < SAMPLE:
            spans += fragment.spans
            if len(spans) >= SAMPLE:
                judge(spans)
        yield fragment
    judge(spans[:SAMPLE])
