"""Files that are whole or absent: everything is written aside, synced, then renamed."""

import csv
import hashlib
import io
import itertools
import json
import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from fastmoco.errors import FastmocoError, UsageError

SOFTWARE = "fastmoco"
"""What the PNGs that are drawn here say of their origin, by the key of that name."""


def hash_bytes(content: bytes | memoryview) -> int:
    """Return the first 64 bits of the SHA-256, as the column `hash` of the table holds them."""
    # Little-endian, as the table is: the stored bytes are those of the digest.
    return int.from_bytes(hashlib.sha256(content).digest()[:8], "little")


def hash_file(path: Path) -> str:
    """Return the hex SHA-256 of a file's content."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def load_array(path: Path) -> npt.NDArray[Any]:
    """Map the one array of a `.npy` file that may come from anywhere.

    Raises:
        ValueError: it cannot be read, holds Python objects, or claims more than the file has.
    """
    try:
        with np.errstate(over="ignore"):  # of a claim beyond all sizes, which raises, too
            array = np.load(path, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # damaged headers raise anything, and quote themselves
        raise ValueError(str(error).split("\n")[0][:200] or type(error).__name__) from error
    if not isinstance(array, np.ndarray):
        array.close()
        raise ValueError("it is an archive of arrays")
    if not array.ndim or array.nbytes > path.stat().st_size:
        raise ValueError(f"it claims {array.nbytes} bytes in the shape {array.shape}")
    return array


def sync(path: Path) -> None:
    """Flush a file or folder to the disk, so that a later rename cannot overtake it."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_bytes(path: Path, content: bytes) -> None:
    """Replace `path` with `content` in one atomic rename."""
    aside = path.with_name(f".{path.name}.partial")
    try:
        aside.write_bytes(content)
        sync(aside)
        aside.replace(path)
    finally:
        aside.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Replace `path` with `value` as indented JSON with sorted keys."""
    write_bytes(path, (json.dumps(value, indent=2, sort_keys=True) + "\n").encode())


def to_csv(header: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as a CSV; names that are not UTF-8 keep their bytes."""
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows(itertools.chain([header], rows))
    return text.getvalue().encode("utf-8", "surrogateescape")


def make_parent(final: Path) -> None:
    """Make the folder that `final` will lie in.

    Raises:
        UsageError: it cannot be.
    """
    try:
        final.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UsageError(
            f"Cannot write {final} ({error.strerror}): choose another place."
        ) from error


def refuse_taken(outs: Sequence[Path], suffix: str, replace: bool | None = None) -> None:
    """Refuse the names of new files before the minutes or hours that their content takes.

    Args:
        outs: what --out says, then what is written beside it.
        suffix: that the first must have.
        replace: what --replace says; None: there is no such option.

    Raises:
        UsageError: a name is taken, or the suffix is another.
    """
    if outs[0].suffix != suffix:
        raise UsageError(f"--out {outs[0]} must end in {suffix}.")
    for path in outs:
        if path.exists() and not replace:
            remedy = "" if replace is None else ", or pass --replace"
            raise UsageError(f"{path} exists: choose another --out{remedy}.")


def check_replaceable(png: Path) -> None:
    """Refuse to draw a PNG on top of anything but one that was drawn here.

    Raises:
        UsageError: the name has another ending, or is that of something else.
    """
    if png.suffix != ".png":
        raise UsageError(f"{png} must end in .png.")
    if os.path.lexists(png):
        with png.open("rb") as stream:
            if f"tEXtSoftware\0{SOFTWARE}".encode() not in stream.read(4096):
                raise UsageError(f"{png} exists and was not drawn here: choose another name.")


@contextmanager
def new_file(final: Path) -> Iterator[Path]:
    """Yield a path that becomes `final` if the block succeeds, and is removed if not.

    For what a library writes by itself. The suffix stays as it is: libraries go by it.
    """
    make_parent(final)
    aside = final.with_name(f".partial.{final.name}")
    try:
        yield aside
        sync(aside)
        aside.replace(final)
    finally:
        aside.unlink(missing_ok=True)


@contextmanager
def new_folder(final: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `final` if the block succeeds, and is removed if not.

    A killed process leaves only `.NAME.partial`, which the next attempt replaces.
    """
    make_parent(final)
    partial = final.with_name(f".{final.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        yield partial
        _commit(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def resumed_folder(final: Path, begun: str) -> Iterator[Path]:
    """Yield a folder that becomes `final` if the block succeeds.

    The folder, `.NAME.partial`, outlives an interruption, and is yielded with what it holds when
    the next attempt is of the same `begun`; otherwise it starts empty. A `FastmocoError` removes
    it: the attempt was refused, not interrupted.

    Args:
        final: must not exist.
        begun: says what is being made, as a hash of everything that decides the content.

    Raises:
        UsageError: another process is at it, or was.
    """
    final.parent.mkdir(parents=True, exist_ok=True)
    partial = final.with_name(f".{final.name}.partial")
    mark = partial / ".begun"
    with locked(final.with_name(f".{final.name}.lock"), final):
        if os.path.lexists(final):  # another process was quicker
            raise UsageError(f"{final} exists already: remove it or choose another name.")
        if not mark.exists() or mark.read_text() != begun:
            shutil.rmtree(partial, ignore_errors=True)
            partial.mkdir()
            write_bytes(mark, begun.encode())
        try:
            yield partial
            mark.unlink()
            _commit(partial, final)
        except FastmocoError:
            shutil.rmtree(partial, ignore_errors=True)
            raise


def _commit(partial: Path, final: Path) -> None:
    """Rename a folder once all that is in it is on the disk."""
    for folder, _, files in os.walk(partial):
        for path in (*files, "."):
            sync(Path(folder, path))
    partial.rename(final)
    sync(final.parent)


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Hold the lock file `path` while `what` is written.

    Raises:
        UsageError: another process holds it.
    """
    lock = FileLock(path)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        raise UsageError(f"Another process is writing {what}: wait for it.") from None
    try:
        yield
    finally:
        path.unlink(missing_ok=True)
        lock.release()
