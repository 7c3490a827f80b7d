"""ImageNet (ILSVRC 2012) in its official tars, read in place.

`ILSVRC2012_img_train.tar` holds a tar for each class, named by its WordNet id; the members of
`ILSVRC2012_img_val.tar` are numbered, and the devkit says to which class each number belongs.
Class numbers are those of the WordNet ids, sorted, as everyone has them; the devkit's own are not.
"""

import os
import re
import tarfile
from array import array
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import IO

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import ArchiveInputs, Span
from fastmoco.pack.sources.archive import (
    file_window,
    is_hidden,
    tar_members,
    why_not_tarred,
    window_members,
)
from fastmoco.pack.sources.base import (
    Names,
    Reject,
    Source,
    by_name,
    check_labels,
    no_labels,
    numbered,
)
from fastmoco.pack.sources.matlab import load_mat
from fastmoco.pack.sources.memory import members

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")


class _Members:
    """The images found in a tar: millions, hence no objects."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.offsets, self.sizes = array("q"), array("q")
        self.left_out: list[Reject] = []

    def add(self, name: str, offset: int, size: int) -> None:
        self.names.append(name)
        self.offsets.append(offset)
        self.sizes.append(size)

    def source(self, labels: npt.NDArray[np.int32] | None, classes: list[str]) -> Source:
        """Return the source of all, sorted by name, whatever the order in the tar."""
        if not self.names:
            first = "".join(f" ({reject.name}: {reject.reason})" for reject in self.left_out[:1])
            raise DataError(f"{self.path} holds no images of ImageNet{first}.")
        if labels is None:
            labels, classes = no_labels(len(self.names)), []
        check_labels(labels, classes, str(self.path))
        order = sorted(range(len(self.names)), key=lambda row: os.fsencode(self.names[row]))
        sizes = np.frombuffer(self.sizes, dtype=np.int64)
        table = np.stack([np.frombuffer(self.offsets, dtype=np.int64), sizes], axis=1)
        inputs = ArchiveInputs(self.path, Span, table[order], sizes[order])
        names = Names(self.names[row] for row in order)
        return Source(names, labels[order], classes, inputs, sorted(self.left_out, key=by_name))


def is_imagenet(path: Path) -> bool:
    """Return whether a path is one of the two tars or a folder that holds one."""
    if path.is_dir():
        return any((path / name).is_file() for name in TARS.values())
    return path.name in TARS.values()


def open_imagenet(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the official tars of ImageNet.

    Args:
        path: a folder with one of the tars or both and, for the labels of val, the devkit
            (`ILSVRC2012_devkit_t12.tar.gz` or its folder); or one tar, the devkit beside it.
        unlabelled: give no labels; no devkit is needed.

    Returns:
        The splits train and val, as far as they are there.

    Raises:
        UsageError: scipy is missing, which reads the devkit.
        DataError: a tar is damaged, the devkit is missing or does not fit.
    """
    folder = path if path.is_dir() else path.parent
    tars = {split: folder / name for split, name in TARS.items() if path in (folder, folder / name)}
    tars = {split: tar for split, tar in tars.items() if tar.is_file()}
    if not tars:
        raise DataError(f"{path} holds neither {TARS['train']} nor {TARS['val']}.")
    sources = {}
    if "train" in tars:
        sources["train"] = _train(tars["train"], unlabelled)
    if "val" in tars:
        sources["val"] = _val(tars["val"], folder, unlabelled)
    if len({tuple(source.classes) for source in sources.values()}) > 1:
        raise DataError(
            f"The class tars of {tars['train']} are not the classes of the devkit: get it again, "
            "or pack each tar by itself."
        )
    return sources


def _train(path: Path, unlabelled: bool) -> Source:
    found = _Members(path)
    wnids: list[str] = []
    seen: set[str] = set()
    with path.open("rb") as stream:
        for outer in _sound_members(path):
            match = CLASS_TAR.fullmatch(outer.name)
            if match is None or not outer.isreg():
                if not outer.isdir():
                    found.left_out.append(Reject(outer.name, "is not the tar of a class"))
                continue
            before = len(found.names)
            _add_class(found, stream, outer, match[1])
            added = len(found.names) - before
            if not added or match[1] in seen:
                fault = "is there twice" if added else "holds no images"
                raise DataError(f"{path}: {outer.name} {fault}: get it again.")
            seen.add(match[1])
            wnids += [match[1]] * added
    if unlabelled:
        return found.source(None, [])
    return found.source(*numbered(wnids))


def _add_class(found: _Members, stream: IO[bytes], outer: tarfile.TarInfo, wnid: str) -> None:
    window = file_window(stream, outer.offset_data, outer.size)
    where = f"{found.path}: {outer.name}"
    for info in _sound(window_members(window), where, outer.size):
        reason = why_not_tarred(info)
        if reason:
            found.left_out.append(Reject(f"{wnid}/{info.name}", reason))
        else:
            found.add(f"{wnid}/{info.name}", outer.offset_data + info.offset_data, info.size)


def _sound_members(path: Path) -> Iterator[tarfile.TarInfo]:
    return _sound(tar_members(path), str(path), path.stat().st_size)


def _sound(infos: Iterator[tarfile.TarInfo], where: str, size: int) -> Iterator[tarfile.TarInfo]:
    """Yield what is neither folder nor hidden; a member beyond the end is damage."""
    try:
        for info in infos:
            if info.offset_data + info.size > size:
                raise tarfile.ReadError(f"{info.name} claims {info.size} bytes, past the end")
            if not info.isdir() and not is_hidden(info.name):
                yield info
    except (tarfile.TarError, OSError, ValueError) as error:
        raise DataError(f"{where} is damaged ({error}): get it again.") from error


def _val(path: Path, folder: Path, unlabelled: bool) -> Source:
    found = _Members(path)
    numbers = array("q")
    for info in _sound_members(path):
        match = VAL_NAME.fullmatch(info.name)
        reason = why_not_tarred(info) or (
            "" if match else "is not named ILSVRC2012_val_NUMBER.JPEG"
        )
        if match and not reason:
            found.add(info.name, info.offset_data, info.size)
            numbers.append(int(match[1]))
        else:
            found.left_out.append(Reject(info.name, reason))
    if len(set(numbers)) != len(numbers):
        raise DataError(f"{path} holds an image twice: get it again.")
    if unlabelled:
        return found.source(None, [])
    wnids, truth = _devkit(folder, path)
    if not set(numbers) <= set(range(1, len(truth) + 1)):
        raise DataError(f"{path} holds image {max(numbers)}, the devkit has {len(truth)} labels.")
    labels = truth[np.frombuffer(numbers, dtype=np.int64) - 1] if numbers else truth[:0]
    return found.source(labels, wnids)


def _devkit(folder: Path, val: Path) -> tuple[list[str], npt.NDArray[np.int32]]:
    """Return the WordNet ids, sorted, and the class number of each val image."""
    meta, truth, where = _devkit_files(folder, val)
    try:
        rows = np.atleast_1d(load_mat(BytesIO(meta), "synsets", f"{where}/{META}"))
        wnid_of = {
            int(row["ILSVRC2012_ID"]): str(row["WNID"])
            for row in rows
            if int(row["num_children"]) == 0  # the others are classes of classes
        }
        wnids = [wnid_of[int(line)] for line in truth.split()]
    except (KeyError, ValueError, TypeError, IndexError) as error:
        raise DataError(f"{where} is not the devkit of ILSVRC 2012 ({error}): get it again.") from (
            error
        )
    classes = sorted(wnid_of.values())
    number_of = {wnid: number for number, wnid in enumerate(classes)}
    return classes, np.array([number_of[wnid] for wnid in wnids], dtype=np.int32)


def _devkit_files(folder: Path, val: Path) -> tuple[bytes, bytes, str]:
    root, packed = folder / DEVKIT, folder / f"{DEVKIT}.tar.gz"
    if (root / META).is_file() and (root / TRUTH).is_file():
        return (root / META).read_bytes(), (root / TRUTH).read_bytes(), str(root)
    if not packed.is_file():
        raise DataError(
            f"{val} has no labels in it: put {packed.name} or its folder {DEVKIT} beside it, or "
            "pass --unlabelled."
        )
    files = members(packed, (META, TRUTH))
    if len(files) != 2:
        raise DataError(f"{packed} lacks {META} or {TRUTH}: get it again.")
    return files[META].tobytes(), files[TRUTH].tobytes(), str(packed)
