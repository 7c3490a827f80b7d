"""Walking through a tar that may be damaged: what is there, what is not, and where it goes on.

`tarfile` ends silently at the first damaged header, as if the archive ended there. Here its parser
(PAX and GNU long names included) reads one header at a time; damage is told as such, and the walk
goes on at the next place where a member is known to be.
"""

import io
import tarfile
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

BLOCK = 512
MAX_EXTENSION = 2**20  # bytes of a long name or of PAX records: more is an attack on the memory
_EXTENSIONS = frozenset(
    [
        tarfile.GNUTYPE_LONGNAME,
        tarfile.GNUTYPE_LONGLINK,
        tarfile.XHDTYPE,
        tarfile.XGLTYPE,
        tarfile.SOLARIS_XHDTYPE,
    ]
)


class Member(NamedTuple):
    """A member of a tar.

    Attributes:
        name: bytes that are not UTF-8 stand as surrogates.
        offset: of its content.
        size: of its content, in bytes.
        regular: whether it is a plain file, not a folder, link, device or sparse file.
    """

    name: str
    offset: int
    size: int
    regular: bool


@dataclass(frozen=True)
class Damage:
    """A place where the walk could not go on.

    Attributes:
        offset: where.
        reason: what is wrong there, in words that follow "the tar".
        ends: whether nothing behind it can be read.
    """

    offset: int
    reason: str
    ends: bool = False


class _Header(tarfile.TarInfo):
    """A header whose claims are bounded before anything is read by them."""

    @classmethod
    def frombuf(cls, buf: bytes | bytearray, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.size < 0 or (header.type in _EXTENSIONS and header.size > MAX_EXTENSION):
            raise tarfile.HeaderError("unsound size")
        return header


def walk(path: Path, known: Sequence[int] = ()) -> Iterator[Member | Damage]:
    """Yield the members of a plain tar in order, and where it is damaged.

    Args:
        path: of the tar.
        known: ascending offsets of the contents of members that should be there; after a damaged
            header the walk goes on at the next of them, or ends.

    Raises:
        OSError: the file cannot be read.
    """
    with path.open("rb") as stream:
        archive = _archive(stream)
        size = stream.seek(0, io.SEEK_END)
        at: int | None = 0
        while at is not None:
            found = _read(archive, at, size)
            if isinstance(found, Member):
                yield found
                at = archive.offset
                continue
            after = _next_known(known, at)
            # Zeros where a member should be are damage, and the end of the archive elsewhere.
            if found is None and after is not None:
                found = Damage(at, f"holds zeros at byte {at}, where a member should start")
            if found is not None:
                yield found
            at = None if found and found.ends else after


def _archive(stream: BinaryIO) -> tarfile.TarFile:
    """Return what `TarInfo.fromtarfile` reads from; opening the file itself may already fail."""
    empty = io.BytesIO(bytes(2 * BLOCK))
    archive = tarfile.TarFile(
        fileobj=empty, tarinfo=_Header, encoding="utf-8", errors="surrogateescape"
    )
    archive.fileobj = stream
    return archive


def _read(archive: tarfile.TarFile, at: int, size: int) -> Member | Damage | None:
    """Return what stands at an offset, None for the end of the archive; move to what follows.

    Args:
        archive: its `offset` is set to that of the next header.
        at: the offset.
        size: of the file.
    """
    stream: Any = archive.fileobj
    stream.seek(at)
    block = stream.read(BLOCK)
    if len(block) < BLOCK:
        return Damage(at, "is cut off: its end mark is missing", ends=True)
    if not any(block):
        return None
    stream.seek(at)
    try:
        info = _Header.fromtarfile(archive)
    except (OSError, MemoryError):
        raise
    except Exception:  # the parser raises anything on damaged bytes
        return Damage(at, f"has a damaged header at byte {at}")
    if info.size < 0 or archive.offset <= at:  # by PAX records: the walk would never end
        return Damage(at, f"has a damaged header at byte {at}")
    if info.isreg() and info.offset_data + info.size > size:
        return Damage(at, f"is cut off inside {info.name!r}", ends=True)
    return Member(info.name, info.offset_data, info.size, info.isreg() and not info.issparse())


def _next_known(known: Sequence[int], at: int) -> int | None:
    """Return where the header of the next known member behind `at` is."""
    place = bisect_right(known, at + BLOCK)
    return known[place] - BLOCK if place < len(known) else None
