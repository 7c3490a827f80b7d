"""The folder of images that a benchmark is given: listed, repeated, warmed, described."""

import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from fastmoco.core.environment import digest_of_inputs
from fastmoco.errors import DataError, UsageError

SUFFIXES = (".jpg", ".jpeg", ".png", ".webp")


def names_of(source: Path) -> list[str]:
    """Return the images below a folder, sorted, as posix paths below it.

    Raises:
        UsageError: no such folder.
        DataError: no images in it.
    """
    if not source.is_dir():
        raise UsageError(f"{source} is not a folder.")
    paths = [path for path in source.rglob("*") if path.suffix.lower() in SUFFIXES]
    if not paths:
        raise DataError(f"{source} holds no images ({', '.join(SUFFIXES)}).")
    return sorted(path.relative_to(source).as_posix() for path in paths)


def repeated(source: Path, names: Sequence[str], count: int, scratch: Path) -> Path:
    """Return a folder in which each image occurs `count` times, as hard links where possible."""
    if count == 1:
        return source.resolve()
    root = scratch / "source"
    for name in names:
        folder = (root / name).parent
        folder.mkdir(parents=True, exist_ok=True)
        for copy in range(count):
            _link(source / name, folder / f"{copy}-{Path(name).name}")
    return root


def _link(path: Path, to: Path) -> None:
    try:
        os.link(path, to)
    except OSError:  # another owner's file, or a file system without links
        shutil.copyfile(path, to)


@contextmanager
def scratch_beside(source: Path) -> Iterator[Path]:
    """Yield a folder on the file system of `source`, gone afterwards.

    Raises:
        UsageError: nothing can be written there.
    """
    beside = source.resolve().parent
    try:
        made = tempfile.TemporaryDirectory(prefix=".fastmoco-bench-", dir=beside)
    except OSError as error:
        raise UsageError(
            f"Nothing can be written beside {source} ({error.strerror}): copy the folder to a "
            "place of your own."
        ) from error
    with made as folder:
        yield Path(folder)


def warm(root: Path) -> None:
    """Read everything once: no arm shall be the one that waits for the disk."""
    for path in root.rglob("*"):
        if path.is_file():
            path.read_bytes()


def subject_of(source: Path, names: Sequence[str], count: int) -> dict[str, Any]:
    """Return what a report says of its images; no absolute path enters it."""
    return {
        "source": source.resolve().name,
        "images": len(names) * count,
        "inputs_sha256": digest_of_inputs((name, (source / name).stat().st_size) for name in names),
    }
