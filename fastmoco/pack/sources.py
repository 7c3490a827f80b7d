"""Finding the images of a folder, and the labels that its layout gives them."""

import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from fastmoco.errors import DataError, UsageError
from fastmoco.shardset import ShardSet

# A suffix only says which files are meant as images; what they are, `check` reads from the bytes.
SUFFIX = re.compile(r"\.(jpe?g|jpe|jfif|png|webp|bmp|tiff?|gif|p[bgpn]m)", re.IGNORECASE)
SPLIT = re.compile(r"train(ing)?|val(id(ation)?)?|test(ing)?|unlabell?ed", re.IGNORECASE)


class Reject(NamedTuple):
    """An input that does not enter the set."""

    name: str
    reason: str


@dataclass(frozen=True)
class Source:
    """The images of one folder.

    Attributes:
        root: the folder.
        names: posix paths below `root`, sorted by their bytes.
        labels: the class number of each image, -1 for none.
        classes: the name of each class number; empty without labels.
        left_out: files that were passed over, sorted by name.
    """

    root: Path
    names: list[str]
    labels: list[int]
    classes: list[str]
    left_out: list[Reject]


def find_images(root: Path, unlabelled: bool = False, like: Path | None = None) -> Source:
    """List the images below a folder; hidden files and folders do not count.

    Images in subfolders take the first subfolder's name as their class; a folder without
    subfolders has no labels.

    Args:
        root: a class folder (`root/<class>/**`) or a flat folder.
        unlabelled: ignore the layout and give no labels.
        like: a shard set whose classes, and their numbers, the images must have.

    Raises:
        UsageError: `root` is not a folder, or `like` is given for unlabelled images.
        DataError: no images, or a layout that does not give sound labels.
    """
    if not root.is_dir():
        raise UsageError(f"{root} is not a folder: SOURCE must be a folder of images.")
    if unlabelled and like:
        raise UsageError("--like compares classes, --unlabelled has none: drop one of them.")
    names, left_out = _list_files(root)
    if not names:
        first = "".join(f" ({reject.name}: {reject.reason})" for reject in left_out[:1])
        raise DataError(f"{root} holds no images{first}.")
    classes = [] if unlabelled else _classes(root, names)
    if like:
        classes = _agreed(classes, like)
    numbers = {name: number for number, name in enumerate(classes)}
    labels = [numbers[_folder(name)] if classes else -1 for name in names]
    return Source(root, names, labels, classes, left_out)


def by_name(reject: Reject) -> bytes:
    """Return the key that sorts rejects in the order of the source."""
    return os.fsencode(reject.name)


def _folder(name: str) -> str:
    return name.partition("/")[0]


def _list_files(root: Path) -> tuple[list[str], list[Reject]]:
    names: list[str] = []
    left_out: list[Reject] = []
    for path in _visible_files(root):
        name = Path(os.path.relpath(path, root)).as_posix()
        reason = _why_not(path, os.path.realpath(root))
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


def _classes(root: Path, names: list[str]) -> list[str]:
    """Return the class names that the layout gives, none for a flat folder."""
    beside = [name for name in names if "/" not in name]
    classes = sorted({_folder(name) for name in names if "/" in name}, key=os.fsencode)
    if not classes:
        return []
    if all(SPLIT.fullmatch(name) for name in classes):
        raise DataError(f"{root} holds splits ({', '.join(classes)}): pack each by itself.")
    if beside:
        raise DataError(
            f"{root} holds images beside class folders ({beside[0]}): move them into a class, "
            "or pass --unlabelled."
        )
    if len(classes) == 1:
        raise DataError(
            f"{root} has a single class folder ({classes[0]}), and everything in one class gives "
            "100 % accuracy: pass --unlabelled to pack without labels."
        )
    _refuse_empty_classes(root, classes)
    return classes


def _refuse_empty_classes(root: Path, classes: list[str]) -> None:
    with os.scandir(root) as entries:
        folders = {entry.name for entry in entries if entry.is_dir(follow_symlinks=False)}
    empty = sorted(name for name in folders - set(classes) if name[0] != ".")
    if empty:
        raise DataError(f"{root / empty[0]} holds no images: fill the class or remove the folder.")


def _agreed(classes: list[str], like: Path) -> list[str]:
    """Return the class list of another set after checking that it names the same classes."""
    expected = ShardSet(like).manifest.classes
    missing = sorted(set(expected) - set(classes))
    extra = sorted(set(classes) - set(expected))
    if missing or extra:
        raise DataError(
            f"The classes differ from those of {like}: "
            f"missing here {_few(missing)}; unknown there {_few(extra)}."
        )
    return expected


def _few(names: list[str]) -> str:
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
