"""Tiny ImageNet as it is published: the labels of its val stand in a list, not in folders.

The layout is that of http://cs231n.stanford.edu/tiny-imagenet-200.zip: `train/WNID/images/*.JPEG`,
`val/images/*.JPEG` with `val/val_annotations.txt` (name, WNID and a box a line), `test/images`.
"""

from dataclasses import replace
from pathlib import Path

import numpy as np

from fastmoco.errors import DataError
from fastmoco.pack.sources.base import Reject, Source, by_name, refuse_lost_class
from fastmoco.pack.sources.folder import open_folder

ANNOTATIONS = "val_annotations.txt"
SPLIT = "val"


def is_tiny_imagenet(path: Path) -> bool:
    """Return whether a path is the folder of the set, or that of its val."""
    return any((folder / ANNOTATIONS).is_file() for folder in (path, path / SPLIT))


def open_tiny_imagenet(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open Tiny ImageNet.

    Args:
        path: the folder of the set, or that of its val.
        unlabelled: give no labels.

    Returns:
        The splits train, val and test, as far as they are there, or "" for val by itself.

    Raises:
        DataError: the list is damaged, or names a class that the training set has not.
    """
    sources = open_folder(path, unlabelled)
    split, folder = (SPLIT, path / SPLIT) if SPLIT in sources else ("", path)
    if unlabelled or not (folder / ANNOTATIONS).is_file() or split not in sources:
        return sources
    classes = next((source.classes for source in sources.values() if source.classes), None)
    return sources | {split: _labelled(sources[split], folder / ANNOTATIONS, classes)}


def _labelled(source: Source, path: Path, classes: list[str] | None) -> Source:
    wnids = _read(path)
    places = [name.rpartition("/")[2] for name in source.names]
    found = sorted(set(wnids.values())) if classes is None else classes
    number_of = {wnid: number for number, wnid in enumerate(found)}
    odd = sorted(set(wnids.values()) - set(found))
    if odd:
        raise DataError(f"{path} names the class {odd[0]}, which the training set has not.")
    listed = np.array([number_of[wnid] for wnid in wnids.values()], dtype=np.int32)
    labels = [number_of[wnids[name]] if name in wnids else -1 for name in places]
    refuse_lost_class(listed, np.array(labels), found, f"that {path.name} lists are missing")
    missing = [Reject(name, "does not exist") for name in sorted(set(wnids) - set(places))]
    return replace(
        source,
        labels=np.array(labels, dtype=np.int32),
        classes=found,
        left_out=sorted([*source.left_out, *missing], key=by_name),
        labels_from=path.name,
    )


def _read(path: Path) -> dict[str, str]:
    """Return the WordNet id of each image, by its name."""
    try:
        rows = [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines() if line]
        return {row[0]: row[1] for row in rows}
    except (OSError, UnicodeDecodeError, IndexError) as error:
        raise DataError(f"{path} is no list of images and classes ({error}): get it again.") from (
            error
        )
