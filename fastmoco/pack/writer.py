"""Writing a shard set: shuffle, check, tar, index, tables, manifest."""

import hashlib
import json
import math
import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack, closing, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError, UsageError
from fastmoco.files import new_folder, sha256_of, write_json
from fastmoco.pack.check import Checked
from fastmoco.pack.parallel import check_files
from fastmoco.pack.sources import Reject, Source, by_name, find_images
from fastmoco.shardset import FORMAT_VERSION, SAMPLE_DTYPE, Manifest, Shard, set_id_of

TAR_BLOCK = 512
TAR_RECORD = 10240  # a tar is padded to a multiple of this, after two empty blocks


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        seed: of the global shuffle.
        unlabelled: ignore the folder layout and store no labels.
        like: a set whose classes the source must have.
        shard_mb: the size that no shard exceeds, in MB of 10^6 bytes, unless one image does.
        min_side: the smallest height and width allowed, in pixels.
        workers: processes that decode; the bytes written do not depend on it.
        max_rejects: the number of unfit images above which nothing is packed;
            by default 1 % of the images, and at least 10.
    """

    seed: int = 0
    unlabelled: bool = False
    like: Path | None = None
    shard_mb: int = 128
    min_side: int = 1
    workers: int = 1
    max_rejects: int | None = None

    def recorded(self) -> dict[str, Any]:
        """Return the options that decide what is written."""
        names = ("seed", "unlabelled", "shard_mb", "min_side")
        return {name: value for name, value in asdict(self).items() if name in names}


def pack(
    source: Path,
    out: Path,
    options: PackOptions,
    on_progress: Callable[[int, int], None] | None = None,
) -> Manifest:
    """Pack the images of a folder into a new shard set. The same input gives the same bytes.

    Args:
        source: a class folder or a flat folder of images.
        out: the set's folder; appears when the set is whole, not before.
        options: see `PackOptions`.
        on_progress: called with the number of images done and their total.

    Returns:
        The manifest as written.

    Raises:
        UsageError: `source` is missing or `out` exists.
        DataError: nothing sound to pack, too many unfit images, or a failure to write.
    """
    if os.path.lexists(out):
        raise UsageError(f"{out} exists already: remove it or choose another name.")
    if source.resolve() in out.resolve().parents:
        raise UsageError(f"{out} lies inside {source}: choose a place outside of it.")
    found = find_images(source, options.unlabelled, options.like)
    try:
        with new_folder(out) as folder:
            return _write_set(folder, found, options, on_progress)
    except OSError as error:
        raise DataError(f"{out} cannot be written: {error.strerror or error}.") from error


def shuffled(count: int, seed: int) -> npt.NDArray[np.int64]:
    """Return a permutation of 0..count-1 that is the same for ever.

    Sorting a raw stream is what numpy promises never to change; `Generator.permutation` is not.
    """
    return np.argsort(np.random.Philox(key=seed).random_raw(count), kind="stable")


def _write_set(
    folder: Path,
    found: Source,
    options: PackOptions,
    on_progress: Callable[[int, int], None] | None,
) -> Manifest:
    order = shuffled(len(found.names), options.seed).tolist()
    names = [found.names[i] for i in order]
    limit = max(10, len(names) // 100) if options.max_rejects is None else options.max_rejects
    rejects: list[Reject] = []
    with ExitStack() as stack:
        results = check_files(found.root, names, options.workers, options.min_side)
        stack.enter_context(closing(results))
        writer = stack.enter_context(_SetWriter(folder, len(names), options.shard_mb * 10**6))
        for done, (index, result) in enumerate(zip(order, results, strict=True), 1):
            if isinstance(result, Checked):
                writer.add(found.names[index], found.labels[index], result)
            else:
                rejects.append(Reject(found.names[index], result))
                _refuse_many(rejects, limit)
            if on_progress:
                on_progress(done, len(names))
    return writer.finish(found, rejects, options)


def _refuse_many(rejects: list[Reject], limit: int) -> None:
    if len(rejects) > limit:
        raise DataError(
            f"More than {limit} images are unfit, nothing was packed "
            f"(--max-rejects allows more). The first:{_first(rejects)}"
        )


def _first(rejects: list[Reject]) -> str:
    return "".join(f"\n  {name!r} {reason}" for name, reason in rejects[:3])


class _ShardWriter:
    """Tar shards of bounded size, each with its index."""

    def __init__(self, folder: Path, limit: int) -> None:
        self.folder = folder
        self.limit = limit
        self.shards: list[Shard] = []
        self._file: BinaryIO | None = None
        self._index: list[str] = []

    def add(self, key: str, components: Mapping[str, bytes]) -> dict[str, int]:
        """Store the components of a sample; return the offset of each one's bytes."""
        if self._file is not None and self._would_overflow(components):
            self.close()
        if self._file is None:
            self._open()
        offsets = self._offsets(components)
        self._tar.write({"__key__": key, **components})
        parts = [
            f"{ext} {offset} {len(components[ext])} {key}.{ext}" for ext, offset in offsets.items()
        ]
        self._index.append(" ".join(parts))
        return offsets

    def _would_overflow(self, components: Mapping[str, bytes]) -> bool:
        size = sum(TAR_BLOCK + _padded(len(content)) for content in components.values())
        end = self._tar.tarstream.offset + size + 2 * TAR_BLOCK
        return _padded(end, TAR_RECORD) > self.limit

    def _open(self) -> None:
        from webdataset.writer import TarWriter  # pulls in torch, which workers must not load

        self._file = (self.folder / f"{self._stem}.tar").open("wb")
        # An integer time keeps the PAX headers away, and a constant keeps the bytes the same.
        self._tar = TarWriter(self._file, encoder=False, mtime=0)

    @property
    def _stem(self) -> str:
        return f"shard-{len(self.shards):06d}"

    def _offsets(self, components: Mapping[str, bytes]) -> dict[str, int]:
        at = self._tar.tarstream.offset
        offsets = {}
        for ext in sorted(components):  # the order in which TarWriter writes them
            offsets[ext] = at + TAR_BLOCK
            at = offsets[ext] + _padded(len(components[ext]))
        return offsets

    def close(self) -> None:
        """Finish the open shard, if there is one."""
        if self._file is None:
            return
        self._tar.close()
        self._file.close()
        self._file = None
        path = self.folder / f"{self._stem}.tar"
        lines = [f"v1.2 {len(self._index)}", *self._index]
        path.with_suffix(".idx").write_text("\n".join(lines) + "\n")
        self.shards.append(
            Shard(
                name=path.name,
                samples=len(self._index),
                bytes=path.stat().st_size,
                sha256=sha256_of(path),
            )
        )
        self._index = []

    def discard(self) -> None:
        """Let go of the open shard of a set that will not be finished, be the disk full or not."""
        if self._file is not None:
            with suppress(OSError):
                self._tar.close()
            with suppress(OSError):
                self._file.close()


def _padded(size: int, unit: int = TAR_BLOCK) -> int:
    return -(-size // unit) * unit


class _SetWriter:
    """A set in the making: shards, tables and sums grow image by image."""

    def __init__(self, folder: Path, capacity: int, shard_bytes: int) -> None:
        self.folder = folder
        self.rows: npt.NDArray[np.void] = np.zeros(capacity, dtype=SAMPLE_DTYPE)
        self.name_offsets = np.zeros(capacity + 1, dtype=np.uint64)
        self.count = 0
        self.progressive = 0
        self.pixels = 0
        self.sums = [0, 0, 0]
        self.squares = [0, 0, 0]
        self.shards = _ShardWriter(folder, shard_bytes)

    def __enter__(self) -> "_SetWriter":
        self.names = (self.folder / "names.txt").open("wb")
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.names.close()
        if kind is None:
            self.shards.close()
        else:
            self.shards.discard()

    def add(self, name: str, label: int, image: Checked) -> None:
        """Store one image as the next sample."""
        components = {image.extension: image.content}
        if label >= 0:
            components["cls"] = str(label).encode()
        offset = self.shards.add(f"{self.count:08d}", components)[image.extension]
        # Little-endian, as the table is: the stored bytes are those of the digest.
        digest = int.from_bytes(hashlib.sha256(image.content).digest()[:8], "little")
        size, shard = len(image.content), len(self.shards.shards)
        row = (offset, digest, size, shard, label, image.height, image.width)
        self.rows[self.count] = row
        self.names.write(os.fsencode(name) + b"\n")
        self.count += 1
        self.name_offsets[self.count] = self.names.tell()
        self._sum_up(image)

    def _sum_up(self, image: Checked) -> None:
        self.progressive += image.progressive
        self.pixels += image.height * image.width
        self.sums = [a + b for a, b in zip(self.sums, image.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, image.squares, strict=True)]

    def finish(self, found: Source, rejects: list[Reject], options: PackOptions) -> Manifest:
        """Write tables, rejects and, last, the manifest."""
        if not self.count:
            raise DataError(f"None of the images is fit. The first:{_first(rejects)}")
        rows = self.rows[: self.count]
        np.save(self.folder / "samples.npy", rows)
        np.save(self.folder / "names.idx.npy", self.name_offsets[: self.count + 1])
        rejects = sorted(rejects + found.left_out, key=by_name)
        lines = [json.dumps(reject._asdict()) + "\n" for reject in rejects]
        (self.folder / "rejects.jsonl").write_text("".join(lines))
        manifest = self._manifest(rows, found.classes, len(rejects), options)
        write_json(self.folder / "manifest.json", manifest.model_dump())
        return manifest

    def _manifest(
        self, rows: npt.NDArray[np.void], classes: list[str], rejected: int, options: PackOptions
    ) -> Manifest:
        labels = rows["label"] if classes else np.zeros(0, dtype=np.int32)
        return Manifest(
            format_version=FORMAT_VERSION,
            set_id=set_id_of(self.shards.shards, rows),
            samples=self.count,
            rejected=rejected,
            progressive=self.progressive,
            classes=classes,
            class_counts=np.bincount(labels, minlength=len(classes)).tolist(),
            mean=[total / (255 * self.pixels) for total in self.sums],
            std=[self._deviation(s, q) for s, q in zip(self.sums, self.squares, strict=True)],
            options=options.recorded(),
            shards=self.shards.shards,
        )

    def _deviation(self, total: int, squares: int) -> float:
        # Whole numbers up to the root: nothing cancels.
        return math.sqrt(self.pixels * squares - total**2) / (255 * self.pixels)
