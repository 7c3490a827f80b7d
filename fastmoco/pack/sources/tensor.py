"""Images as one tensor in a .npy or .pt file, or as numbered PNGs with a tensor of labels.

For `X.npy` or `X.pt` the labels are in `X_labels.npy` or `X_labels.pt` beside it. For a folder `X`
they are in one of `X_labels` and `X_label_tensor` beside it, `.npy` or `.pt`; a folder named
`X_data` may leave `_data` away there. Image `7.png` has the label of row 7.
"""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import load_array
from fastmoco.dataset.classes import get_classes
from fastmoco.errors import DataError
from fastmoco.pack.inputs import FileInputs, PixelInputs
from fastmoco.pack.sources.base import Names, Reject, Source, by_name, check_labels, no_labels
from fastmoco.pack.sources.raw import Bytes, as_labels, counted_names, make_source, number_names
from fastmoco.pack.sources.tree import is_split

SUFFIXES = (".npy", ".pt")
NUMBERED = re.compile(r"(\d{1,18})\.png", re.IGNORECASE | re.ASCII)


def open_tensor(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the images of one tensor, memory-mapped.

    Args:
        path: a .npy or .pt file with uint8 images of shape (N, 3, H, W), (N, H, W, 3), (N, H, W),
            (N, 1, H, W) or (N, H, W, 1); 4 channels are colors and alpha, which is dropped.
        unlabelled: look for no labels.

    Returns:
        One source, "".

    Raises:
        DataError: other values or shapes, a damaged file, labels that do not fit.
    """
    images = _as_images(_array(path), path)
    names = counted_names(path.stem, len(images))
    inputs = PixelInputs(images, path)
    beside = None if unlabelled else _get_one([path.with_name(f"{path.stem}_labels")])
    if beside is None:
        return {"": make_source(names, inputs, None, [], str(path))}
    labels, classes = _read_labels(beside, len(images))
    return {"": make_source(names, inputs, labels, classes, str(beside))}


def is_png_tensor(path: Path) -> bool:
    """Return whether a folder, or one in it, has a tensor of labels beside it."""
    return any(_label_file(folder) for folder in (path, *_folders(path)))


def open_png_tensor(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open folders of numbered PNGs.

    Args:
        path: one such folder, or the one above several: those with labels or with the name of a
            split (train, val_data, unlabeled) are taken.
        unlabelled: look for no labels.

    Returns:
        The source of each folder by its name without `_data`, or "" for one. All that have labels
        have the same classes, named "0" to the largest label of all.

    Raises:
        DataError: no images, or labels that do not fit.
    """
    folders = [] if _numbered_files(path)[0] else _taken(path)
    splits = {_stem(folder): folder for folder in folders} or {"": path}
    if len(splits) < len(folders):
        raise DataError(f"{path} holds two folders of one split: {', '.join(splits)}.")
    found = {split: _images(folder) for split, folder in splits.items()}
    labels = {
        split: None if unlabelled else _get_labels(splits[split], list(images))
        for split, (images, _) in found.items()
    }
    counts = [number_names(one) for one in labels.values() if one is not None]
    classes = max(counts, key=len, default=[])
    return {
        split: _png_source(splits[split], *found[split], labels[split], classes) for split in splits
    }


def _taken(path: Path) -> list[Path]:
    return [f for f in _folders(path) if is_split(_stem(f)) or _label_file(f)]


def _folders(path: Path) -> list[Path]:
    if not path.is_dir():
        return []
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_dir(follow_symlinks=False) and e.name[0] != "."]
    return [path / name for name in sorted(names, key=os.fsencode)]


def _stem(folder: Path) -> str:
    return folder.name.removesuffix("_data")


def _label_file(folder: Path) -> Path | None:
    folder = Path(os.path.abspath(folder))  # `.` has no name
    stems = dict.fromkeys([folder.name, _stem(folder)])
    endings = ("_labels", "_label_tensor")
    return _get_one([folder.parent / (stem + ending) for stem in stems for ending in endings])


def _get_one(stems: list[Path]) -> Path | None:
    files = [stem.with_name(stem.name + suffix) for stem in stems for suffix in SUFFIXES]
    found = [file for file in files if file.is_file()]
    if len(found) > 1:
        raise DataError(f"{found[0]} and {found[1].name} both hold labels: keep one.")
    return found[0] if found else None


def _images(folder: Path) -> tuple[dict[int, str], list[Reject]]:
    found, left_out = _numbered_files(folder)
    if not found:
        raise DataError(f"{folder} holds no PNGs named by number, such as 7.png.")
    return found, left_out


def _numbered_files(folder: Path) -> tuple[dict[int, str], list[Reject]]:
    """Return the names of the PNGs by number, in its order, and what was passed over."""
    found: dict[int, str] = {}
    left_out: list[Reject] = []
    with os.scandir(folder) as entries:
        for entry in (entry for entry in entries if entry.name[0] != "."):
            match = NUMBERED.fullmatch(entry.name)
            if match is None:
                left_out.append(Reject(entry.name, "is not a PNG named by its number"))
            elif not entry.is_file(follow_symlinks=False):
                left_out.append(Reject(entry.name, "is not a regular file"))
            elif found.setdefault(int(match[1]), entry.name) != entry.name:
                other = found[int(match[1])]
                raise DataError(f"{folder}: {entry.name} and {other} have one number: keep one.")
    return dict(sorted(found.items())), sorted(left_out, key=by_name)


def _read_labels(path: Path, count: int) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return class numbers, -1 for none, and class names, from numbers or from names."""
    array = _array(path)
    if array.dtype.kind != "U" or array.shape != (count,):
        labels = as_labels(array, count, str(path), missing=True)
        return labels, number_names(labels)
    return get_classes(array.tolist())


def _get_labels(folder: Path, numbers: list[int]) -> npt.NDArray[np.int32] | None:
    file = _label_file(folder)
    if file is None:
        return None
    labels = as_labels(_array(file), len(numbers), str(file), missing=True)
    if numbers[-1] != len(numbers) - 1:
        gap = next(row for row, number in enumerate(numbers) if row != number)
        raise DataError(f"{folder} has no {gap}.png: the labels of {file.name} run from 0 on.")
    return labels


def _png_source(
    folder: Path,
    images: dict[int, str],
    left_out: list[Reject],
    labels: npt.NDArray[np.int32] | None,
    classes: list[str],
) -> Source:
    names = Names(images.values())
    if labels is None:
        labels, classes = no_labels(len(names)), []
    check_labels(labels, classes, str(folder))
    return Source(names, labels, classes, FileInputs(folder, names), left_out)


def _as_images(array: npt.NDArray[Any], path: Path) -> Bytes:
    """Return images as (N, H, W, 3) or (N, H, W), without a copy."""
    if array.dtype != np.uint8:
        raise DataError(
            f"{path} holds {array.dtype} values; images are whole numbers 0..255: convert them to "
            "uint8 and save again (values 0..1: times 255, rounded)."
        )
    if array.ndim == 4 and 4 in (array.shape[1], array.shape[3]):  # alpha is dropped
        array = array[..., :3] if array.shape[3] == 4 else array[:, :3]
    shape = array.shape
    if 0 in shape or len(shape) not in (3, 4) or (len(shape) == 4 and shape[1] == shape[3] == 3):
        raise _odd_shape(path, shape)
    if len(shape) == 3 or shape[3] == 3:
        return array
    if shape[1] == 3:
        return array.transpose(0, 2, 3, 1)
    if 1 not in (shape[1], shape[3]):
        raise _odd_shape(path, shape)
    return array[:, 0] if shape[1] == 1 else array[..., 0]


def _odd_shape(path: Path, shape: tuple[int, ...]) -> DataError:
    return DataError(
        f"{path} has the shape {shape}, which is none of (N, 3, H, W), (N, H, W, 3), (N, H, W) "
        "and (N, 1, H, W), or could be two of them."
    )


def _array(path: Path) -> npt.NDArray[Any]:
    """Return the array of a file, memory-mapped; what its header claims, the file must hold."""
    try:
        array = _torch_array(path) if path.suffix == ".pt" else load_array(path)
    except (
        OSError,
        ValueError,
        TypeError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
    ) as error:
        first = str(error).split("\n")[0]
        raise DataError(
            f"{path} cannot be read as one array ({first}): save it again, a .npy by numpy.save, a "
            ".pt by torch.save of one tensor with torch 1.6 or later."
        ) from error
    if array.nbytes > path.stat().st_size:
        raise DataError(f"{path} claims {array.nbytes} bytes, more than it holds: save it again.")
    return array


def _torch_array(path: Path) -> npt.NDArray[Any]:
    import torch  # takes seconds, and few sources need it

    tensor = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    if not isinstance(tensor, torch.Tensor):
        raise TypeError(f"it holds a {type(tensor).__name__}")
    array: npt.NDArray[Any] = tensor.detach().numpy()
    return array
