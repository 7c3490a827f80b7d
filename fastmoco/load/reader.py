"""The only code that touches storage: image bytes by sample id, through pread.

A shard that shrinks under a memory map kills the process (SIGBUS); a short pread is an error that
can be named.
"""

import errno
import os
from functools import lru_cache
from importlib import import_module

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.shardset import Collection

_OPEN_SHARDS = 256  # at most: well under the usual limit of 1,024 open files


class Unfit(Exception):
    """Samples that were damaged after packing.

    Attributes:
        ids: which ones.
        what: cannot be done with them: "read" or "decoded".
    """

    def __init__(self, ids: list[int], what: str) -> None:
        super().__init__(f"samples {ids} cannot be {what}")
        self.ids, self.what = ids, what


class _Shard:
    """An open shard; the descriptor closes when the last reader lets go of it."""

    def __init__(self, path: str) -> None:
        self.descriptor = os.open(path, os.O_RDONLY)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


class Reader:
    """Reads the stored bytes of samples."""

    def __init__(self, data: Collection) -> None:
        self.data = data
        self._open = lru_cache(maxsize=_most_open())(self._opened)

    def fetch(self, ids: npt.NDArray[np.int64]) -> list[npt.NDArray[np.uint8]]:
        """Return the encoded image of each id as a uint8 array.

        Raises:
            Unfit: a shard is missing or shorter than its table says.
            DataError: no more files may be opened.
        """
        rows = self.data.rows(ids)
        columns = (rows[name].tolist() for name in ("shard", "offset", "size"))
        numbers = self.data.locate(ids)[0].tolist()
        found = [self._read(*place) for place in zip(numbers, *columns, strict=True)]
        images = [image for image in found if image is not None]
        if len(images) < len(found):
            raise Unfit(ids[[image is None for image in found]].tolist(), "read")
        return images

    def _opened(self, number: int, shard: int) -> _Shard:
        owner = self.data.sets[number]
        return _Shard(f"{owner.root}/{owner.manifest.shards[shard].name}")

    def _read(
        self, number: int, shard: int, offset: int, size: int
    ) -> npt.NDArray[np.uint8] | None:
        try:
            opened = self._open(number, shard)  # held, lest another thread close it
            content = os.pread(opened.descriptor, size, offset)
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):  # says nothing about the shard
                raise DataError(
                    "Too many files are open: allow more by `ulimit -n 1024`, in this shell."
                ) from error
            return None
        return np.frombuffer(content, dtype=np.uint8) if len(content) == size else None


def _most_open() -> int:
    """Return how many shards may be open: a quarter of the files that the process may open."""
    try:
        resource = import_module("resource")
    except ImportError:  # there is none on Windows
        return _OPEN_SHARDS
    allowed = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    return _OPEN_SHARDS if allowed < 0 else max(1, min(_OPEN_SHARDS, allowed // 4))
