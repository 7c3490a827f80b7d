"""Folders of images with `metadata.csv` or `metadata.jsonl` beside them, as Hugging Face has them.

The file lists the images of its folder (`file_name`) and their labels. It lies in the root, or in
the folder of each split.
"""

import os
from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmoco.errors import DataError
from fastmoco.pack.listing import opened
from fastmoco.pack.sources.agree import in_one_numbering
from fastmoco.pack.sources.base import Reject, Source, by_name
from fastmoco.pack.sources.csv_manifest import open_table
from fastmoco.pack.sources.folder import listed
from fastmoco.pack.sources.tree import agree_on_splits, says_split

_FILES = ("metadata.csv", "metadata.jsonl")


def is_metadata(path: Path) -> bool:
    """Return whether a folder, or those of its splits, has a list of images and labels."""
    return bool(_lists(path))


def open_metadata(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the images that the lists name.

    Args:
        path: the folder.
        unlabelled: do not read the labels.

    Returns:
        The source of each split: a folder with a list, or the folders that one list names; ""
        without splits.

    Raises:
        DataError: a fault of a list; see `open_table`.
    """
    lists = _lists(path)
    if not lists:
        raise DataError(
            f"{path} holds no {' or '.join(_FILES)} with the columns of image and label."
        )
    sources: dict[str, Source] = {}
    for split, file in lists.items():
        found = open_table(file, unlabelled)
        found = _by_folder(found[""]) if list(found) == [""] and not split else found
        unlisted = _unlisted(file, found)
        for number, (part, source) in enumerate(found.items()):
            left_out = [*source.left_out, *([] if number else unlisted)]
            sources[part or split] = replace(
                source,
                left_out=sorted(left_out, key=by_name),
                labels_from=file.name if source.classes else "",
            )
    return in_one_numbering(sources, str(path))


def _lists(path: Path) -> dict[str, Path]:
    """Return the lists by split; "" for one in the root."""
    if not path.is_dir():
        return {}
    with os.scandir(path) as entries:
        folders = [path, *sorted(Path(entry) for entry in entries if entry.is_dir())]
    files = {f: f / name for f in folders for name in _FILES if (f / name).is_file()}
    return {
        "" if folder == path else folder.name: file
        for folder, file in files.items()
        if _names_labels(file)
    }


def _names_labels(file: Path) -> bool:
    try:
        with opened(file, ("name", "label")) as listing:
            return {"name", "label"} <= set(listing.columns)
    except DataError:
        return False


def _by_folder(source: Source) -> dict[str, Source]:
    """Return the parts of a source by the first folders of its names, if these are splits."""
    tops = np.array([name.partition("/")[0] if "/" in name else "" for name in source.names])
    splits = sorted(set(tops.tolist()))
    if len(splits) < 2 or not all(map(says_split, splits)) or not agree_on_splits(splits):
        return {"": source}
    return source.parts({split: np.flatnonzero(tops == split) for split in splits})


def _unlisted(file: Path, found: dict[str, Source]) -> list[Reject]:
    named = {name for source in found.values() for name in source.names}
    missing = {reject.name for source in found.values() for reject in source.left_out}
    there = listed(file.parent).names
    return [
        Reject(name, f"is not in {file.name}")
        for name in there
        if name not in named and name not in missing
    ]
