"""The only code that touches storage: image bytes by sample id, through pread.

A shard that shrinks under a memory map kills the process (SIGBUS); a short pread is an error that
can be named.
"""

import errno
import os
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import lru_cache
from importlib import import_module

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import hash_bytes
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DataError

READERS = 16  # images that are read at the same time: at 1 ms each, 16,000 a second
_OPEN_SHARDS = 256  # at most: well under the usual limit of 1,024 open files
_JPEG = b"\xff\xd8"  # what one begins with
_LOOKED_AT = 100  # rows of the table, to know the usual size of an image

Place = tuple[int, int, int, int, int]
"""Of an image: number of the set, shard, offset, size and hash."""
Images = list[npt.NDArray[np.uint8]]


class CorruptSamples(Exception):
    """Samples that were damaged after packing.

    Attributes:
        ids: which ones.
    """

    def __init__(self, ids: list[int]) -> None:
        super().__init__(f"samples {ids} cannot be read")
        self.ids = ids


class _Shard:
    """An open shard; the descriptor closes when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Reader:
    """Reads the stored bytes of samples."""

    def __init__(self, data: ConcatShardSets) -> None:
        self.data = data
        self._open = lru_cache(maxsize=_most_open())(self._opened)

    def fetch(self, ids: npt.NDArray[np.int64], pool: ThreadPoolExecutor | None = None) -> Images:
        """Return the encoded image of each id as a uint8 array.

        Args:
            ids: (n,) int64.
            pool: of `READERS` threads, which share the reading; None: no threads.

        Raises:
            CorruptSamples: a shard is missing or cut short, or the bytes are not what was packed.
            DataError: no more files may be opened.
        """
        places = self._places(ids)
        if pool:
            each = -(-len(places) // READERS)
            chunks = [places[i : i + each] for i in range(0, len(places), each)]
            found = [image for part in pool.map(self._read_all, chunks) for image in part]
        else:
            found = self._read_all(places)
        images = [image for image in found if image is not None]
        if len(images) < len(found):
            raise CorruptSamples(ids[[image is None for image in found]].tolist())
        return images

    def holds_large_jpegs(self) -> bool:
        """Return whether the images are JPEGs of the area of 128 x 128 pixels and more.

        Told by the first image of each set, and by the mean area of some that lie evenly.
        """
        firsts = self._read_all(self._places(self.data.starts[:-1]))
        if any(image is None or image[:2].tobytes() != _JPEG for image in firsts):
            return False
        rows = self.data.rows(np.linspace(0, len(self.data) - 1, _LOOKED_AT).astype(np.int64))
        return bool(np.mean(rows["height"].astype(float) * rows["width"]) >= 128**2)

    def _places(self, ids: npt.NDArray[np.int64]) -> list[Place]:
        rows = self.data.rows(ids)
        columns = (rows[name].tolist() for name in ("shard", "offset", "size", "hash"))
        return list(zip(self.data.locate(ids)[0].tolist(), *columns, strict=True))

    def _read_all(self, places: Sequence[Place]) -> list[npt.NDArray[np.uint8] | None]:
        return [self._read(*place) for place in places]

    def _opened(self, number: int, shard: int) -> _Shard:
        owner = self.data.sets[number]
        return _Shard(f"{owner.root}/{owner.manifest.shards[shard].name}")

    def _read(
        self, number: int, shard: int, offset: int, size: int, packed: int
    ) -> npt.NDArray[np.uint8] | None:
        try:
            opened = self._open(number, shard)  # held, lest another thread close it
            content = np.empty(size, np.uint8)
            if os.preadv(opened.descriptor, [content.data], offset) < size:
                return None
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing about the shard
                raise DataError(
                    "Too many files are open: allow more by `ulimit -n 1024`, in this shell."
                ) from error
            return None
        # Before a decoder sees them: DALI fails a whole batch for one image, does not say which,
        # and may crash on what is no image. It takes 50 us for 100 kB, on a thread of the pool.
        return content if hash_bytes(content.data) == packed else None


def _most_open() -> int:
    """Return how many shards may be open: a quarter of the files that the process may open."""
    try:
        resource = import_module("resource")
    except ImportError:  # there is none on Windows
        return _OPEN_SHARDS
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_SHARDS if allowed < 0 else max(1, min(_OPEN_SHARDS, allowed // 4))
