"""Holding one shard against its entry in the manifest, its index and its rows of the table."""

import io
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastmoco.core.files import hash_bytes, hash_file
from fastmoco.dataset.dali_index import index_path, read_lines
from fastmoco.pack.foreign import Contents, sample_line
from fastmoco.pack.image import without_warnings
from fastmoco.pack.tar import Member, walk

TABLE = "samples.npy"
_FORMATS = ("JPEG", "PNG", "WEBP")
_MAX_LABEL = 32  # bytes of a label's text
_SHOWN = 120  # bytes of an index's line


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


def check_shard(task: ShardTask) -> tuple[str, list[Fault]]:
    """Hold a shard against what is written down about it, and decode its images in full.

    Returns:
        Its SHA-256 as it is, and what is wrong, in the order found.
    """
    shard, digest, size = task.path.name, hash_file(task.path), task.path.stat().st_size
    sound = digest == task.sha256
    lines = _lines(index_path(task.path)) if task.check_index else []
    members, faults = _members(task, _places(lines, task.rows, size))
    with task.path.open("rb") as stream:

        def read(start: int, length: int) -> bytes:
            return os.pread(stream.fileno(), length, start)

        whole = [
            row for row, entry in enumerate(task.rows) if entry["offset"] + entry["size"] <= size
        ]
        bad = [fault for row in whole if (fault := _sample_fault(task, sound, row, read))]
        if not sound and len(bad) == len(task.rows) > 1:
            what = f"none of its {len(bad)} samples is as it was packed: it is another file"
            return digest, [Fault(shard, what)]
        faults += bad
        contents = Contents(list(members.values()))
        images = [members.get(int(offset)) for offset in task.rows["offset"]]
        if sound and task.check_index:  # a damaged shard says nothing of its index
            faults += _index_faults(index_path(task.path).name, lines, contents, images)
        if task.holds_labels:
            faults += _label_faults(task, sound, contents, images, read)
    if not sound and not faults and size == task.bytes:
        unseen = ", though every header and sample is sound: it is the padding"
        what = f"its SHA-256 has changed{unseen if len(task.rows) else ''}"
        faults.append(Fault(shard, what))
    return digest, faults


def lost_rows(rows: npt.NDArray[np.void], size: int) -> npt.NDArray[np.intp]:
    """Return which rows of a shard lie, in part at least, beyond a file of `size` bytes."""
    # A damaged offset may be so large that the sum would wrap around.
    return np.flatnonzero(np.minimum(rows["offset"], np.uint64(size)) + rows["size"] > size)


def _lines(index: Path) -> list[bytes]:
    with index.open("rb") as stream:
        return stream.readlines()[1:]


def _places(lines: list[bytes], rows: npt.NDArray[np.void], size: int) -> dict[int, int]:
    """Return the offsets of members that should be there, ascending, and the row of each.

    The index knows of labels too; its word counts where it has the images where the table has them.
    """
    images = {int(offset): row for row, offset in enumerate(rows["offset"])}
    components = enumerate(read_lines(io.BytesIO(b"".join(lines))))
    listed = {c.offset: row for row, line in components for c in line or ()}
    chosen = listed if images.items() <= listed.items() else images
    return {offset: chosen[offset] for offset in sorted(chosen) if offset <= size}


def _members(task: ShardTask, places: dict[int, int]) -> tuple[dict[int, Member], list[Fault]]:
    members, faults = {}, []
    for found in walk(task.path, list(places)):
        if isinstance(found, Member):
            members[found.offset] = found
        elif not found.ends or task.path.stat().st_size >= task.bytes:  # too short is told already
            row = next((row for offset, row in places.items() if offset > found.offset), None)
            faults.append(Fault(task.path.name, f"the tar {found.reason}", row))
    return members, faults


def _sample_fault(
    task: ShardTask, sound: bool, row: int, read: Callable[[int, int], bytes]
) -> Fault | None:
    entry = task.rows[row]
    start, length = int(entry["offset"]), int(entry["size"])
    content = read(start, length)
    as_packed, decoded = hash_bytes(content) == int(entry["hash"]), decode(content)
    if sound and not as_packed:
        what = f"says bytes {start} to {start + length}, where the shard has another content"
        return Fault(TABLE, what, row)
    if not as_packed:
        state = decoded if isinstance(decoded, str) else "still decodes"
        return Fault(task.path.name, f"its bytes were changed after packing; it {state}", row)
    if isinstance(decoded, str):
        return Fault(task.path.name, f"it {decoded}", row)
    said = int(entry["height"]), int(entry["width"])
    what = f"says {said[0]} x {said[1]} pixels, the image has {decoded[0]} x {decoded[1]}"
    return None if decoded == said else Fault(TABLE, what, row)


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
    file: str, lines: list[bytes], contents: Contents, images: list[Member | None]
) -> list[Fault]:
    """Return one fault for an index that is not as it would be written now."""
    wrong = [
        (row, line, wanted)
        for row, (line, image) in enumerate(zip(lines, images, strict=True))
        if image and line != (wanted := sample_line(contents, image))
    ]
    if not wrong:
        return []
    row, line, wanted = wrong[0]
    others = f"; {len(wrong)} of {len(lines)} lines are wrong" if len(wrong) > 1 else ""
    what = f"line {row + 2}: is {line[:_SHOWN]!r}, of the shard it would be {wanted[:_SHOWN]!r}"
    return [Fault(file, what + others, row)]


def _label_faults(
    task: ShardTask,
    sound: bool,
    contents: Contents,
    images: list[Member | None],
    read: Callable[[int, int], bytes],
) -> Iterator[Fault]:
    for row, (label, image) in enumerate(zip(task.rows["label"].tolist(), images, strict=True)):
        member = contents.side(image, "cls") if image else None
        if member is None:
            continue  # told already, if it should be there
        text = read(member.offset, min(member.size, _MAX_LABEL))
        if text != str(label).encode():
            what = f"its label is {label} in the table and {text!r} in the shard"
            yield Fault(TABLE if sound else task.path.name, what, row)
