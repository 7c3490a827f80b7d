"""A zip or a plain tar of images, read in place: nothing is ever extracted."""

import os
import tarfile
import zipfile
from array import array
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain, pairwise
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import DEFLATED, STORED, ArchiveInputs, Span, Zipped
from fastmoco.pack.kinds import HIDDEN, IMAGE, START, judge
from fastmoco.pack.sources.base import Names, Reject, Source
from fastmoco.pack.sources.found import Found, get_folder, hidden_part
from fastmoco.pack.sources.layout import sources_by_layout
from fastmoco.pack.sources.reader import How

COMPRESSED = {
    b"\x1f\x8b": "gzip -d",
    b"BZh": "bzip2 -d",
    b"\xfd7zXZ": "xz -d",
    b"(\xb5/\xfd": "zstd -d",
    b"7z\xbc\xaf": "7z x",
    b"Rar!": "unrar x",
}
TAR_BLOCK = 512
ZIP_UTF8 = 0x800  # the flag that says so of a name
LINK = "is a link, which is not followed in an archive (tar -h stores what it leads to)"
MAX_INFLATION = 1032  # of deflate
MAX_HEADER = 2**20  # bytes; real headers, long names included, take some thousand


class Members:
    """The images found in an archive, in any order: millions, hence no objects.

    Args:
        path: of the archive.
        kind: of their inputs.

    Attributes:
        found: what is beside the images.
        left_out: see `Found`.
    """

    def __init__(self, path: Path, kind: type[Span] | type[Zipped]) -> None:
        self.path, self.kind = path, kind
        self.names, self.found = Names(), Found()
        self._sizes, self._fields = array("q"), array("q")

    @property
    def left_out(self) -> list[Reject]:
        """What is left out, in any order."""
        return self.found.left_out

    def add(self, name: str, size: int, *fields: int) -> None:
        """Add an image; `fields` are what `kind` takes after the path."""
        self.names.add(name)
        self._sizes.append(size)
        self._fields.extend(fields)

    def in_order(self) -> tuple[npt.NDArray[np.int64], Names, ArchiveInputs]:
        """Return the rows in the order of the names' bytes, the names and the inputs so sorted.

        Of several members of one name the last counts, as it would after unpacking.
        """
        order = np.array(self.names.sorted_rows(), dtype=np.int64)
        names = self.names.pick(order)
        differ = (name != after for name, after in pairwise(chain(names, [None])))
        kept = np.flatnonzero(np.fromiter(differ, dtype=bool, count=len(names)))
        if len(kept) < len(order):
            self.found.notes.append(
                f"{len(order) - len(kept)} members are left out for later ones of the same name"
            )
            order, names = order[kept], names.pick(kept)
        fields = len(self._fields) // max(1, len(self.names))
        table = np.array(self._fields, dtype=np.int64).reshape(len(self.names), fields)[order]
        sizes = np.array(self._sizes, dtype=np.int64)[order]
        return order, names, ArchiveInputs(self.path, self.kind, table, sizes)

    def passes(self, path: str, is_folder: bool) -> bool:
        """Return whether a member, by its path with slashes, is a folder or hidden; note it."""
        part = hidden_part(path)
        if part is not None:
            self.found.pass_over(part, HIDDEN)
        else:
            self._note_folder(path.rstrip("/") if is_folder else get_folder(path))
        return is_folder or part is not None

    def _note_folder(self, folder: str) -> None:
        while folder and folder not in self.found.folders:
            self.found.folders.add(folder)
            folder = get_folder(folder)

    def get_fields(self, wanted: set[str]) -> dict[str, tuple[int, list[int]]]:
        """Return size and fields of the images of some names; the last of each name counts."""
        width = len(self._fields) // max(1, len(self.names))
        return {
            name: (self._sizes[row], self._fields[row * width : (row + 1) * width].tolist())
            for row, name in enumerate(self.names)
            if name in wanted
        }


def open_zip(path: Path, unlabelled: bool = False, how: How | None = None) -> dict[str, Source]:
    """List the images of a zip.

    Folders around all of them do not count. Backslashes are slashes where Windows wrote the zip.

    Args:
        path: of the zip.
        unlabelled: read no classes from the layout.
        how: to read the layout; by default as `unlabelled` says.

    Raises:
        DataError: not a sound zip, or see `sources_by_layout`.
    """
    members = Members(path, Zipped)
    try:
        size = path.stat().st_size
        with zipfile.ZipFile(path) as archive:
            infos = archive.infolist()
            slashes = any("/" in info.filename for info in infos)
            for info in infos:
                name = _zip_name(info)
                if not slashes or info.create_system == 0:
                    name = name.replace("\\", "/")
                if not members.passes(name, info.is_dir() or name.endswith("/")):
                    _add_zipped(members, info, name, size)
    except (zipfile.BadZipFile, NotImplementedError, OSError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a zip: {error}.") from error
    return _sources(members, how or How(unlabelled))


def open_tar(path: Path, unlabelled: bool = False, how: How | None = None) -> dict[str, Source]:
    """List the images of a plain tar; see `open_zip`.

    Raises:
        DataError: a compressed or damaged tar, or see `sources_by_layout`.
    """
    refuse_compressed(path)
    members = Members(path, Span)
    links: list[tuple[str, str]] = []
    try:
        with path.open("rb") as stream:
            for info in tar_members(path):
                if members.passes(tar_path(info.name), info.isdir()):
                    continue
                if info.islnk():
                    links.append((info.name, info.linkname))
                else:
                    _add_tarred(members, info, stream)
    except OSError as error:
        raise DataError(f"{path} cannot be read as a tar: {error}.") from error
    except Exception as error:  # the parser raises anything on damaged bytes
        if isinstance(error, MemoryError | DataError):
            raise
        raise DataError(f"{path} cannot be read as a tar: {error}.") from error
    _add_hard_links(members, links)
    return _sources(members, how or How(unlabelled))


def tar_path(name: str) -> str:
    """Return the name of a member without the `./` that `tar cf x.tar ./folder` writes."""
    while name.startswith("./"):
        name = name[2:].lstrip("/")
    return name


def _zip_name(info: zipfile.ZipInfo) -> str:
    """Return a member's name; old tools write UTF-8 without saying so."""
    if info.flag_bits & ZIP_UTF8:
        return info.filename
    try:
        return info.filename.encode("cp437").decode()
    except UnicodeError:
        return info.filename


def _add_zipped(members: Members, info: zipfile.ZipInfo, name: str, archive_size: int) -> None:
    found, reason = members.found, _why_not_zipped(info, archive_size)
    member = (info.header_offset, info.compress_size, info.file_size, info.compress_type, info.CRC)
    zipped = Zipped(str(members.path), *member)
    if reason == LINK and "." not in name.rpartition("/")[2]:  # to a folder, perhaps
        found.leave_out(name, reason)
    elif found.judge(name, lambda: b"" if reason else zipped.start(START)):
        reason = reason or why_not_inside(name)
        if reason:
            found.leave_out(name, reason)
        else:
            members.add(name, info.file_size, *member)


def _add_tarred(members: Members, info: tarfile.TarInfo, stream: IO[bytes]) -> None:
    found, path = members.found, tar_path(info.name)
    regular = info.isreg() and not info.issparse()
    if info.issym() and "." not in path.rpartition("/")[2]:  # to a folder, perhaps
        found.leave_out(path, LINK)
    elif found.judge(path, lambda: _first_bytes(stream, info) if regular else b""):
        reason = LINK if info.issym() else None if regular else "is not a regular file"
        reason = reason or why_not_inside(info.name)
        if reason:
            found.leave_out(path, reason)
        else:
            members.add(info.name, info.size, info.offset_data, info.size)


def _first_bytes(stream: IO[bytes], info: tarfile.TarInfo) -> bytes:
    return os.pread(stream.fileno(), min(START, info.size), info.offset_data)


def _add_hard_links(members: Members, links: list[tuple[str, str]]) -> None:
    """Add images that are stored under another name of the same tar."""
    if not links:
        return
    stored = members.get_fields({target for _, target in links})
    before = len(members.names)
    for name, target in links:
        path = tar_path(name)
        if target in stored and not why_not_inside(name):
            size, fields = stored[target]
            members.add(name, size, *fields)
        elif members.found.judge(path, lambda: b""):
            members.found.leave_out(path, "is a link to what is no image of the archive")
    count = len(members.names) - before
    members.found.notes.append(f"{count} hard links are packed under each of their names")


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


def _sources(members: Members, how: How) -> dict[str, Source]:
    members.found.names = members.names
    members.found.settle()
    _, names, inputs = members.in_order()
    paths = map(tar_path, names)
    how = replace(how, wrapped=True)
    return sources_by_layout(members.found, names, paths, inputs, str(members.path), how)


def is_hidden(name: str) -> bool:
    """Return whether a member is of the kind that file managers hide or add."""
    return hidden_part(f"{name}/") is not None


def _why_not_zipped(info: zipfile.ZipInfo, archive_size: int) -> str | None:
    if info.flag_bits & 1:
        return "is encrypted"
    if info.compress_type not in (STORED, DEFLATED):
        return "is compressed in a way that few tools read"
    if (info.external_attr >> 16) & 0o170000 == 0o120000:
        return LINK
    if not 0 <= info.header_offset <= archive_size - info.compress_size:
        return "lies beyond the end of the archive"
    if info.file_size > MAX_INFLATION * (info.compress_size + 1):
        return "claims more bytes than it can hold"
    return None


def why_not_tarred(info: tarfile.TarInfo) -> str | None:
    """Return why a member of a tar is not taken for an image, None if it is."""
    if not info.isreg() or info.issparse():
        return "is not a regular file"
    if judge(info.name, lambda: b"") is not IMAGE:
        return "does not have the extension of an image"
    return why_not_inside(info.name)


def why_not_inside(name: str) -> str | None:
    """Return why a member of that name is not taken, None if its path stays in the archive."""
    if name.startswith("/") or ".." in name.split("/"):
        return "has a path that leaves the archive"
    return None
