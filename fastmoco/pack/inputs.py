"""Where the bytes or the pixels of an image lie: what travels to a worker process."""

import hashlib
import os
import struct
import zlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

ZIP_HEADER = 30  # bytes of a local header before its name and extra field
_SIZE_AND_TIME = struct.Struct("<qq")
DEFLATE_TABLES = 1024  # bytes, more than stand before the first ones that are packed
STORED, DEFLATED = 0, 8  # the two ways in which zip members are packed that every tool reads


class Unreadable(Exception):
    """The bytes of one image cannot be had; the message is the reason."""


@dataclass(frozen=True, slots=True)
class File:
    """A file of its own."""

    path: str

    def read(self, limit: int) -> bytes:
        """Return the bytes, at most `limit` of them.

        Raises:
            Unreadable: there are more, or the file cannot be read.
        """
        try:
            # A third of the time of `open`, which counts where images have a kilobyte.
            descriptor = os.open(self.path, os.O_RDONLY)
            try:
                size = min(os.fstat(descriptor).st_size, limit + 1)
                content = os.read(descriptor, size)
            finally:
                os.close(descriptor)
        except OSError as error:
            raise Unreadable(f"cannot be read ({error.strerror})") from error
        if len(content) < size:
            raise Unreadable("cannot be read to its end")
        return _bounded(content, limit)


@dataclass(frozen=True, slots=True)
class Span:
    """A stretch of a larger file: a member of a plain tar."""

    path: str
    offset: int
    size: int

    def read(self, limit: int) -> bytes:
        """Return the bytes; see `File.read`."""
        if self.size > limit:
            raise _too_large(limit)
        content = _stretch(self.path, self.size, self.offset)
        if len(content) != self.size:
            raise Unreadable("is cut off by the end of the archive")
        return content


@dataclass(frozen=True, slots=True)
class Zipped:
    """A member of a zip.

    A worker reads it by its offset: `zipfile` would read the whole directory in every worker.

    Attributes:
        offset: of the local header.
        stored: bytes in the archive.
        size: bytes when unpacked.
        method: STORED or DEFLATED.
        crc: of the unpacked bytes.
    """

    path: str
    offset: int
    stored: int
    size: int
    method: int
    crc: int

    def read(self, limit: int) -> bytes:
        """Return the unpacked bytes; see `File.read`."""
        if max(self.size, self.stored) > limit:
            raise _too_large(limit)
        content = self._packed()
        if self.method == DEFLATED:
            content = _inflated(content, self.size)
        if len(content) != self.size or zlib.crc32(content) != self.crc:
            raise Unreadable("is damaged in the archive")
        return content

    def _packed(self) -> bytes:
        header = _stretch(self.path, ZIP_HEADER, self.offset)
        # The lengths of name and extra field may differ from those in the directory.
        before = ZIP_HEADER + int.from_bytes(header[26:28], "little")
        before += int.from_bytes(header[28:30], "little")
        return _stretch(self.path, self.stored, self.offset + before)

    def start(self, size: int) -> bytes:
        """Return the first bytes of a member, as far as they can be had."""
        deflated = self.method == DEFLATED
        stored = min(self.stored, size + DEFLATE_TABLES if deflated else size)
        try:
            content = replace(self, stored=stored)._packed()
            return _inflated(content, size) if deflated else content
        except Unreadable:
            return b""


@dataclass(frozen=True, slots=True)
class Pixels:
    """An image that was never encoded: (H, W, 3) or (H, W) uint8."""

    array: npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class Held:
    """An encoded image whose bytes travel with it."""

    content: bytes

    def read(self, limit: int) -> bytes:
        """Return the bytes; see `File.read`."""
        return _bounded(self.content, limit)


Input = File | Span | Zipped | Pixels | Held


class Inputs(ABC):
    """The inputs of a source, made one by one: a source may hold millions.

    Attributes:
        sizes: (N,) int64, the bytes of each, or a guess of what will be stored.
    """

    sizes: npt.NDArray[np.int64]

    @abstractmethod
    def __getitem__(self, row: int) -> Input:
        """Return one input."""

    @abstractmethod
    def state(self) -> bytes:
        """Return bytes that differ when what lies behind the inputs has changed."""


class FileInputs(Inputs):
    """Files below a folder.

    Attributes:
        aliases: files that are the same, by links, as one that came before.
    """

    def __init__(self, root: Path, names: Sequence[str]) -> None:
        self.root, self.names = str(root), names
        self.sizes = np.empty(len(names), dtype=np.int64)
        files = np.empty((len(names), 2), dtype=np.uint64)
        digest = hashlib.sha256()
        for row, name in enumerate(names):
            size, changed, *files[row] = _stat(os.path.join(self.root, name))
            self.sizes[row] = size
            digest.update(_SIZE_AND_TIME.pack(size, changed))  # the times are of no other use
        self._state = digest.digest()
        there = files[files[:, 1] > 0]
        self.aliases = len(there) - len(np.unique(there.view("V16")))

    def __getitem__(self, row: int) -> Input:
        return File(os.path.join(self.root, self.names[row]))

    def state(self) -> bytes:
        """See `Inputs`."""
        return self._state


class ArchiveInputs(Inputs):
    """Members of one archive.

    Args:
        path: of the archive.
        kind: `Span` or `Zipped`.
        table: (N, fields) int64: what `kind` takes after the path.
        sizes: (N,) int64.
    """

    def __init__(
        self,
        path: Path,
        kind: type[Span] | type[Zipped],
        table: npt.NDArray[np.int64],
        sizes: npt.NDArray[np.int64],
    ) -> None:
        self.path, self.kind, self.table, self.sizes = path, kind, table, sizes

    def __getitem__(self, row: int) -> Input:
        fields: list[Any] = self.table[row].tolist()
        return self.kind(str(self.path), *fields)

    def state(self) -> bytes:
        """See `Inputs`."""
        return repr(_stat(str(self.path))[:2]).encode() + self.table.tobytes()


class PixelInputs(Inputs):
    """Images of one array.

    Args:
        array: (N, H, W, 3) or (N, H, W) uint8; may be memory-mapped.
        origin: the file behind it.
    """

    def __init__(self, array: npt.NDArray[np.uint8], origin: Path) -> None:
        self.array, self.origin = array, origin
        each = int(np.prod(array.shape[1:]))
        self.sizes = np.full(len(array), each, dtype=np.int64)

    def __getitem__(self, row: int) -> Input:
        return Pixels(np.ascontiguousarray(self.array[row]))

    def state(self) -> bytes:
        """See `Inputs`."""
        return repr((_stat(str(self.origin))[:2], self.array.shape)).encode()


class InputSubset(Inputs):
    """Some of the inputs of another, in a given order."""

    def __init__(self, inputs: Inputs, rows: npt.NDArray[np.int64]) -> None:
        self.inputs, self.rows = inputs, rows
        self.sizes = inputs.sizes[rows]

    def __getitem__(self, row: int) -> Input:
        return self.inputs[int(self.rows[row])]

    def state(self) -> bytes:
        """See `Inputs`."""
        return self.inputs.state() + self.rows.tobytes()


class Concat(Inputs):
    """The inputs of several, one after the other."""

    def __init__(self, parts: Sequence[Inputs]) -> None:
        self.parts = list(parts)
        self.sizes = np.concatenate([part.sizes for part in parts])
        self.starts = np.cumsum([0, *(len(part.sizes) for part in parts)])

    def __getitem__(self, row: int) -> Input:
        part = int(np.searchsorted(self.starts, row, side="right")) - 1
        return self.parts[part][row - int(self.starts[part])]

    def state(self) -> bytes:
        """See `Inputs`."""
        return b"".join(part.state() for part in self.parts)


def _stat(path: str) -> tuple[int, int, int, int]:
    """Return size, time of change, device and number of a file; zeros for one that went away.

    That is for the worker to report.
    """
    try:
        found = os.stat(path)
    except OSError:
        return 0, 0, 0, 0
    return found.st_size, found.st_mtime_ns, found.st_dev, found.st_ino


def _stretch(path: str, size: int, offset: int) -> bytes:
    try:
        with open(path, "rb") as stream:
            return os.pread(stream.fileno(), size, offset)
    except OSError as error:
        raise Unreadable(f"cannot be read ({error.strerror})") from error


def _inflated(content: bytes, size: int) -> bytes:
    try:
        # One byte more than announced: enough to see that the announcement was wrong.
        return zlib.decompressobj(-zlib.MAX_WBITS).decompress(content, size + 1)
    except zlib.error as error:
        raise Unreadable("is damaged in the archive") from error


def _bounded(content: bytes, limit: int) -> bytes:
    if len(content) > limit:
        raise _too_large(limit)
    return content


def _too_large(limit: int) -> Unreadable:
    return Unreadable(f"is larger than {limit / 2**20:g} MiB")
