"""What a worker does with a run of images: check them and form their stretch of a tar.

A tar is a sequence of members, so stretches made anywhere can be put together in order.
"""

import math
import os
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

from fastmoco.core.files import hash_bytes
from fastmoco.pack.image import Checked, Rules, check_input, without_warnings
from fastmoco.pack.inputs import Input
from fastmoco.pack.levels import Span

TAR_BLOCK = 512


@dataclass(frozen=True, slots=True)
class Run:
    """Consecutive images of one shard.

    Attributes:
        shard: its number.
        scratch: folder that the fragment's members are left in: through a file they come to the
            parent at a fifth of the cost of a pipe.
        first: position of the first in the shuffled order; positions name the samples.
        inputs: where they lie.
        labels: -1 for none.
        measured: whether each one's pixels enter the statistics.
        rules: what is accepted.
    """

    shard: int
    scratch: str
    first: int
    inputs: Sequence[Input]
    labels: Sequence[int]
    measured: Sequence[bool]
    rules: Rules


@dataclass
class ChannelStats:
    """Sums over samples; exact.

    Attributes:
        progressive, deep: samples that are progressive JPEGs, or have 16 bits.
        pixels, sums, squares: see `image.Statistics`.
    """

    progressive: int = 0
    deep: int = 0
    pixels: int = 0
    sums: list[int] = field(default_factory=lambda: [0, 0, 0])
    squares: list[int] = field(default_factory=lambda: [0, 0, 0])

    @classmethod
    def of(cls, gray: bool) -> "ChannelStats":
        """Return sums that are 0, of one channel or of three."""
        return cls(sums=[0], squares=[0]) if gray else cls()

    def count(self, image: Checked) -> None:
        """Add a sample."""
        self.progressive += image.progressive
        self.deep += image.bits == 16
        if image.statistics:
            self.pixels += image.statistics.pixels
            self.sums = [a + b for a, b in zip(self.sums, image.statistics.sums, strict=True)]
            pairs = zip(self.squares, image.statistics.squares, strict=True)
            self.squares = [a + b for a, b in pairs]

    def mean_and_deviation(self) -> tuple[list[float], list[float]]:
        """Return mean and standard deviation of the channels, in 0..1 units."""
        pixels = max(self.pixels, 1)  # all measured images of a set may be unfit
        white = (255 if len(self.sums) == 3 else 65535) * pixels
        pairs = zip(self.sums, self.squares, strict=True)
        # Whole numbers up to the root: nothing cancels.
        std = [math.sqrt(pixels * square - total**2) / white for total, square in pairs]
        return [total / white for total in self.sums], std

    def add(self, other: "ChannelStats") -> None:
        """Add the sums of other samples."""
        self.progressive += other.progressive
        self.deep += other.deep
        self.pixels += other.pixels
        self.sums = [a + b for a, b in zip(self.sums, other.sums, strict=True)]
        self.squares = [a + b for a, b in zip(self.squares, other.squares, strict=True)]


@dataclass(slots=True)
class Fragment:
    """A checked run.

    Attributes:
        shard: its number.
        count: images in the run.
        tar: the file that holds the members of the samples.
        rows: of the samples, in the order of `shardset.SAMPLE_DTYPE` (which workers do not
            import: pydantic comes with it); offsets count from its start.
        positions: of the samples in the shuffled order.
        extensions: of the samples.
        rejects: (position, reason) of the others.
        totals: over the samples.
        spans: of the samples that had more than 8 bits.
    """

    shard: int
    count: int
    tar: str
    rows: list[tuple[int, ...]]
    positions: list[int]
    extensions: list[str]
    rejects: list[tuple[int, str]]
    totals: ChannelStats
    spans: list[Span]


def make_fragment(run: Run) -> Fragment:
    """Check the images of a run and pack the fit ones."""
    tar = bytearray()
    rows: list[tuple[int, ...]] = []
    positions: list[int] = []
    extensions: list[str] = []
    rejects: list[tuple[int, str]] = []
    totals = ChannelStats.of(run.rules.gray)
    spans: list[Span] = []
    inputs = zip(run.inputs, run.labels, run.measured, strict=True)
    with without_warnings():
        for position, (source, label, measure) in enumerate(inputs, run.first):
            image = check_input(source, run.rules, measure)
            if isinstance(image, str):
                rejects.append((position, image))
                continue
            offset = _append(tar, make_key(position), label, image)
            rows.append(make_row(offset, label, image))
            positions.append(position)
            extensions.append(image.extension)
            totals.count(image)
            spans += [image.span] if image.span else []
    path = os.path.join(run.scratch, str(run.first))
    with open(path, "wb", buffering=0) as stream:
        stream.write(tar)
    return Fragment(
        shard=run.shard,
        count=len(run.inputs),
        tar=path,
        rows=rows,
        positions=positions,
        extensions=extensions,
        rejects=rejects,
        totals=totals,
        spans=spans,
    )


def make_key(position: int) -> str:
    """Return the name of a sample in its tar: by position, so that no shard waits for another."""
    return f"{position:08d}"


def _append(tar: bytearray, key: str, label: int, image: Checked) -> int:
    """Append the members of a sample; return the offset of the image's bytes."""
    if label >= 0:  # "cls" sorts before every extension, which is the order webdataset writes in
        _append_member(tar, f"{key}.cls", str(label).encode())
    offset = len(tar) + TAR_BLOCK
    _append_member(tar, f"{key}.{image.extension}", image.content)
    return offset


def _append_member(tar: bytearray, name: str, content: bytes) -> None:
    # webdataset's TarWriter would import torch into every worker; a test holds these to its bytes.
    tar += _header(name, len(content))
    tar += content
    tar += bytes(-len(content) % TAR_BLOCK)


@cache
def _blank() -> tuple[bytes, int]:
    """Return tarfile's header of a nameless, empty member, and the sum of its bytes."""
    info = tarfile.TarInfo("")
    info.mode = 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT)
    return header, sum(header[:148]) + sum(header[156:])


def _header(name: str, size: int) -> bytes:
    # tarfile takes 20 us for each, a tenth of all the time of a small image.
    header, total = _blank()
    encoded, length = name.encode(), b"%011o" % size
    # The checksum counts its own field as eight blanks.
    total += sum(encoded) + sum(length) - sum(header[124:135]) + 8 * 32
    return b"".join(
        (
            encoded,
            header[len(encoded) : 124],
            length,
            header[135:148],
            b"%06o\0 " % total,
            header[156:],
        )
    )


def make_row(offset: int, label: int, image: Checked) -> tuple[int, ...]:
    """Return the row of an image whose bytes are at an offset; its shard is not set yet."""
    return (
        offset,
        hash_bytes(image.content),
        len(image.content),
        0,
        label,
        image.height,
        image.width,
    )
