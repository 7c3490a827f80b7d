"""Finding the images of a source, and the labels that it gives them.

Each adapter turns one kind of source into a `Source` for each of its splits.
"""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

from fastmoco.errors import DataError, UsageError
from fastmoco.pack.sources.agree import agreed
from fastmoco.pack.sources.archive import open_tar, open_zip, refuse_compressed
from fastmoco.pack.sources.arrow import is_arrow, open_arrow
from fastmoco.pack.sources.base import Source, no_labels
from fastmoco.pack.sources.cifar import is_cifar, open_cifar
from fastmoco.pack.sources.csv_manifest import open_table
from fastmoco.pack.sources.folder import open_folder
from fastmoco.pack.sources.imagenet import is_imagenet, open_imagenet
from fastmoco.pack.sources.metadata import is_metadata, open_metadata
from fastmoco.pack.sources.reader import How
from fastmoco.pack.sources.stl10 import is_stl10, open_stl10
from fastmoco.pack.sources.svhn import is_svhn, open_svhn
from fastmoco.pack.sources.tensor import is_png_tensor, open_png_tensor, open_tensor
from fastmoco.pack.sources.tiny_imagenet import is_tiny_imagenet, open_tiny_imagenet
from fastmoco.pack.sources.webdataset import is_webdataset, open_webdataset

Adapter = Callable[[Path, bool], dict[str, Source]]

FORMATS: dict[str, Adapter] = {
    "folder": open_folder,
    "zip": open_zip,
    "tar": open_tar,
    "csv": open_table,
    "cifar": open_cifar,
    "stl10": open_stl10,
    "svhn": open_svhn,
    "imagenet": open_imagenet,
    "tensor": open_tensor,
    "png-tensor": open_png_tensor,
    "tiny-imagenet": open_tiny_imagenet,
    "metadata": open_metadata,
    "arrow": open_arrow,
    "webdataset": open_webdataset,
}

BY_LAYOUT = {"folder": open_folder, "zip": open_zip, "tar": open_tar}

# In this order, and before the general formats: the first that knows a source opens it.
KNOWN_FOLDERS: dict[str, Callable[[Path], bool]] = {
    "imagenet": is_imagenet,
    "cifar": is_cifar,
    "stl10": is_stl10,
    "svhn": is_svhn,
    "png-tensor": is_png_tensor,
    "tiny-imagenet": is_tiny_imagenet,
    "metadata": is_metadata,
    "arrow": is_arrow,
    "webdataset": is_webdataset,
}
KNOWN_FILES = {
    name: KNOWN_FOLDERS[name] for name in ("imagenet", "cifar", "svhn", "webdataset", "arrow")
}
SUFFIXES = {
    ".zip": "zip",
    ".tar": "tar",
    ".csv": "csv",
    ".jsonl": "csv",
    ".npy": "tensor",
    ".pt": "tensor",
}


def open_sources(
    path: Path,
    format: str | None = None,
    unlabelled: bool = False,
    like: list[str] | None = None,
    classes_at: str | None = None,
    folder: Path | None = None,
) -> dict[str, Source]:
    """Open a source of images.

    Args:
        path: folder or file.
        format: a name of `FORMATS`; None: recognized.
        unlabelled: give no labels.
        like: class names that the labels must refer to, in this order.
        classes_at: one of `CLASSES_AT`, for folders and archives.
        folder: holds the images that a CSV lists; see `open_table`.

    Returns:
        The source of each split; "" for a source without splits.

    Raises:
        UsageError: there is nothing at `path`, the format is not known, or a library that it
            needs is missing.
        DataError: nothing sound in it.
    """
    if unlabelled and like:
        raise UsageError("--like compares classes, --unlabelled has none: drop one of them.")
    if format is not None and format not in FORMATS:
        raise UsageError(f"There is no format {format!r}; those known: {', '.join(FORMATS)}.")
    if not path.exists():
        raise UsageError(f"There is no file or folder {path}.")
    chosen = format or recognize(path)
    if folder is not None and chosen != "csv":
        raise UsageError(f"--root says where the images of a CSV lie; {path} is a {chosen}.")
    try:
        if chosen in BY_LAYOUT:
            how = How(unlabelled, classes_at, tuple(like or ()))
            sources = BY_LAYOUT[chosen](path, unlabelled, how)
        elif classes_at:
            raise UsageError(f"--classes-at reads folders; {path} is of the format {chosen}.")
        elif folder is not None:
            sources = open_table(path, unlabelled, folder)
        else:
            sources = FORMATS[chosen](path, unlabelled)
    except OSError as error:
        reason = f"{error.filename or path}: {error.strerror or error}"
        raise DataError(f"{path} cannot be read as {chosen} ({reason}).") from error
    if unlabelled:
        sources = {split: _without_labels(source) for split, source in sources.items()}
    if like:
        sources = {split: agreed(source, like) for split, source in sources.items()}
    return sources


def recognize(path: Path) -> str:
    """Return the format of a source.

    Raises:
        UsageError: there is nothing at `path`.
        DataError: it is a file of no known kind.
    """
    if path.is_dir():
        return _first(KNOWN_FOLDERS, path) or "folder"
    if not path.is_file():
        raise UsageError(f"There is no file or folder {path}.")
    found = _first(KNOWN_FILES, path) or SUFFIXES.get(path.suffix.lower())
    if found:
        return found
    refuse_compressed(path)
    raise DataError(f"{path} is none of {', '.join(FORMATS)}: name its kind by --format.")


def _first(known: dict[str, Callable[[Path], bool]], path: Path) -> str | None:
    return next((name for name, knows in known.items() if knows(path)), None)


def _without_labels(source: Source) -> Source:
    return replace(source, labels=no_labels(len(source)), classes=[])
