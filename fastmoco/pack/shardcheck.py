"""Holding one shard against its entry in the manifest, its index and its rows of the table."""

import io
import os
from bisect import bisect_right
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastmoco.core.files import hash_of, sha256_of
from fastmoco.dataset.dali_index import (
    Component,
    extension_of,
    index_name,
    index_path,
    read_header,
    read_lines,
)
from fastmoco.pack.image import without_warnings
from fastmoco.pack.tar import Damage, Member, walk

TABLE = "samples.npy"
_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_LABEL = 32  # bytes of a label's text


@dataclass(frozen=True)
class ShardTask:
    """What a worker is told of a shard.

    Attributes:
        path: of the tar; it exists.
        bytes: its size by the manifest.
        sha256: its hash by the manifest.
        rows: (n,) its rows of the table; none if the table is damaged.
        holds_labels: whether the table's labels stand in members `.cls`.
        check_index: whether the index is there and has the right number of lines.
    """

    path: Path
    bytes: int
    sha256: str
    rows: npt.NDArray[np.void]
    holds_labels: bool
    check_index: bool


class Fault(NamedTuple):
    """Something wrong: in which file of the set, what, and with which row of the shard."""

    file: str
    what: str
    row: int | None = None


@dataclass
class ShardReport:
    """What is wrong with a shard.

    Attributes:
        sha256: of the file as it is.
        faults: in the order found.
    """

    sha256: str
    faults: list[Fault] = field(default_factory=list)


def check_shard(task: ShardTask) -> ShardReport:
    """Hold a shard against what is written down about it, and decode its images in full."""
    report = ShardReport(sha256_of(task.path))
    sound = report.sha256 == task.sha256
    lines = _read_index(task.path) if task.check_index else []
    known = _Known.of(lines, task.rows, task.path.stat().st_size)
    members, damage = _members(task, known)
    bad = [fault for fault in map(_SampleCheck(task, sound, members), range(len(task.rows)))]
    samples = [fault for fault in bad if fault]
    if not sound and len(samples) == len(task.rows) > 1:
        what = f"none of its {len(samples)} samples is as it was packed: it is another file"
        report.faults.append(Fault(task.path.name, what))
        return report
    report.faults += [*damage, *samples]
    if task.check_index:
        report.faults += _index_faults(task, lines, members, known.hidden)
    if task.holds_labels:
        report.faults += _label_faults(task, members, sound)
    if not sound and not report.faults and task.path.stat().st_size == task.bytes:
        unseen = ", though every header and sample is sound: it is the padding"
        what = f"its SHA-256 has changed{unseen if len(task.rows) else ''}"
        report.faults.append(Fault(task.path.name, what))
    return report


def lost_rows(rows: npt.NDArray[np.void], size: int) -> npt.NDArray[np.intp]:
    """Return which rows of a shard lie, in part at least, beyond a file of `size` bytes."""
    # A damaged offset may be so large that the sum would wrap around.
    return np.flatnonzero(np.minimum(rows["offset"], np.uint64(size)) + rows["size"] > size)


Lines = list[list[Component] | None]


def _read_index(shard: Path) -> Lines:
    with index_path(shard).open("rb") as stream:
        read_header(stream)
        return list(read_lines(stream))


@dataclass
class _Known:
    """Where members should be.

    Attributes:
        offsets: of their contents, ascending.
        rows: the row of the shard that each belongs to.
        hidden: of them those behind a damaged header: the walk does not come by.
    """

    offsets: list[int]
    rows: list[int]
    hidden: set[int] = field(default_factory=set)

    @classmethod
    def of(cls, lines: Lines, rows: npt.NDArray[np.void], size: int) -> "_Known":
        """Take the index's word where it has the images where the table has them.

        Args:
            lines, rows: of index and table.
            size: of the shard, in bytes.
        """
        images = list(zip(rows["offset"].tolist(), range(len(rows)), strict=True))
        listed = [(c.offset, row) for row, line in enumerate(lines) for c in line or ()]
        pairs = sorted(listed if set(images) <= set(listed) else images)
        pairs = [(offset, row) for offset, row in pairs if offset <= size]
        return cls([offset for offset, _ in pairs], [row for _, row in pairs])

    def behind(self, offset: int) -> int | None:
        """Return the row whose header is at an offset, and note that its member is hidden."""
        place = bisect_right(self.offsets, offset)
        if place == len(self.offsets):
            return None
        self.hidden.add(self.offsets[place])
        return self.rows[place]


def _members(task: ShardTask, known: _Known) -> tuple[dict[int, Member], list[Fault]]:
    members, faults = {}, []
    size = task.path.stat().st_size
    for found in walk(task.path, known.offsets):
        if isinstance(found, Member):
            members[found.offset] = found
        elif not (found.ends and size < task.bytes):  # told already: the file is too short
            faults.append(_header_fault(task, known, found))
    return members, faults


def _header_fault(task: ShardTask, known: _Known, damage: Damage) -> Fault:
    return Fault(task.path.name, f"the tar {damage.reason}", known.behind(damage.offset))


class _SampleCheck:
    """Says what is wrong with a sample, None if nothing is."""

    def __init__(self, task: ShardTask, sound: bool, members: dict[int, Member]) -> None:
        self.task, self.sound, self.members = task, sound, members
        self.size = task.path.stat().st_size

    def __call__(self, row: int) -> Fault | None:
        entry = self.task.rows[row]
        start, length = int(entry["offset"]), int(entry["size"])
        if self.sound and not self._is_member(start, length):
            what = f"says bytes {start} to {start + length}, where the shard has no image"
            return Fault(TABLE, what, row)
        if start + length > self.size:
            return None  # told already, of the whole shard
        content = _bytes_at(self.task.path, start, length)
        return self._changed(row, content) or self._undecodable(row, content)

    def _is_member(self, start: int, length: int) -> bool:
        member = self.members.get(start)
        return member is not None and member.size == length

    def _changed(self, row: int, content: bytes) -> Fault | None:
        if hash_of(content) == int(self.task.rows["hash"][row]):
            return None
        if self.sound:
            return Fault(TABLE, "has another hash than the bytes in the shard", row)
        decoded = decode(content)
        state = decoded if isinstance(decoded, str) else "still decodes"
        return Fault(self.task.path.name, f"its bytes were changed after packing; it {state}", row)

    def _undecodable(self, row: int, content: bytes) -> Fault | None:
        found = decode(content)
        if isinstance(found, str):
            return Fault(self.task.path.name, f"it {found}", row)
        entry = self.task.rows[row]
        said = int(entry["height"]), int(entry["width"])
        if found != said:
            what = f"says {said[0]} x {said[1]} pixels, the image has {found[0]} x {found[1]}"
            return Fault(TABLE, what, row)
        return None


def _bytes_at(path: Path, start: int, length: int) -> bytes:
    with path.open("rb") as stream:
        return os.pread(stream.fileno(), length, start)


def decode(content: bytes) -> tuple[int, int] | str:
    """Decode an image in full; return height and width, or why that fails."""
    with without_warnings():
        try:
            with Image.open(io.BytesIO(content), formats=_FORMATS) as image:
                image.load()
                return image.height, image.width
        except MemoryError:
            raise
        except Exception as error:  # decoders raise anything on damaged bytes
            return f"cannot be decoded ({str(error) or type(error).__name__})"


def _index_faults(
    task: ShardTask, lines: Lines, members: dict[int, Member], hidden: set[int]
) -> list[Fault]:
    """Return one fault for an index that does not fit, with the first line that does not."""
    size = task.path.stat().st_size
    unseen = hidden | {c.offset for line in lines for c in line or () if c.offset + c.size > size}
    pairs = enumerate(zip(lines, task.rows, strict=True))
    wrong = [
        (row, what)
        for row, (line, entry) in pairs
        if (what := _line_fault(line, entry, members, unseen))
    ]
    if not wrong:
        return []
    row, what = wrong[0]
    others = f"; {len(wrong)} of {len(lines)} lines are wrong" if len(wrong) > 1 else ""
    return [Fault(index_path(task.path).name, f"line {row + 2}: {what}{others}", row)]


def _line_fault(
    line: list[Component] | None, entry: np.void, members: dict[int, Member], unseen: set[int]
) -> str | None:
    if line is None:
        return "is not `ext offset size name`"
    for component in line:
        if component.offset not in unseen and not _fits(component, members):
            return f"the tar has no {component.name} of {component.size} bytes at that offset"
    image = int(entry["offset"]), int(entry["size"])
    if image not in [(c.offset, c.size) for c in line]:
        return f"the table has the image at byte {image[0]}"
    return None


def _fits(component: Component, members: dict[int, Member]) -> bool:
    member = members.get(component.offset)
    return member is not None and component == (
        extension_of(member.name),
        member.offset,
        member.size,
        index_name(member.name),
    )


def _label_faults(task: ShardTask, members: dict[int, Member], sound: bool) -> list[Fault]:
    by_name = {member.name: member for member in members.values()}
    faults = []
    for row, (start, label) in enumerate(task.rows[["offset", "label"]].tolist()):
        image = members.get(start)
        member = by_name.get(f"{image.name.rpartition('.')[0]}.cls") if image else None
        if member is None:
            continue  # told already, if it should be there
        text = _bytes_at(task.path, member.offset, min(member.size, _MAX_LABEL))
        if text != str(label).encode():
            file = TABLE if sound else task.path.name
            what = f"its label is {label} in the table and {text!r} in the shard"
            faults.append(Fault(file, what, row))
    return faults
