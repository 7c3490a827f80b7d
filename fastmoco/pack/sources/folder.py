"""A folder of image files: by class, by split and class, or flat."""

import os
from collections.abc import Iterator
from pathlib import Path

from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs
from fastmoco.pack.sources.base import Names, Reject, Source
from fastmoco.pack.sources.layout import SUFFIX, first_folder, sources_by_layout


def open_folder(root: Path, unlabelled: bool = False) -> dict[str, Source]:
    """List the images below a folder; hidden files and folders do not count.

    Returns:
        The source of each split, "" where the layout has none.

    Raises:
        DataError: no images, or a layout that does not give sound labels.
    """
    names, left_out = _list_files(root)
    inputs = FileInputs(root, names)
    sources = sources_by_layout(names, inputs, left_out, str(root), unlabelled)
    if any(source.classes for source in sources.values()):
        _refuse_empty_folders(root, names)
    return sources


def _list_files(root: Path) -> tuple[Names, list[Reject]]:
    names = Names()
    left_out: list[Reject] = []
    real_root = os.path.realpath(root)
    for name in _visible_files(os.fsencode(root)):
        reason = _why_not(os.path.join(root, name), real_root)
        if reason:
            left_out.append(Reject(name, reason))
        else:
            names.add(name)
    return names, left_out


def _visible_files(root: bytes) -> Iterator[str]:
    """Yield the path below the root of all that is no folder, in the order of their bytes.

    A link to a folder is no folder. One folder at a time is sorted: there may be millions of files.
    """
    waiting = [b""]  # the next one last; folders end in a slash, which sorts them among the files
    while waiting:
        name = waiting.pop()
        if name and not name.endswith(b"/"):
            yield os.fsdecode(name)
        else:
            waiting += sorted((name + entry for entry in _entries(root, name)), reverse=True)


def _entries(root: bytes, folder: bytes) -> Iterator[bytes]:
    """Yield the names in a folder that are not hidden, those of folders with a slash behind."""
    try:
        with os.scandir(os.path.join(root, folder)) as entries:
            for entry in entries:
                if not entry.name.startswith(b"."):
                    yield entry.name + b"/" * entry.is_dir(follow_symlinks=False)
    except OSError as error:
        where = os.fsdecode(error.filename)
        raise DataError(f"{where} cannot be listed: {error.strerror}.") from error


def _why_not(path: str, real_root: str) -> str | None:
    """Return why a path is not taken for an image, None if it is."""
    real = os.path.realpath(path) if os.path.islink(path) else path
    if real is not path and os.path.commonpath([real, real_root]) != real_root:
        return "is a link that leaves the source folder"
    if not os.path.isfile(real):
        return "is not a regular file"
    if not SUFFIX.fullmatch(os.path.splitext(path)[1]):
        return "does not have the extension of an image"
    return None


def _refuse_empty_folders(root: Path, names: Names) -> None:
    """A class folder without images would shift the numbers of the classes behind it."""
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    empty = sorted(name for name in folders - set(map(first_folder, names)) if name[0] != ".")
    if empty:
        raise DataError(f"{root / empty[0]} holds no images: fill the class or remove the folder.")
