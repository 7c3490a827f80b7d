"""A zip or a plain tar of images, read in place: nothing is ever extracted."""

import os
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import DEFLATED, STORED, ArchiveInputs, Span, Zipped
from fastmoco.pack.sources.base import Names, Reject, Source, by_name
from fastmoco.pack.sources.layout import SUFFIX, first_folder, sources_by_layout

COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"(\xb5/\xfd": "zstd -d",
}
TAR_BLOCK = 512
MAX_INFLATION = 1032  # of deflate
MAX_HEADER = 2**20  # bytes; real headers, long names included, take some thousand


class Members:
    """The images found in an archive, in any order: millions, hence no objects.

    Args:
        path: of the archive.
        kind: of their inputs.
    """

    def __init__(self, path: Path, kind: type[Span] | type[Zipped]) -> None:
        self.path, self.kind = path, kind
        self.names, self.left_out = Names(), list[Reject]()
        self._sizes, self._fields = array("q"), array("q")

    def add(self, name: str, size: int, *fields: int) -> None:
        """Add an image; `fields` are what `kind` takes after the path."""
        self.names.add(name)
        self._sizes.append(size)
        self._fields.extend(fields)

    def in_order(self) -> tuple[npt.NDArray[np.int64], Names, ArchiveInputs]:
        """Return the rows in the order of the names' bytes, the names and the inputs so sorted."""
        order = np.array(self.names.sorted_rows(), dtype=np.int64)
        fields = len(self._fields) // max(1, len(order))
        table = np.array(self._fields, dtype=np.int64).reshape(len(order), fields)[order]
        sizes = np.array(self._sizes, dtype=np.int64)[order]
        return order, self.names.pick(order), ArchiveInputs(self.path, self.kind, table, sizes)


def open_zip(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """List the images of a zip; see `open_folder`. One folder around all of them does not count.

    Raises:
        DataError: not a sound zip, no images, or a layout that does not give sound labels.
    """
    members = Members(path, Zipped)
    try:
        with zipfile.ZipFile(path) as archive:
            for info in archive.infolist():
                if info.is_dir() or is_hidden(info.filename):
                    continue
                reason = _why_not_zipped(info, path.stat().st_size)
                if reason:
                    members.left_out.append(Reject(info.filename, reason))
                    continue
                members.add(
                    info.filename,
                    info.file_size,
                    info.header_offset,
                    info.compress_size,
                    info.file_size,
                    info.compress_type,
                    info.CRC,
                )
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a zip: {error}.") from error
    return _sources(members, unlabelled)


def open_tar(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """List the images of a plain tar; see `open_zip`.

    Raises:
        DataError: a compressed or damaged tar, no images, or a layout without sound labels.
    """
    refuse_compressed(path)
    members = Members(path, Span)
    try:
        for info in tar_members(path):
            if info.isdir() or is_hidden(info.name):
                continue
            reason = why_not_tarred(info)
            if reason:
                members.left_out.append(Reject(info.name, reason))
            else:
                members.add(info.name, info.size, info.offset_data, info.size)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"{path} cannot be read as a tar: {error}.") from error
    return _sources(members, unlabelled)


class Window:
    """Bytes as a file that `tarfile` reads: nothing claimed in them reaches beyond their end.

    Args:
        read_at: returns so many bytes (first argument) from a place (second).
        size: of all.
    """

    def __init__(self, read_at: Callable[[int, int], bytes], size: int) -> None:
        self.read_at, self.size = read_at, size
        self.at = 0

    def read(self, size: int, /) -> bytes:
        """Return at most `size` bytes.

        Raises:
            tarfile.ReadError: it wants more than any header has; only headers are read this way.
        """
        if size > MAX_HEADER:
            raise tarfile.ReadError(f"a header claims {size} bytes")
        content = self.read_at(max(0, min(size, self.size - self.at)), self.at)
        self.at += len(content)
        return content

    def tell(self) -> int:
        """Return the place of the next byte."""
        return self.at

    def seek(self, place: int, /) -> None:
        """Go to a place."""
        self.at = place

    def write(self, content: bytes, /) -> int:
        """Refuse: `tarfile` asks for the method, and never calls it when reading."""
        raise OSError("open for reading")

    def close(self) -> None:
        """Leave the file open: it belongs to whoever opened it."""


def tar_members(path: Path) -> Iterator[tarfile.TarInfo]:
    """Yield the members of a plain tar without keeping them.

    Raises:
        tarfile.TarError, OSError: it is damaged.
    """
    with path.open("rb") as stream:
        yield from window_members(file_window(stream, 0, os.fstat(stream.fileno()).st_size))


def file_window(stream: IO[bytes], start: int, size: int) -> Window:
    """Return a stretch of an open file as a window."""
    return Window(lambda count, at: os.pread(stream.fileno(), count, start + at), size)


def window_members(window: Window) -> Iterator[tarfile.TarInfo]:
    """Yield the members of the plain tar that fills a window; see `tar_members`."""
    with tarfile.open(fileobj=window, mode="r:") as archive:
        while (info := archive.next()) is not None:
            archive.members.clear()  # type: ignore[attr-defined]  # else it keeps all of them
            yield info
        # `tarfile` takes a damaged header for the end, and a cut between two members too.
        window.seek(archive.offset)
        if window.read(TAR_BLOCK) != bytes(TAR_BLOCK):
            raise tarfile.ReadError(f"neither a header nor the end mark at byte {archive.offset}")


def refuse_compressed(path: Path) -> None:
    """Refuse a compressed file: its members cannot be read in place.

    Raises:
        DataError: it is compressed.
    """
    with path.open("rb") as stream:
        start = stream.read(8)
    for magic, remedy in COMPRESSED.items():
        if start.startswith(magic):
            raise DataError(
                f"{path} is compressed, so its images cannot be read in place: run "
                f"`{remedy} {path.name}` first."
            )


def _sources(members: Members, unlabelled: bool) -> dict[str, Source]:
    left_out = sorted(members.left_out, key=by_name)
    _, names, inputs = members.in_order()
    where = str(members.path)
    return sources_by_layout(names, inputs, left_out, where, unlabelled, _wrapping(names))


def _wrapping(names: Names) -> int:
    """Return the length of the folder, with its slash, that all names share; 0 for none."""
    top = first_folder(names[0]) if names else ""
    if top and all(name.startswith(top + "/") for name in names):
        return len(top) + 1
    return 0


def is_hidden(name: str) -> bool:
    """Return whether a member is of the kind that file managers hide or add."""
    return any(part.startswith(".") and part not in (".", "..") for part in name.split("/")) or (
        name.startswith("__MACOSX/")
    )


def _why_not_zipped(info: zipfile.ZipInfo, archive_size: int) -> str | None:
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (STORED, DEFLATED):
        return "is compressed in a way that few tools read"
    if (info.external_attr >> 16) & 0o170000 == 0o120000:
        return "is a link"
    if not 0 <= info.header_offset <= archive_size - info.compress_size:
        return "lies beyond the end of the archive"
    if info.file_size > MAX_INFLATION * (info.compress_size + 1):
        return "claims more bytes than it can hold"
    return _why_not_named(info.filename)


def why_not_tarred(info: tarfile.TarInfo) -> str | None:
    """Return why a member of a tar is not taken for an image, None if it is."""
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    return _why_not_named(info.name)


def _why_not_named(name: str) -> str | None:
    if name.startswith("/") or ".." in name.split("/"):
        return "has a path that leaves the archive"
    if not SUFFIX.fullmatch(Path(name).suffix):
        return "does not have the extension of an image"
    return None
