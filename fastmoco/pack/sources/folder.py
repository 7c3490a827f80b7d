"""A folder of image files: by class, by split and class, or flat."""

import os
from collections.abc import Callable, Iterator
from pathlib import Path

from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs
from fastmoco.pack.kinds import HIDDEN, START, hidden_folder
from fastmoco.pack.sources.base import Source
from fastmoco.pack.sources.found import Found
from fastmoco.pack.sources.layout import sources_by_layout
from fastmoco.pack.sources.reader import How

ODD = b"\0"  # stands behind the name of what is neither a file nor a folder: no name holds it


def open_folder(root: Path, unlabelled: bool = False, how: How | None = None) -> dict[str, Source]:
    """List the images below a folder.

    Links are followed, wherever they lead; only a folder that is its own ancestor is not.

    Args:
        root: the folder.
        unlabelled: read no classes from the layout.
        how: to read the layout; by default as `unlabelled` says.

    Returns:
        The source of each split, "" where the layout has none.

    Raises:
        DataError: see `sources_by_layout`.
    """
    found = listed(root)
    inputs = FileInputs(root, found.names)
    if inputs.aliases:
        found.notes.append(
            f"{inputs.aliases} images are there under more than one name, by links, and packed "
            "under each"
        )
    how = how or How(unlabelled)
    return sources_by_layout(found, found.names, found.names, inputs, str(root), how)


def listed(root: Path) -> Found:
    """Return what is below a folder.

    Raises:
        DataError: a folder cannot be listed.
    """
    return _Walk(root).found


class _Walk:
    """Walks through a folder, and sorts its files into a `Found`."""

    def __init__(self, root: Path) -> None:
        self.root = os.fsencode(root)
        self.found = Found()
        self._linked: list[bytes] = []  # folders that are reached by a link
        for name in self._entries():
            self._see(name)
        self.found.settle()

    def _see(self, name: bytes) -> None:
        path = os.fsdecode(name.removesuffix(ODD))
        if name.endswith(ODD):
            self._see_odd(path)
        elif self.found.judge(path, lambda: self._start(path)):
            self.found.names.add(path)

    def _see_odd(self, path: str) -> None:
        whole = os.path.join(self.root, os.fsencode(path))
        if os.path.islink(whole):
            # One without an extension may have led to a folder: to a class.
            if "." not in os.path.basename(path) or self.found.judge(path, lambda: b""):
                self.found.leave_out(path, "is a link to what is not there")
        elif self.found.judge(path, lambda: b""):
            self.found.leave_out(path, "is not a regular file")

    def _start(self, path: str) -> bytes:
        try:
            with open(os.path.join(self.root, os.fsencode(path)), "rb", buffering=0) as stream:
                return stream.read(START)
        except OSError:
            return b""

    def _entries(self) -> Iterator[bytes]:
        """Yield the path below the root of all that is no folder, in the order of their bytes.

        One folder at a time is sorted: there may be millions of files.
        """
        waiting = [b""]  # the next one last; folders end in a slash, and sort among files by it
        while waiting:
            name = waiting.pop()
            if name and not name.endswith(b"/"):
                yield name
            elif name and self._is_own_ancestor(name[:-1]):
                self.found.leave_out(
                    os.fsdecode(name[:-1]), "is a link to a folder that it lies in"
                )
            else:
                waiting += sorted((name + entry for entry in self._listed(name)), reverse=True)

    def _listed(self, folder: bytes) -> Iterator[bytes]:
        """Yield the names in a folder, those of folders with a slash behind."""
        if folder:
            self.found.folders.add(os.fsdecode(folder[:-1]))
        try:
            with os.scandir(os.path.join(self.root, folder)) as entries:
                for entry in entries:
                    if not _is(entry.is_dir):
                        yield entry.name if _is(entry.is_file) else entry.name + ODD
                    elif hidden_folder(os.fsdecode(entry.name)):
                        self.found.pass_over(os.fsdecode(folder + entry.name), HIDDEN)
                    else:
                        if entry.is_symlink():
                            self._linked.append(folder + entry.name)
                        yield entry.name + b"/"
        except OSError as error:
            where = os.fsdecode(error.filename)
            raise DataError(f"{where} cannot be listed: {error.strerror}.") from error

    def _is_own_ancestor(self, folder: bytes) -> bool:
        """Whether a folder, which links may lead to, is or holds one of those that lead to it."""
        if not any(folder == link or folder.startswith(link + b"/") for link in self._linked):
            return False
        real = os.path.realpath(os.path.join(self.root, folder))
        parts = folder.split(b"/")
        above = (os.path.join(self.root, *parts[:count]) for count in range(len(parts)))
        return any((os.path.realpath(one) + b"/").startswith(real + b"/") for one in above)


def _is(question: Callable[[], bool]) -> bool:
    """Answer by a directory entry; a link that leads in circles is neither file nor folder."""
    try:
        return question()
    except OSError:
        return False
