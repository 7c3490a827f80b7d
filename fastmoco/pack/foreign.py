"""Reading one shard that somebody else wrote: which of its members are samples, and of what label.

A key that ends at the first dot, as webdataset has it, would make one sample of `a.1.jpg` and
`a.2.jpg`; one that ends at the last dot would make a sample of the mask `a.seg.png` beside `a.jpg`.
So the key ends at the last dot, unless an image stands at the first.
"""

import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastmoco.core.files import hash_file
from fastmoco.dataset.classes import several_labels
from fastmoco.dataset.dali_index import Component, get_extension, index_line, index_name
from fastmoco.dataset.shard_set import SAMPLE_DTYPE
from fastmoco.pack.image import FORMATS, Checked, Rules, check_image, is_rotated, without_warnings
from fastmoco.pack.tar import Damage, Member, walk
from fastmoco.pack.worker import ChannelStats, make_row

IMAGES = frozenset(
    ["jpg", "jfif", "png", "webp", "gif", "bmp", "tif", "tiff", "ppm", "pgm", "avif", "heic", "jxl"]
)
BESIDE = "is another image of a sample that has one"  # its mask, perhaps: no image that is lost
_MAX_LABEL = 4096  # bytes of a `.cls`
_MAX_JSON = 2**24
_MEASURED, _STRIDE = 64, 16  # images that enter the statistics: the first, then one of so many
_NEGATIVE = re.compile(r"-[0-9]+")  # how some say that there is no label


@dataclass(frozen=True)
class AdoptTask:
    """A shard, and where its labels are; see `adopt.AdoptOptions`."""

    path: Path
    label_key: str | None
    unlabelled: bool


@dataclass
class Adopted:
    """What was found in a shard.

    Attributes:
        size, sha256: of the tar; bytes.
        damage: why the tar cannot be used, None if it can.
        rows: `SAMPLE_DTYPE`; the label is a place in `values`, -1 for none.
        names: the original name of each row, encoded.
        index: DALI's.
        values: the different labels as they are written, those of unfit images included.
        rejects: (name, reason) of the images that are no samples.
        rotated: names of the samples that EXIF says to rotate.
        totals: over the samples; the statistics over some of them.
    """

    size: int = 0
    sha256: str = ""
    damage: str | None = None
    rows: npt.NDArray[np.void] = field(default_factory=lambda: np.zeros(0, SAMPLE_DTYPE))
    names: list[bytes] = field(default_factory=list)
    index: bytes = b""
    values: list[str] = field(default_factory=list)
    rejects: list[tuple[str, str]] = field(default_factory=list)
    rotated: list[str] = field(default_factory=list)
    totals: ChannelStats = field(default_factory=ChannelStats)


def adopt_shard(task: AdoptTask) -> Adopted:
    """Check every image of a shard; the shard is only read."""
    try:
        return _adopt(task)
    except OSError as error:
        return Adopted(damage=f"cannot be read ({error.strerror})")


def _adopt(task: AdoptTask) -> Adopted:
    found = Adopted(size=task.path.stat().st_size, sha256=hash_file(task.path))
    members: list[Member] = []
    for member in walk(task.path):
        if isinstance(member, Damage):
            return Adopted(damage=member.reason)
        members.append(member)
    contents = Contents(members)
    rows, lines, codes = list[tuple[Any, ...]](), list[bytes](), dict[str, int]()
    with task.path.open("rb") as stream:
        for image, reason in contents.images_and_faults():
            name, label = f"{task.path.name}!{image.name}", -1
            if reason is None and not task.unlabelled:
                value = get_label(stream, contents, image, task.label_key)
                label = -1 if value is None else codes.setdefault(value, len(codes))
            measure = len(rows) < _MEASURED or len(rows) % _STRIDE == 0
            checked = reason or _check_in_place(stream, image, measure)
            if isinstance(checked, str):
                found.rejects.append((name, checked))
                continue
            image_info, rotated = checked
            rows.append(make_row(image.offset, label, image_info))
            lines.append(sample_line(contents, image))
            found.names.append(name.encode("utf-8", "surrogateescape"))
            found.rotated += [name] if rotated else []
            found.totals.count(image_info)
    found.rows = np.array(rows, dtype=SAMPLE_DTYPE)
    found.index, found.values = b"v1.2 %d\n" % len(rows) + b"".join(lines), list(codes)
    return found


class Contents:
    """The members of a shard by what they are; those of a sample need not be neighbors."""

    def __init__(self, members: Sequence[Member]) -> None:
        self.images = [m for m in members if get_extension(m.name) in IMAGES]
        self.sides: dict[tuple[str, str], Member] = {}
        for member in members:
            extension = get_extension(member.name)
            if extension in ("cls", "json") and member.regular:
                self.sides.setdefault((_stem(member.name), extension), member)
        stems = {_stem(image.name) for image in self.images}
        self.plain = {stem for stem in stems if stem == _root(stem)}

    def images_and_faults(self) -> Iterator[tuple[Member, str | None]]:
        """Yield each image in the order of the tar, and why it is that of no sample, if so."""
        used: set[str] = set()
        for image in self.images:
            stem = _stem(image.name)
            if not image.regular:
                yield image, "is not a regular file"
            elif stem not in self.plain and _root(stem) in self.plain:
                yield image, BESIDE
            elif stem in used:
                yield image, "has the key of an image before it"
            else:
                used.add(stem)
                yield image, None

    def side(self, image: Member, extension: str) -> Member | None:
        """Return the member of that extension that belongs to an image."""
        stem = _stem(image.name)
        return self.sides.get((stem, extension)) or self.sides.get((_root(stem), extension))


def _stem(name: str) -> str:
    """Return a member's name without its extension."""
    return name.rpartition(".")[0]


def _root(name: str) -> str:
    """Return a member's name up to the first dot of its last part."""
    folder, slash, base = name.rpartition("/")
    return folder + slash + base.partition(".")[0]


def sample_line(contents: Contents, image: Member) -> bytes:
    """Return the line of DALI's index for an image and its label, in the order of the tar."""
    side = contents.side(image, "cls")
    members = sorted([image, side] if side else [image], key=lambda member: member.offset)
    return index_line(
        [Component(get_extension(m.name), m.offset, m.size, index_name(m.name)) for m in members]
    )


def _check_in_place(stream: BinaryIO, image: Member, measure: bool) -> tuple[Checked, bool] | str:
    """Return what is known of an image and whether EXIF rotates it, or why it cannot be used.

    Height, width and statistics are those of the pixels as stored: training does not rotate.
    """
    rules = Rules(rotated=True)
    if image.size > rules.max_bytes:
        return f"is larger than {rules.max_bytes >> 20} MiB"
    content = _read(stream, image)
    checked = check_image(content, rules, measure)
    if isinstance(checked, str):
        return checked
    with without_warnings(), Image.open(io.BytesIO(content), formats=FORMATS) as opened:
        if checked.content == content:
            return checked, is_rotated(opened)
        what = f"{opened.format} of mode {opened.mode}"
    return f"would have to be re-encoded ({what}), as fastmoco shard does"


def _read(stream: BinaryIO, member: Member) -> bytes:
    return os.pread(stream.fileno(), member.size, member.offset)


def get_label(stream: BinaryIO, contents: Contents, image: Member, key: str | None) -> str | None:
    """Return the label of a sample as it is written, None if there is none.

    Args:
        stream: of the shard.
        key: a field of the sample's JSON; None: its `.cls` member.
    """
    side = contents.side(image, "json" if key else "cls")
    if side is None or side.size > (_MAX_JSON if key else _MAX_LABEL):
        return None
    text = _read(stream, side)
    value = _field(text, key, side.name) if key else text.decode("utf-8", "replace").strip()
    return None if not value or _NEGATIVE.fullmatch(value) else value


def _field(text: bytes, key: str, name: str) -> str | None:
    try:
        value = json.loads(text).get(key)
    except (ValueError, AttributeError, RecursionError):
        return None
    if isinstance(value, list) and len(value) > 1:
        raise several_labels(f"The field {key!r} of {name}")
    if isinstance(value, list):
        value = value[0] if value else None
    if not isinstance(value, str | int | float):
        return None
    # JSON may hold halves of characters, which no manifest can.
    return str(value).encode("utf-8", "replace").decode().strip()
