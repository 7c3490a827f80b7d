"""Packing a folder: ours against the loop of PIL and webdataset that people write.

Every arm lists the folder, shuffles, decodes every image in full, and writes its bytes, or what
shrinking made of them, with its class into tars. What ours does beyond that (hashes, tables,
channel statistics, syncing to the disk) is part of its time.
"""

import hashlib
import os
import random
import tarfile
import tempfile
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from io import BytesIO
from multiprocessing import Pool
from pathlib import Path
from typing import Any

import numpy as np
from harness.arm import Section
from harness.compare import Arm, OnRow, compare
from harness.images import names_of, repeated, scratch_beside, subject_of, warm
from harness.report import Report
from PIL import Image

EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
CHUNK = 16  # images that a worker of the pool takes at a time


@dataclass(frozen=True)
class Settings:
    """What every arm does.

    Attributes:
        short_side: shrink larger images to this short side, in pixels; None: keep the bytes.
        quality: of the JPEGs that shrinking gives.
        repeat: how many times each image occurs.
        pool: measure the loop with a pool of processes too.
    """

    short_side: int | None = None
    quality: int = 90
    repeat: int = 1
    pool: bool = False


def bench_pack(
    source: Path,
    settings: Settings,
    pairs: int,
    against_itself: bool = False,
    on_row: OnRow | None = None,
) -> Report:
    """Measure how fast a folder is packed.

    Scratch files lie beside the folder while it runs.

    Raises:
        UsageError: no such folder, or nothing can be written beside it.
        DataError: it holds no images.
        ArmFailed: an arm failed.
    """
    names = names_of(source)
    subject = {**subject_of(source, names, settings.repeat), **asdict(settings)}
    with scratch_beside(source) as scratch:
        root = repeated(source, names, settings.repeat, scratch)
        warm(root)
        arms = _arms(root, scratch, settings)
        return compare(arms, pairs, on_row=on_row, against_itself=against_itself, subject=subject)


def _arms(root: Path, scratch: Path, settings: Settings) -> dict[str, Arm]:
    functions = {"fastmoco": "ours", "pil+webdataset": "plain"}
    if settings.pool:
        functions["pil+webdataset+pool"] = "pooled"
    options = {
        "source": str(root),
        "scratch": str(scratch),
        "short_side": settings.short_side,
        "quality": settings.quality,
    }
    return {name: Arm.of(f"{__name__}:{of}", **options) for name, of in functions.items()}


def ours(
    section: Section, source: str, scratch: str, short_side: int | None, quality: int
) -> dict[str, Any]:
    """Pack with this program on all cores; its workers start inside the section."""
    from fastmoco.pack.options import PackOptions
    from fastmoco.pack.packer import pack

    options = PackOptions(short_side=short_side, quality=quality, workers=_cores())
    return _measured(section, scratch, lambda out: pack(Path(source), out, options))


def plain(
    section: Section, source: str, scratch: str, short_side: int | None, quality: int
) -> dict[str, Any]:
    """Pack with a loop in one process."""
    import webdataset  # noqa: F401  # its import is not what is measured

    def work(out: Path) -> None:
        names = _shuffled_names(Path(source))
        images = (_prepared(Path(source) / name, short_side, quality) for name in names)
        _write(out, names, images)

    return _measured(section, scratch, work)


def pooled(
    section: Section, source: str, scratch: str, short_side: int | None, quality: int
) -> dict[str, Any]:
    """Pack with a loop that a pool of processes decodes for."""
    import webdataset  # noqa: F401

    def work(out: Path) -> None:
        names = _shuffled_names(Path(source))
        prepare = partial(_prepared, short_side=short_side, quality=quality)
        with Pool(_cores()) as pool:
            paths = [Path(source) / name for name in names]
            _write(out, names, pool.imap(prepare, paths, chunksize=CHUNK))
            pool.close()
            pool.join()

    return _measured(section, scratch, work)


def _measured(section: Section, scratch: str, work: Callable[[Path], object]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory(dir=scratch) as folder:
        out = Path(folder) / "set"
        with section:
            work(out)
        return stored_in(out)


def _cores() -> int:
    return len(os.sched_getaffinity(0))


def _shuffled_names(source: Path) -> list[str]:
    names = names_of(source)
    random.Random(0).shuffle(names)
    return names


def _prepared(path: Path, short_side: int | None, quality: int) -> tuple[str, bytes] | None:
    """Return extension and bytes of an image to store, None for one that PIL cannot read."""
    content = path.read_bytes()
    try:
        with Image.open(BytesIO(content)) as image:
            image.load()
            if short_side is not None and min(image.size) > short_side:
                return "jpg", _shrunk(image, short_side, quality)
            extension = EXTENSIONS.get(image.format or "", "img")
            return extension, content
    except Exception:  # as such loops do: PIL has many ways to say that an image is damaged
        return None


def _shrunk(image: Image.Image, short_side: int, quality: int) -> bytes:
    scale = short_side / min(image.size)
    size = (round(scale * image.width), round(scale * image.height))
    buffer = BytesIO()
    small = image.convert("RGB").resize(
        size, Image.Resampling.BILINEAR
    )  # our filter: the same work
    small.save(buffer, "JPEG", quality=quality)
    return buffer.getvalue()


def _write(out: Path, names: Sequence[str], images: Iterable[tuple[str, bytes] | None]) -> None:
    from webdataset import TarWriter

    classes = sorted({_get_class(name) for name in names})
    out.mkdir()
    with TarWriter(str(out / "set.tar")) as tar:
        for number, (name, image) in enumerate(zip(names, images, strict=True)):
            if image is None:
                continue
            extension, content = image
            sample = {"__key__": f"{number:08d}", extension: content}
            label = {"cls": classes.index(_get_class(name))} if classes != [""] else {}
            tar.write({**sample, **label})


def _get_class(name: str) -> str:
    folder, slash, _ = name.partition("/")
    return folder if slash else ""


def stored_in(out: Path) -> dict[str, Any]:
    """Return what the tars below a folder hold, in the form of an arm's result.

    Each image counts the same, whatever its size. JPEGs are decoded at an eighth of their size,
    which keeps their means. The digest is the sum of the images' SHA-256: it knows no order.
    """
    seen = _Seen()
    for path in sorted(out.rglob("*.tar")):
        with tarfile.open(path) as tar:
            while member := tar.next():
                tar.members.clear()  # type: ignore[attr-defined]  # it would grow with the archive
                stream = tar.extractfile(member)
                if stream is not None:
                    seen.add(member.name, stream.read())
    return seen.result()


class _Seen:
    """Sums over stored images; bounded memory, whatever their number."""

    def __init__(self) -> None:
        self.images = self.labels = self.bytes = self.digest = 0
        self.sums = np.zeros((2, 3))  # of the channels' means and mean squares, 0..255
        self.sides = np.zeros(2)

    def add(self, name: str, content: bytes) -> None:
        if name.endswith(".cls"):
            self.labels += 1
            return
        self.images += 1
        self.bytes += len(content)
        self.digest += int.from_bytes(hashlib.sha256(content).digest())
        with Image.open(BytesIO(content)) as image:
            self.sides += image.size
            image.draft("RGB", (1, 1))
            pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
        self.sums += (pixels.mean((0, 1)), (pixels**2).mean((0, 1)))

    def result(self) -> dict[str, Any]:
        count = max(self.images, 1)
        mean, square = self.sums / count
        width, height = (self.sides / count).tolist()
        check = {
            "labelled": self.labels,
            "mean": mean.tolist(),
            "std": np.sqrt(square - mean**2).tolist(),
            "mean_width": width,
            "mean_height": height,
        }
        details = {"stored_bytes": self.bytes, "images_digest": f"{self.digest % 2**256:064x}"}
        return {"images": self.images, "check": check, "details": details}
