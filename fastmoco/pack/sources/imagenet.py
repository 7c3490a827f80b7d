"""ImageNet (ILSVRC 2012) in its official tars, read in place.

`ILSVRC2012_img_train.tar` holds a tar for each class, named by its WordNet id; the members of
`ILSVRC2012_img_val.tar` are numbered, and the devkit says to which class each number belongs.
Class numbers are those of the WordNet ids, sorted, as everyone has them; the devkit's own are not.
"""

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
from fastmoco.pack.inputs import Span
from fastmoco.pack.sources.archive import (
    Members,
    file_window,
    is_hidden,
    tar_members,
    why_not_tarred,
    window_members,
)
from fastmoco.pack.sources.base import (
    Reject,
    Source,
    by_name,
    check_labels,
    no_labels,
    numbered,
)
from fastmoco.pack.sources.matlab import load_mat
from fastmoco.pack.sources.small_archive import members

TARS = {"train": "ILSVRC2012_img_train.tar", "val": "ILSVRC2012_img_val.tar"}
DEVKIT = "ILSVRC2012_devkit_t12"
META, TRUTH = "data/meta.mat", "data/ILSVRC2012_validation_ground_truth.txt"
CLASS_TAR = re.compile(r"(?:.*/)?(n\d{8})\.tar")
VAL_NAME = re.compile(r"(?:.*/)?ILSVRC2012_val_(\d{8})\.JPEG")


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
    found = Members(path, Span)
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
        return _source(found, None, [])
    return _source(found, *numbered(wnids))


def _source(found: Members, labels: npt.NDArray[np.int32] | None, classes: list[str]) -> Source:
    """Return the source of all, sorted by name, whatever the order in the tar."""
    if not found.names:
        first = "".join(f" ({reject.name}: {reject.reason})" for reject in found.left_out[:1])
        raise DataError(f"{found.path} holds no images of ImageNet{first}.")
    if labels is None:
        labels, classes = no_labels(len(found.names)), []
    check_labels(labels, classes, str(found.path))
    order, names, inputs = found.in_order()
    return Source(names, labels[order], classes, inputs, sorted(found.left_out, key=by_name))


def _add_class(found: Members, stream: IO[bytes], outer: tarfile.TarInfo, wnid: str) -> None:
    window = file_window(stream, outer.offset_data, outer.size)
    where = f"{found.path}: {outer.name}"
    for info in _sound(window_members(window), where, outer.size):
        reason = why_not_tarred(info)
        if reason:
            found.left_out.append(Reject(f"{wnid}/{info.name}", reason))
        else:
            at = outer.offset_data + info.offset_data
            found.add(f"{wnid}/{info.name}", info.size, at, info.size)


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
    found = Members(path, Span)
    numbers = array("q")
    for info in _sound_members(path):
        match = VAL_NAME.fullmatch(info.name)
        reason = why_not_tarred(info) or (
            "" if match else "is not named ILSVRC2012_val_NUMBER.JPEG"
        )
        if match and not reason:
            found.add(info.name, info.size, info.offset_data, info.size)
            numbers.append(int(match[1]))
        else:
            found.left_out.append(Reject(info.name, reason))
    if len(set(numbers)) != len(numbers):
        raise DataError(f"{path} holds an image twice: get it again.")
    if unlabelled:
        return _source(found, None, [])
    wnids, truth = _devkit(folder, path)
    if not set(numbers) <= set(range(1, len(truth) + 1)):
        raise DataError(f"{path} holds image {max(numbers)}, the devkit has {len(truth)} labels.")
    labels = truth[np.frombuffer(numbers, dtype=np.int64) - 1] if numbers else truth[:0]
    return _source(found, labels, wnids)


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
