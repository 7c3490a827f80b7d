"""DALI's index of a shard, version 1.2: `ext offset size name` for each component of a sample.

The words are separated by white space, so that no name may hold any. DALI shows the names, but does
not look them up in the tar.
"""

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, NamedTuple

_SPACE = re.compile(r"\s")
_NUMBER = re.compile(r"[0-9]{1,19}")
_CANONICAL = {"jpeg": "jpg", "jpe": "jpg"}


class Component(NamedTuple):
    """One file of a sample.

    Attributes:
        extension: in lower case, `jpg` for `.jpeg`.
        offset: of its content in the tar.
        size: in bytes.
        name: of the member, as `index_name` gives it.
    """

    extension: str
    offset: int
    size: int
    name: str


def index_name(name: str) -> str:
    """Return a member's name as the index has it: `_` for white space."""
    return _SPACE.sub("_", name)


def get_extension(name: str) -> str:
    """Return the extension of a member as the index has it; "" if there is none."""
    base = name.rpartition("/")[2]
    stem, _, extension = base.rpartition(".")
    return _CANONICAL.get(extension.lower(), extension.lower()) if stem else ""


def index_line(components: Sequence[Component]) -> bytes:
    """Return the line of a sample, with its line feed."""
    text = " ".join(str(field) for component in components for field in component)
    return text.encode("utf-8", "surrogateescape") + b"\n"


def read_header(stream: BinaryIO) -> int | None:
    """Read the first line; return the number of samples, None if it is not that of an index."""
    words = stream.readline(64).decode("ascii", "replace").split()
    sound = len(words) == 2 and words[0] == "v1.2" and _NUMBER.fullmatch(words[1])
    return int(words[1]) if sound else None


def read_lines(stream: BinaryIO) -> Iterator[list[Component] | None]:
    """Yield the components of each further line, None for a line that cannot be read."""
    for line in stream:
        yield _parsed(line)


def _parsed(line: bytes) -> list[Component] | None:
    words = line.decode("utf-8", "surrogateescape").split()
    if not words or len(words) % 4:
        return None
    quads = [words[i : i + 4] for i in range(0, len(words), 4)]
    if not all(_NUMBER.fullmatch(number) for quad in quads for number in quad[1:3]):
        return None
    return [Component(ext, int(offset), int(size), name) for ext, offset, size, name in quads]


def index_path(shard: Path) -> Path:
    """Return where the index of a shard lies."""
    return shard.with_suffix(".idx")
