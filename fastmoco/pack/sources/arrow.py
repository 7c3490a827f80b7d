"""Parquet and Arrow files with the bytes of images in them, as Hugging Face writes them.

`NAME-00000-of-00004.parquet` of a hub repository, and the folders of `save_to_disk`. Arrow files
are memory-mapped; Parquet is compressed and holds rows in groups, so that it is read as a whole.
"""

import json
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.classes import get_classes, several_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.inputs import Held, Input, Inputs
from fastmoco.pack.listing import ALIASES, plain
from fastmoco.pack.sources.agree import in_one_numbering
from fastmoco.pack.sources.base import (
    Names,
    Reject,
    Source,
    check_labels,
    no_labels,
    refuse_lost_class,
)
from fastmoco.pack.sources.raw import as_labels, counted_names
from fastmoco.pack.sources.tree import says_split, split_word

SUFFIXES = (".parquet", ".arrow")
_PART = re.compile(r".*-\d{5}-of-\d{5}")
_MAX_PARQUET = 8 * 2**30  # bytes of one split, which are read into memory
_IMAGES = ("image", "img", "picture", "photo", "jpg", "png")
_LABELS = (*ALIASES["label"], "finelabel")


def is_arrow(path: Path) -> bool:
    """Return whether a path is such a file, or a folder of such files and no other data."""
    return bool(_parts(path))


def open_arrow(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the images of Parquet or Arrow files.

    Args:
        path: a file, a folder of parts (in it, in `data/` or in a folder of each split), or what
            `save_to_disk` wrote.
        unlabelled: do not read the labels.

    Returns:
        The source of each split that the names of folders or files say, "" if they say none.

    Raises:
        UsageError: pyarrow is missing.
        DataError: a file is damaged, or has no column of images.
    """
    splits: dict[str, list[Path]] = {"": [path]} if path.is_file() else {}
    for file in _parts(path) if path.is_dir() else ():
        splits.setdefault(_get_split(file, path), []).append(file)
    if not splits:
        raise DataError(f"{path} holds no parts of a data set in Parquet or Arrow.")
    sources = {
        split: _source(files, f"{path} {split}".rstrip(), unlabelled)
        for split, files in sorted(splits.items())
    }
    return in_one_numbering(sources, str(path))


def _parts(path: Path) -> list[Path]:
    if path.is_file():
        return [path] if path.suffix in SUFFIXES else []
    with os.scandir(path) as entries:
        names = [e.name for e in entries if e.is_dir() and (e.name == "data" or says_split(e.name))]
    folders = [path, *(path / name for name in names)]
    files = (file for folder in folders for end in SUFFIXES for file in folder.glob(f"*{end}"))
    return sorted(file for file in files if _PART.fullmatch(file.stem))


def _get_split(file: Path, root: Path) -> str:
    return (split_word(file.parent.name) if file.parent != root else "") or split_word(file.stem)


def _source(files: Sequence[Path], where: str, unlabelled: bool) -> Source:
    table = _table(files, where)
    if not len(table):
        raise DataError(f"{where} holds no images.")
    images, paths = _images(table, where)
    label = next((name for name in table.column_names if plain(name) in _LABELS), None)
    codes, classes = _labels(table, None if unlabelled else label, where)
    there = images.is_valid().to_numpy()
    rows = np.flatnonzero(there)
    names = _names(paths, files[0].stem)
    if not len(rows):
        raise DataError(
            f"{where} holds no bytes of images, only where they lie ({names[0]}): pack that folder."
        )
    check_labels(codes, classes, where)
    refuse_lost_class(codes, codes[rows], classes, "have no bytes in the file")
    others = [name for name in table.column_names if name != label]
    return Source(
        names=names.pick(rows),
        labels=codes[rows],
        classes=classes,
        inputs=_ColumnInputs(images, rows, files),
        left_out=[
            Reject(names[row], "has no bytes in the file")
            for row in np.flatnonzero(~there).tolist()
        ],
        labels_from=f"the column {label}" if classes else "",
        notes=[] if classes or unlabelled else [f"columns, none of labels: {', '.join(others)}"],
    )


def _table(files: Sequence[Path], where: str) -> Any:
    """Return the rows of all files, those of Arrow memory-mapped."""
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError as error:
        raise UsageError(f"Reading {where} needs pyarrow: pip install pyarrow") from error
    packed = sum(file.stat().st_size for file in files if file.suffix == ".parquet")
    if packed > _MAX_PARQUET:
        raise DataError(
            f"{where} holds {packed >> 30} GB of Parquet, which is read as a whole: write it by "
            "`save_to_disk` of datasets, which is memory-mapped, and pack that folder."
        )
    try:
        return pa.concat_tables(
            pq.read_table(file) if file.suffix == ".parquet" else _mapped(pa, file)
            for file in files
        )
    except (pa.ArrowException, OSError, ValueError) as error:
        first = str(error).split("\n")[0]
        raise DataError(f"{where} cannot be read ({first}): get it again.") from error


def _mapped(pa: Any, file: Path) -> Any:
    source = pa.memory_map(str(file))
    try:
        return pa.ipc.open_stream(source).read_all()
    except pa.ArrowInvalid:
        source.seek(0)
        return pa.ipc.open_file(source).read_all()


def _images(table: Any, where: str) -> tuple[Any, list[str | None]]:
    """Return the column of encoded images, and the path of each, None for those without."""
    import pyarrow as pa
    import pyarrow.compute as pc

    for field in table.schema:
        column = table.column(field.name)
        if pa.types.is_struct(field.type) and field.type.get_field_index("bytes") >= 0:
            has_path = field.type.get_field_index("path") >= 0
            paths = pc.struct_field(column, "path").to_pylist() if has_path else []
            return pc.struct_field(column, "bytes"), paths or [None] * len(column)
        binary = pa.types.is_binary(field.type) or pa.types.is_large_binary(field.type)
        if binary and plain(field.name) in _IMAGES:
            return column, [None] * len(column)
    raise DataError(
        f"{where} has no column with the bytes of images, only {', '.join(table.column_names)}."
    )


def _labels(table: Any, label: str | None, where: str) -> tuple[npt.NDArray[np.int32], list[str]]:
    if label is None:
        return no_labels(len(table)), []
    values = table.column(label).to_pylist()
    if any(isinstance(value, list | dict) for value in values):
        raise several_labels(f"{where}, column {label},")
    classes = _class_names(table, label)
    if classes:
        codes = [-1 if value is None else int(value) for value in values]
        return as_labels(codes, len(codes), where, missing=True), classes
    return get_classes("" if value is None else str(value) for value in values)


def _class_names(table: Any, label: str) -> list[str]:
    """Return the names that Hugging Face stores beside the columns, none if it does not."""
    try:
        about = json.loads((table.schema.metadata or {})[b"huggingface"])
        return [str(name) for name in about["info"]["features"][label]["names"]]
    except (KeyError, ValueError, TypeError, RecursionError):
        return []


def _names(paths: Sequence[str | None], stem: str) -> Names:
    """Return the path of each image, if all have one of their own; else numbers."""
    if None in paths or len(set(paths)) < len(paths):
        return counted_names(stem, len(paths))
    return Names(str(path) for path in paths)


class _ColumnInputs(Inputs):
    """Images of a column.

    Args:
        column: pyarrow's chunks of bytes.
        rows: (N,) int64, those that count.
        files: behind the column.
    """

    def __init__(self, column: Any, rows: npt.NDArray[np.int64], files: Sequence[Path]) -> None:
        import pyarrow.compute as pc

        self.column, self.rows, self.files = column, rows, files
        lengths = pc.fill_null(pc.binary_length(column), 0).to_numpy()
        self.sizes = lengths.astype(np.int64)[rows]

    def __getitem__(self, row: int) -> Input:
        return Held(self.column[int(self.rows[row])].as_py())

    def state(self) -> bytes:
        """Return size and time of the files."""
        found = [file.stat() for file in self.files]
        return repr([(one.st_size, one.st_mtime_ns) for one in found]).encode()
