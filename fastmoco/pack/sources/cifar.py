"""CIFAR-10 and CIFAR-100, python and binary version, as folder or as archive.

The layouts are those of https://www.cs.toronto.edu/~kriz/cifar.html: an image is 3072 bytes, the
red, green and blue plane of 32 x 32, in rows. CIFAR-100 gives its 100 fine classes.
"""

from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Concat, PixelInputs
from fastmoco.pack.sources.base import Names, Source
from fastmoco.pack.sources.raw import Bytes, as_labels, counted_names, make_source, mapped, records
from fastmoco.pack.sources.safe_pickle import get_bytes, load
from fastmoco.pack.sources.small_archive import get_first_folder, members

PIXELS = 3 * 32 * 32
ARCHIVES = (".tar", ".tar.gz", ".tgz")


@dataclass(frozen=True)
class Layout:
    """The files of one version.

    Attributes:
        folder: the published name of the folder.
        names: the file with the class names.
        name_key: their key in it; "" for a text file, the mark of the binary version.
        label_key: the key of the labels in a batch.
        label_bytes: bytes before each image of a binary batch; the last is the label.
    """

    folder: str
    train: tuple[str, ...]
    test: tuple[str, ...]
    names: str
    name_key: str = ""
    label_key: str = ""
    label_bytes: int = 0

    @property
    def files(self) -> tuple[str, ...]:
        """All files that the version needs."""
        return (*self.train, *self.test, self.names)


LAYOUTS = (
    Layout(
        "cifar-10-batches-py",
        tuple(f"data_batch_{number}" for number in range(1, 6)),
        ("test_batch",),
        "batches.meta",
        name_key="label_names",
        label_key="labels",
    ),
    Layout(
        "cifar-100-python",
        ("train",),
        ("test",),
        "meta",
        name_key="fine_label_names",
        label_key="fine_labels",
    ),
    Layout(
        "cifar-10-batches-bin",
        tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
        ("test_batch.bin",),
        "batches.meta.txt",
        label_bytes=1,
    ),
    Layout(
        "cifar-100-binary",
        ("train.bin",),
        ("test.bin",),
        "fine_label_names.txt",
        label_bytes=2,
    ),
)


def is_cifar(path: Path) -> bool:
    """Return whether a path is one of the folders, holds one, or is an archive of one."""
    if path.is_dir():
        return bool(_folders(path))
    is_archive = path.name.lower().endswith(ARCHIVES)
    return is_archive and get_first_folder(path) in {layout.folder for layout in LAYOUTS}


def open_cifar(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open CIFAR-10 or CIFAR-100.

    Args:
        path: the folder of either version, the folder above it, or a .tar or .tar.gz of it, which
            is read in memory.
        unlabelled: give no labels.

    Returns:
        The splits train and test. Images are named by batch and file name, or by batch and number
        where the file tells none or the same twice.

    Raises:
        DataError: a file is missing or damaged, or asks for more than images need.
    """
    layout, root, contents = _opened(path)
    missing = [name for name in layout.files if name not in contents]
    if missing:
        raise DataError(f"{path} lacks {', '.join(missing)} of {layout.folder}: get it again.")
    classes = _class_names(layout, contents[layout.names], f"{path}/{layout.names}")
    splits = {"train": layout.train, "test": layout.test}
    return {
        split: _split(root, layout, {name: contents[name] for name in batches}, classes, unlabelled)
        for split, batches in splits.items()
    }


def _opened(path: Path) -> tuple[Layout, Path, dict[str, Bytes]]:
    """Return the version, its folder or archive, and the content of its files."""
    if not path.is_dir():
        contents = members(path, {name for layout in LAYOUTS for name in layout.files})
        complete = sorted(LAYOUTS, key=lambda layout: -_known(layout, contents))
        return complete[0], path, contents
    folders = _folders(path)
    if len(folders) != 1:
        held = ", ".join(layout.folder for layout, _ in folders) or "no CIFAR folder"
        raise DataError(f"{path} holds {held}: name the folder of one version, whole.")
    layout, folder = folders[0]
    files = {name: folder / name for name in layout.files}
    return layout, folder, {name: mapped(file) for name, file in files.items() if file.is_file()}


def _known(layout: Layout, contents: dict[str, Bytes]) -> int:
    return sum(name in contents for name in layout.files)


def _folders(path: Path) -> list[tuple[Layout, Path]]:
    """Return the versions that a folder is or holds, each with its folder."""
    return [
        (layout, folder)
        for layout in LAYOUTS
        for folder in (path, path / layout.folder)
        if (folder / layout.names).is_file() and (folder / layout.test[0]).is_file()
    ]


def _class_names(layout: Layout, content: Bytes, where: str) -> list[str]:
    if layout.name_key:
        names = load(content.tobytes(), where).get(layout.name_key)
    else:
        names = content.tobytes().decode("latin-1").split("\n")
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise DataError(f"{where} holds no list of class names: get it again.")
    return [name.strip() for name in names if name.strip()]


def _split(
    root: Path, layout: Layout, batches: dict[str, Bytes], classes: list[str], unlabelled: bool
) -> Source:
    names: list[str] = []
    parts: list[PixelInputs] = []
    labels: list[npt.NDArray[np.int32]] = []
    for batch, content in batches.items():
        where = f"{root}/{batch}"
        read = _unpickled if layout.name_key else _split_records
        images, numbers, files = read(layout, content, where)
        names += _names(batch.removesuffix(".bin"), files, len(images))
        parts.append(PixelInputs(images, root / batch if root.is_dir() else root))
        labels.append(as_labels(numbers, len(images), where))
    joined = None if unlabelled else np.concatenate(labels)
    where = f"{root}/{{{','.join(batches)}}}"
    return make_source(Names(names), Concat(parts), joined, classes, where)


def _split_records(layout: Layout, content: Bytes, where: str) -> tuple[Bytes, Any, None]:
    rows = records(content, (layout.label_bytes + PIXELS,), where)
    return _upright(rows[:, layout.label_bytes :]), rows[:, layout.label_bytes - 1], None


def _unpickled(layout: Layout, content: Bytes, where: str) -> tuple[Bytes, Any, Any]:
    batch = load(content.tobytes(), where)
    rows = get_bytes(batch.get("data"), where)
    if rows.ndim != 2 or rows.shape[1] != PIXELS:
        raise DataError(f"{where} holds bytes of shape {rows.shape}, not images: get it again.")
    return _upright(rows), batch.get(layout.label_key), batch.get("filenames")


def _upright(rows: Bytes) -> Bytes:
    """Return planes (N, 3072) as images (N, 32, 32, 3), without a copy."""
    return rows.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)


def _names(batch: str, files: Any, count: int) -> list[str]:
    sound = isinstance(files, list) and len(files) == count
    if not sound or not all(isinstance(name, str) and name for name in files):
        return list(counted_names(batch, count))
    times = Counter(files)
    return [
        f"{batch}/{name}" if times[name] == 1 else f"{batch}/{row:05d}/{name}"
        for row, name in enumerate(files)
    ]
