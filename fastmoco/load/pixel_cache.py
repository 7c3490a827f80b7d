"""The pixels of a set of small images, decoded once and kept in a file that is mapped into memory.

Decoding a JPEG of 32 x 32 pixels takes as long as drawing a view of it, and reading it nearly so.
The file lies beside the shards, or in a folder that the recipe names, under the id of its set: a
set that was packed anew has another one.
"""

import errno
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fastmoco.core.files import new_file
from fastmoco.core.rng import Ids
from fastmoco.core.terminal import echo, speaks
from fastmoco.dataset.reader import CorruptSamples, Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.load.decode import Pixels, decode
from fastmoco.load.executor import ResidentImages, Settings

_LARGEST = 128 * 128  # pixels of an image whose decoding `auto` does not repeat
_SHARE = 0.5  # of the free disk that `auto` may fill
_CHUNK = 256  # images decoded and written at a time


class PixelCache:
    """Decoded pixels by sample id.

    Args:
        data: the sets.
        pixels: (N, H, W, C) pixels of each, as `decode` gives them.
    """

    def __init__(self, data: ConcatShardSets, pixels: list[Pixels]) -> None:
        self._data = data
        self._files = [one.reshape(-1) for one in pixels]
        self._sizes = np.array([one.shape[1:3] for one in pixels], np.int64)
        self._channels = pixels[0].shape[3]

    def fetch(self, ids: Ids, pool: ThreadPoolExecutor | None = None) -> ResidentImages:
        """Return where the images lie; nothing is read yet."""
        which, rows = self._data.locate(ids)
        sizes = self._sizes[which]
        starts = rows * sizes.prod(axis=1) * self._channels
        return ResidentImages(self._files, which, starts, sizes)


def open_cache(data: ConcatShardSets, settings: Settings, build: bool = True) -> PixelCache | None:
    """Open the decoded pixels of all sets, and decode those that no file holds yet.

    Args:
        data: the sets.
        settings: of the loader.
        build: whether to decode; it takes longer than to look at a part of the images once.

    Returns:
        None, and why in a sentence unless that is usual: images are read and decoded as they come.
    """
    if settings.executor != "fused" or settings.pixels == "decoded":
        return None
    try:
        return PixelCache(data, [_of_set(one, settings, build) for one in data.sets])
    except _Declined as why:
        if speaks() and (why.worth_telling or settings.pixels == "cached"):
            echo(f"decoding images as they come: {why}", err=True)
        return None


class _Declined(Exception):
    def __init__(self, why: str, worth_telling: bool = True) -> None:
        super().__init__(why)
        self.worth_telling = worth_telling


def _of_set(shard_set: ShardSet, settings: Settings, build: bool) -> Pixels:
    rows = shard_set.samples
    height, width = int(rows["height"][0]), int(rows["width"][0])
    if (rows["height"] != height).any() or (rows["width"] != width).any():
        raise _Declined(f"those of {shard_set.root} differ in size (shard --square N)", False)
    if settings.pixels == "auto" and height * width > _LARGEST:
        raise _Declined(f"those of {shard_set.root} are large", False)
    shape = len(shard_set), height, width, shard_set.manifest.channels
    name = f"pixels-{shard_set.manifest.set_id[:16]}.npy"
    folders = [shard_set.root, *([settings.cache] if settings.cache else [])]
    for folder in folders:
        if (found := _mapped(folder / name, shape)) is not None:
            return found
    if not build:
        raise _Declined("no file holds them yet", False)
    problem = ""
    for folder in folders:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with FileLock(folder / f".{name}.lock"):  # of several ranks or runs, one decodes
                found = _mapped(folder / name, shape)
                return (
                    _decoded(folder / name, shard_set, shape, settings) if found is None else found
                )
        except OSError as error:
            problem = f"{folder} cannot hold them ({error.strerror or error})"
    raise _Declined(f"{problem}; runtime.cache=DIR names another folder")


def _mapped(path: Path, shape: tuple[int, ...]) -> Pixels | None:
    """Return a file's pixels, None if it is not there or not whole."""
    try:
        pixels: Pixels = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError):
        return None
    return pixels if pixels.shape == shape and pixels.dtype == _dtype(shape) else None


def _dtype(shape: tuple[int, ...]) -> np.dtype[Any]:
    """Return what `decode` gives images of such a shape in."""
    return np.dtype(np.uint8 if shape[-1] == 3 else np.uint16)


def _decoded(path: Path, shard_set: ShardSet, shape: tuple[int, ...], settings: Settings) -> Pixels:
    """Decode a set into a file, which is whole or not there."""
    dtype, free = _dtype(shape), shutil.disk_usage(path.parent).free
    needed = int(np.prod(shape, dtype=np.int64)) * dtype.itemsize
    if needed > (_SHARE if settings.pixels == "auto" else 1) * free:
        room = f"{free / 1e9:.1f} GB are free, they take {needed / 1e9:.1f}"
        raise OSError(errno.ENOSPC, room)
    if speaks():
        echo(f"decoding {shape[0]:,} images once, into {path} ({needed / 1e9:.2f} GB)", err=True)
    with new_file(path) as aside:
        pixels = np.lib.format.open_memmap(aside, "w+", dtype, shape)
        _reserve(aside, pixels.offset + needed)
        for rows, images in _images(shard_set, shape[1:], settings.threads):
            pixels[rows] = images
        pixels.flush()
    for older in set(path.parent.glob("pixels-*.npy")) - {path}:
        if path.parent == shard_set.root:  # of the set before it was packed anew
            with suppress(OSError):  # Windows keeps what is mapped
                older.unlink()
    found = _mapped(path, shape)
    assert found is not None
    return found


def _reserve(path: Path, size: int) -> None:
    """Take the room at once: on a full disk, a write into mapped memory would kill the process."""
    if not hasattr(os, "posix_fallocate"):  # macOS, Windows
        return
    with path.open("r+b") as file:
        os.posix_fallocate(file.fileno(), 0, size)


def _images(
    shard_set: ShardSet, shape: tuple[int, ...], threads: int
) -> Iterator[tuple[slice, list[Pixels]]]:
    reader, count = Reader(ConcatShardSets([shard_set])), len(shard_set)

    def read(start: int) -> tuple[slice, list[Pixels]]:
        rows = slice(start, min(start + _CHUNK, count))
        ids = np.arange(rows.start, rows.stop)
        images = [decode(encoded, shape[-1]) for encoded in reader.fetch(ids)]
        whole = [image for image in images if image is not None and image.shape == shape]
        if len(whole) < len(images):
            corrupt = [image is None or image.shape != shape for image in images]
            raise CorruptSamples(ids[corrupt].tolist())
        return rows, whole

    with ThreadPoolExecutor(threads) as pool:
        try:
            yield from pool.map(read, range(0, count, _CHUNK))
        except CorruptSamples as failure:
            named = shard_set.describe(failure.ids[0])
            raise _Declined(f"{len(failure.ids)} cannot be decoded, {named} first") from failure
        finally:
            pool.shutdown(cancel_futures=True)
