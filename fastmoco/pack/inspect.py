"""`fastmoco inspect`: what a set holds, in numbers and as a sheet of samples."""

import math
import random
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from rich.console import Console
from rich.table import Table
from rich.text import Text

from fastmoco.core.files import write_bytes
from fastmoco.core.terminal import printable
from fastmoco.dataset.dali_index import index_path, read_header, read_lines
from fastmoco.dataset.manifest import CHUNK
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.contact_sheet import draw_sheet

IMAGES = ("jpg", "png", "webp")
_SHOWN_CLASSES = 20
_BAR = 32  # characters of the longest bar


@dataclass(frozen=True)
class Spread:
    """How a whole number is distributed over the samples.

    Attributes:
        least, median, most: of all samples; the median is the lower one of an even number.
        bins: (low, high, samples): of how many samples low <= number < high, by powers of two.
    """

    least: int
    median: int
    most: int
    bins: tuple[tuple[int, int, int], ...]


@dataclass(frozen=True)
class Summary:
    """What a set holds.

    Attributes:
        root: its folder.
        set_id: its identity.
        samples, rejected, progressive, shards: counts.
        bytes: of all shards.
        image_bytes: of all images.
        classes: samples of each class by its name.
        unlabelled: samples without a label.
        formats: samples of each file format.
        short_sides: in pixels.
        sizes: bytes of the images.
        channels, bits: of an image, and of each channel at the most.
        mean, std: of the channels, in 0..1 units.
        options: those that it was packed with.
        tables: names of the side tables of labels.
    """

    root: Path
    set_id: str
    samples: int
    rejected: int
    progressive: int
    shards: int
    bytes: int
    image_bytes: int
    classes: dict[str, int]
    unlabelled: int
    formats: dict[str, int]
    short_sides: Spread
    sizes: Spread
    channels: int
    bits: int
    mean: list[float]
    std: list[float]
    options: dict[str, Any]
    tables: list[str]


def inspect_set(root: Path) -> Summary:
    """Return what a set holds; reads its tables and indexes, no image.

    Raises:
        DataError: there is no set, or it is damaged.
    """
    shard_set = ShardSet(root)
    manifest = shard_set.manifest
    return Summary(
        root=shard_set.root,
        set_id=manifest.set_id,
        samples=manifest.samples,
        rejected=manifest.rejected,
        progressive=manifest.progressive,
        shards=len(manifest.shards),
        bytes=sum(shard.bytes for shard in manifest.shards),
        image_bytes=sum(int(rows["size"].sum(dtype=np.uint64)) for rows in _chunks(shard_set)),
        classes=dict(zip(manifest.classes, manifest.class_counts, strict=True)),
        unlabelled=sum(int((rows["label"] < 0).sum()) for rows in _chunks(shard_set)),
        formats=_formats(shard_set),
        short_sides=_spread(shard_set, lambda rows: np.minimum(rows["height"], rows["width"])),
        sizes=_spread(shard_set, lambda rows: rows["size"]),
        channels=manifest.channels,
        bits=manifest.bits,
        mean=manifest.mean,
        std=manifest.std,
        options=manifest.options,
        tables=sorted(path.stem for path in (shard_set.root / "labels").glob("*.json")),
    )


def _chunks(shard_set: ShardSet) -> Iterator[npt.NDArray[np.void]]:
    for start in range(0, len(shard_set), CHUNK):
        yield shard_set.samples[start : start + CHUNK]


def _formats(shard_set: ShardSet) -> dict[str, int]:
    counts: Counter[str] = Counter()
    for shard in shard_set.manifest.shards:
        path = index_path(shard_set.root / shard.name)
        try:
            with path.open("rb") as stream:
                read_header(stream)
                for line in read_lines(stream):
                    counts.update(c.extension for c in line or () if c.extension in IMAGES)
        except OSError as error:
            raise DataError(f"{path} cannot be read: `fastmoco verify` tells more.") from error
    return dict(counts.most_common())


def _spread(
    shard_set: ShardSet, column: Callable[[npt.NDArray[np.void]], npt.NDArray[np.unsignedinteger]]
) -> Spread:
    """Return the distribution of a column, of numbers below 2**32."""
    upper, bits = np.zeros(2**16, dtype=np.int64), np.zeros(34, dtype=np.int64)
    least, most = 2**32, 0
    for rows in _chunks(shard_set):
        values = column(rows).astype(np.int64)
        upper += np.bincount(values >> 16, minlength=len(upper))
        bits += np.bincount(np.frexp(values)[1], minlength=len(bits))  # 2**(bits - 1) <= value
        least, most = min(least, int(values.min())), max(most, int(values.max()))
    bins = [(2**bit >> 1, 2**bit, count) for bit, count in enumerate(bits.tolist())]
    used = [place for place, (_, _, count) in enumerate(bins) if count]
    return Spread(
        least, _median(shard_set, column, upper), most, tuple(bins[used[0] : used[-1] + 1])
    )


def _median(
    shard_set: ShardSet,
    column: Callable[[npt.NDArray[np.void]], npt.NDArray[np.unsignedinteger]],
    upper: npt.NDArray[np.int64],
) -> int:
    """Return the exact median from the counts of the upper 16 bits, in one more pass."""
    rank = (len(shard_set) - 1) // 2
    high = int(np.searchsorted(upper.cumsum(), rank, side="right"))
    lower = np.zeros(2**16, dtype=np.int64)
    for rows in _chunks(shard_set):
        values = column(rows).astype(np.int64)
        lower += np.bincount(values[values >> 16 == high] & 0xFFFF, minlength=len(lower))
    rank -= int(upper[:high].sum())
    return (high << 16) + int(np.searchsorted(lower.cumsum(), rank, side="right"))


def show(summary: Summary, console: Console) -> None:
    """Print a summary as plain aligned text."""
    console.print(_rows(_facts(summary)))
    if summary.classes:
        console.print("\nclasses")
        console.print(_rows(_class_rows(summary.classes), numbers=True))
    for title, spread in (
        ("short side, pixels", summary.short_sides),
        ("image, bytes", summary.sizes),
    ):
        console.print(
            f"\n{title}: {spread.least} to {spread.most}, median {spread.median}", highlight=False
        )
        console.print(_histogram(spread))


def _facts(summary: Summary) -> list[tuple[str, str]]:
    labelled = summary.samples - summary.unlabelled
    words = {0: "no label", summary.samples: "all labelled"}
    options = [f"{name} {value}" for name, value in summary.options.items() if value]
    return [
        ("set", str(summary.root)),
        ("id", summary.set_id),
        ("samples", f"{summary.samples}, {words.get(labelled, f'{labelled} labelled')}"),
        ("classes", str(len(summary.classes))),
        ("left out", f"{summary.rejected}" + (", see rejects.jsonl" if summary.rejected else "")),
        ("shards", f"{summary.shards}, {summary.bytes / 1e6:.1f} MB"),
        ("images", f"{summary.image_bytes / 1e6:.1f} MB"),
        ("formats", ", ".join(f"{name} {count}" for name, count in summary.formats.items())),
        ("progressive", f"{summary.progressive} JPEGs (hardware decoders skip them)"),
        ("channels", f"{summary.channels} of {summary.bits} bits"),
        ("mean", " ".join(f"{value:.4f}" for value in summary.mean)),
        ("std", " ".join(f"{value:.4f}" for value in summary.std)),
        ("options", ", ".join(options) or "none"),
        ("label tables", ", ".join(summary.tables) or "none"),
    ]


def _class_rows(classes: dict[str, int]) -> list[tuple[str, str]]:
    rows = [(name, str(count)) for name, count in list(classes.items())[:_SHOWN_CLASSES]]
    rest = list(classes.values())[_SHOWN_CLASSES:]
    if rest:
        rows.append((f"and {len(rest)} more", f"{min(rest)} to {max(rest)}"))
    return rows


def _rows(rows: list[tuple[str, str]], numbers: bool = False) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(justify="right" if numbers else "left", overflow="fold")
    for name, value in rows:
        table.add_row(_plain(name), _plain(value))
    return table


def _histogram(spread: Spread) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    for _ in range(2):
        table.add_column(justify="right", no_wrap=True)
    table.add_column(no_wrap=True)
    highest = max(count for _, _, count in spread.bins)
    for low, high, count in spread.bins:
        table.add_row(f"{low} - {high - 1}", str(count), "#" * math.ceil(_BAR * count / highest))
    return table


def _plain(text: str) -> Text:
    return Text(printable(text))  # not markup


def contact_sheet(root: Path, path: Path, count: int = 64, seed: int = 0) -> None:
    """Draw random samples of a set as a grid, each with its id and its class.

    Args:
        root: the set.
        path: of the PNG.
        count: samples; fewer if the set has fewer.
        seed: of the choice.

    Raises:
        DataError: there is no set, or it is damaged.
        UsageError: the PNG cannot be written.
    """
    shard_set = ShardSet(root)
    rows = sorted(random.Random(seed).sample(range(len(shard_set)), min(count, len(shard_set))))
    captions = [_caption(shard_set, row) for row in rows]
    try:
        write_bytes(path, draw_sheet(shard_set, rows, captions))
    except OSError as error:
        raise UsageError(f"{path} cannot be written: {error.strerror or error}.") from error


def _caption(shard_set: ShardSet, row: int) -> str:
    label, classes = int(shard_set.samples["label"][row]), shard_set.manifest.classes
    name = classes[label] if 0 <= label < len(classes) else ""
    return f"{row} {name}"
