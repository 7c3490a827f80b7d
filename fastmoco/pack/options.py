"""How to pack."""

import re
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from fastmoco.errors import UsageError
from fastmoco.pack.image import Rules
from fastmoco.pack.levels import Levels


@dataclass(frozen=True)
class PackOptions:
    """How to pack.

    Attributes:
        format: of the source, a name of `sources.FORMATS`; None: recognized.
        seed: of the global shuffle.
        unlabelled: ignore the labels of the source and store none.
        root: holds the images that a CSV lists; None: the folder of the CSV.
        classes_at: which folders are the classes, one of `reader.CLASSES_AT`; None: recognized.
        like: a set that has the classes of the source, and numbers them.
        splits: parts to divide the source into, each with its fraction; empty: none.
        dedupe: leave out images whose bytes came before.
        shard_mb: the size that no shard exceeds, in MB of 10^6 bytes; see `Schedule`.
        min_side: the smallest height and width allowed, in pixels.
        max_mpixels: the largest area allowed, in 10^6 pixels.
        max_mb: the largest encoded image allowed, in MiB.
        short_side: shrink larger images to this short side, in pixels; None: keep the bytes.
        square: cut every image to its central square and resize it to this side, in pixels.
        quality: of the JPEGs that resizing gives.
        levels: of more than 8 bits, see `Rules`; None: judged by `levels.judge`.
        gray: make a set of one channel, of 16 bits where an image has more than 8.
        workers: processes that decode; the bytes written do not depend on it.
        max_rejects: the number of images left out above which nothing is packed;
            by default 1 % of the images, and at least 10.

    Raises:
        UsageError: both `short_side` and `square`.
    """

    format: str | None = None
    seed: int = 0
    root: Path | None = None
    unlabelled: bool = False
    classes_at: str | None = None
    like: Path | None = None
    splits: tuple[tuple[str, float], ...] = ()
    dedupe: bool = False
    shard_mb: int = 128
    min_side: int = 1
    max_mpixels: float = 100
    max_mb: float = 128
    short_side: int | None = None
    square: int | None = None
    quality: int = 90
    levels: Levels | None = None
    gray: bool = False
    workers: int = 1
    max_rejects: int | None = None

    def __post_init__(self) -> None:
        if self.square and self.short_side:
            raise UsageError("--square and --short-side both say how large: choose one.")

    @property
    def rules(self) -> Rules:
        """What is accepted, and what becomes of it."""
        return Rules(
            min_side=self.min_side,
            max_pixels=int(self.max_mpixels * 10**6),
            max_bytes=int(self.max_mb * 2**20),
            short_side=self.short_side,
            square=self.square,
            quality=self.quality,
            levels=self.levels,
            gray=self.gray,
        )

    def recorded(self) -> dict[str, Any]:
        """Return the options that decide what is written."""
        left_out = ("format", "root", "classes_at", "like", "splits", "workers", "max_rejects")
        chosen = {name: value for name, value in asdict(self).items() if name not in left_out}
        for newer in ("levels", "square", "gray"):  # sets from before keep their options' bytes
            if not chosen[newer]:
                del chosen[newer]
        return {**chosen, "splits": dict(self.splits)}


def reject_limit(given: int | None, images: int) -> int:
    """Return how many of the images may be left out: 1 %, and at least 10, unless it is given."""
    return max(10, images // 100) if given is None else given


def parse_splits(text: str | None) -> tuple[tuple[str, float], ...]:
    """Read `train=0.9,val=0.1`.

    Raises:
        UsageError: not of that form, a name twice, or fractions that do not sum to 1.
    """
    if not text:
        return ()
    form = f"--splits {text}: write NAME=SHARE,NAME=SHARE with shares that sum to 1."
    try:
        pairs = [part.split("=") for part in text.split(",")]
        splits = tuple((name.strip(), float(share)) for name, share in pairs)
    except ValueError:
        raise UsageError(form) from None
    names = [name for name, _ in splits]
    sound = all(re.fullmatch(r"[\w-]+", name) for name in names) and len(set(names)) == len(names)
    if (
        not sound
        or not all(share > 0 for _, share in splits)  # nor a NaN
        or abs(sum(dict(splits).values()) - 1) > 1e-6
    ):
        raise UsageError(form)
    return splits
