"""Small archives read in memory: a few known members of a tar or tar.gz, nothing written."""

import gzip
import tarfile
import zlib
from collections.abc import Collection
from pathlib import Path

import numpy as np

from fastmoco.errors import DataError
from fastmoco.pack.sources.archive import Window, window_members
from fastmoco.pack.sources.raw import Bytes, mapped

MAX_UNPACKED = 2**30  # CIFAR-10, the largest of the archives read here, unpacks to 0.2 GB
PEEK = 2**16
GZIP = b"\x1f\x8b"


def members(path: Path, wanted: Collection[str]) -> dict[str, Bytes]:
    """Return the wanted regular files of a plain or gzipped tar.

    Args:
        path: of the archive.
        wanted: names of files, with or without folders before them; where the folder that holds
            them lies in the tar does not count.

    Raises:
        DataError: it is damaged, unpacks to more than 1 GiB, or holds a wanted file twice.
    """
    content = _content(path)
    found: dict[str, Bytes] = {}
    try:
        for info in window_members(_window(content)):
            name = _match(info.name, wanted)
            if name is None or not info.isreg():
                continue
            if name in found:
                raise DataError(f"{path} holds {name} more than once: get it again.")
            found[name] = content[info.offset_data : info.offset_data + info.size]
    except (tarfile.TarError, ValueError) as error:
        raise DataError(f"{path} cannot be read as a tar: {error}; get it again.") from error
    return found


def get_first_folder(path: Path) -> str:
    """Return the folder of the first member of a plain or gzipped tar, "" if there is none.

    Looks at the start only, so that recognizing a large archive costs nothing.
    """
    try:
        with path.open("rb") as stream:
            start = stream.read(PEEK)
        if start.startswith(GZIP):
            start = zlib.decompressobj(wbits=zlib.MAX_WBITS | 16).decompress(start, PEEK)
        first = next(window_members(_window(np.frombuffer(start, dtype=np.uint8))), None)
    except (tarfile.TarError, OSError, zlib.error, ValueError):
        return ""
    parts = [part for part in (first.name if first else "").split("/") if part not in ("", ".")]
    return parts[0] if parts else ""


def _content(path: Path) -> Bytes:
    content = mapped(path)
    if content[:2].tobytes() != GZIP:
        return content
    try:
        with gzip.open(path) as stream:
            unpacked = stream.read(MAX_UNPACKED + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"{path} is damaged or cut off: {error}; get it again.") from error
    if len(unpacked) > MAX_UNPACKED:
        raise DataError(f"{path} unpacks to more than {MAX_UNPACKED >> 30} GiB: not taken.")
    return np.frombuffer(unpacked, dtype=np.uint8)


def _window(content: Bytes) -> Window:
    return Window(lambda count, at: content[at : at + count].tobytes(), len(content))


def _match(name: str, wanted: Collection[str]) -> str | None:
    for tail in wanted:
        if name == tail or name.endswith("/" + tail):
            return tail
    return None
