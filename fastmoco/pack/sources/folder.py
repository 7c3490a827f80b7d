"""A folder of image files: by class, by split and class, or flat."""

import os
from pathlib import Path

from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs
from fastmoco.pack.sources.base import Names, Reject, Source, by_name
from fastmoco.pack.sources.layout import SUFFIX, first_folder, sources_by_layout


def open_folder(root: Path, unlabelled: bool = False) -> dict[str, Source]:
    """List the images below a folder; hidden files and folders do not count.

    Returns:
        The source of each split, "" where the layout has none.

    Raises:
        DataError: no images, or a layout that does not give sound labels.
    """
    names, left_out = _list_files(root)
    inputs = FileInputs(root, Names(names))
    sources = sources_by_layout(names, inputs, left_out, str(root), unlabelled)
    if any(source.classes for source in sources.values()):
        _refuse_empty_folders(root, names)
    return sources


def _list_files(root: Path) -> tuple[list[str], list[Reject]]:
    names: list[str] = []
    left_out: list[Reject] = []
    real_root = os.path.realpath(root)
    for path in _visible_files(root):
        name = Path(os.path.relpath(path, root)).as_posix()
        reason = _why_not(path, real_root)
        if reason:
            left_out.append(Reject(name, reason))
        else:
            names.append(name)
    return sorted(names, key=os.fsencode), sorted(left_out, key=by_name)


def _visible_files(root: Path) -> list[str]:
    """Return all paths that are not folders; a link to a folder is one of them."""
    found: list[str] = []
    for folder, subfolders, files in os.walk(root, onerror=_unreadable):
        subfolders[:] = [name for name in subfolders if not name.startswith(".")]
        links = [name for name in subfolders if os.path.islink(os.path.join(folder, name))]
        found += [os.path.join(folder, name) for name in files + links if name[0] != "."]
    return found


def _unreadable(error: OSError) -> None:
    raise DataError(f"{error.filename} cannot be listed: {error.strerror}.")


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


def _refuse_empty_folders(root: Path, names: list[str]) -> None:
    """A class folder without images would shift the numbers of the classes behind it."""
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    empty = sorted(name for name in folders - set(map(first_folder, names)) if name[0] != ".")
    if empty:
        raise DataError(f"{root / empty[0]} holds no images: fill the class or remove the folder.")
