"""Where an adopted set goes: into a new folder, or beside the shards, where other files may be."""

import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from fastmoco.core.files import hash_file, locked, make_parent, new_folder, sync, write_json
from fastmoco.dataset.dali_index import index_path
from fastmoco.dataset.manifest import HASHED
from fastmoco.errors import DataError, UsageError

_ASIDE, _LOCK = ".fastmoco-index.partial", ".fastmoco-index.lock"
_OURS = ".ours"  # names and hashes of the files that go beside the shards


@contextmanager
def told(out: Path) -> Iterator[None]:
    """Tell in plain words that `out` cannot be written."""
    try:
        yield
    except OSError as error:
        raise DataError(
            f"{out} cannot be written: {error.strerror or error}. With --out the set goes "
            "elsewhere."
        ) from error


@contextmanager
def new(out: Path) -> Iterator[Path]:
    """Yield an empty folder that becomes `out`, of one call at a time."""
    make_parent(out)
    with locked(out.with_name(f".{out.name}.lock"), out):
        if os.path.lexists(out):
            raise UsageError(f"{out} exists already: remove it or choose another name.")
        with new_folder(out) as aside:
            yield aside


def link(shards: Sequence[Path], folder: Path) -> None:
    """Make links to the shards in a folder."""
    for shard in shards:
        (folder / shard.name).symlink_to(shard.resolve())


@contextmanager
def place(folder: Path, out: Path | None, shards: Sequence[Path]) -> Iterator[Path]:
    """Yield an empty folder whose files go beside the shards, or become `out`, if all is well."""
    if out is None:
        with _beside(folder, shards) as aside:
            yield aside
        return
    with new(out) as aside:
        link(shards, aside)
        yield aside


@contextmanager
def _beside(folder: Path, shards: Sequence[Path]) -> Iterator[Path]:
    """Yield a folder whose files go beside the shards; none of somebody else's is touched."""
    aside = folder / _ASIDE
    with locked(folder / _LOCK, folder):
        _remove_begun(folder, aside)
        _refuse_strangers(folder, shards)
        aside.mkdir()
        try:
            yield aside
            files = sorted(aside.iterdir(), key=lambda path: path.name == "manifest.json")
            for path in files:
                sync(path)
            write_json(aside / _OURS, {path.name: hash_file(path) for path in files})
            _refuse_strangers(folder, shards)  # who came in the meantime
        except BaseException:
            shutil.rmtree(aside, ignore_errors=True)
            raise
        for path in files:
            path.rename(folder / path.name)
        sync(folder)
        shutil.rmtree(aside)


def _remove_begun(folder: Path, aside: Path) -> None:
    """Remove what a call left behind that was killed, perhaps while its files were renamed."""
    ours = aside / _OURS
    for name, digest in json.loads(ours.read_text()).items() if ours.exists() else ():
        path = folder / name
        if path.is_file() and hash_file(path) == digest:
            path.unlink()
    shutil.rmtree(aside, ignore_errors=True)


def _refuse_strangers(folder: Path, shards: Sequence[Path]) -> None:
    wanted = ["manifest.json", *HASHED, *(index_path(shard).name for shard in shards)]
    taken = [name for name in wanted if os.path.lexists(folder / name)]
    if taken:
        raise UsageError(
            f"{folder} has files of the names that the set needs ({', '.join(taken[:3])}): "
            "move them away, or write the set elsewhere by --out."
        )
