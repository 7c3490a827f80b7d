"""A CSV of images, as people and spreadsheets write them; or JSON lines, one object an image.

Comma, semicolon, tab or bar between the fields; a header in any case, with the usual names for what
is in a column; paths with backslashes. Bytes that are not UTF-8 stand as surrogates: file names may
hold them.
"""

import codecs
import csv
import json
import posixpath
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TextIO

from fastmoco.errors import DataError

ALIASES = {
    "sample": ("sample",),
    "name": (
        *("name", "path", "file", "filename", "filepath", "relpath", "fname", "image", "img"),
        *("imagename", "imagepath", "imagefile", "imgname", "imgpath", "imageid", "imgid", "id"),
    ),
    "label": (
        *("label", "labels", "class", "classname", "classlabel", "classid", "category"),
        *("categoryname", "categoryid", "labelname", "labelid", "target", "y"),
    ),
    "split": ("split", "subset", "partition", "phase", "set"),
    "weight": ("weight", "sampleweight"),
    "confidence": ("confidence",),
}
"""What columns are called, by what is in them; of several for a name the first one counts."""
_DELIMITERS = ",;\t|"
_TOLD = re.compile(r"sep=(.)\r?\n")  # the first line, as Excel writes it
_JOINT = re.compile(r"[\s_.-]")


@dataclass(frozen=True)
class Listing:
    """An opened CSV.

    Attributes:
        path: of the file.
        header: as it is written.
        columns: where each of the roles of `ALIASES` is; those that the file has not are absent.
        rows: (line, fields) of each row that is not empty, to be read once.
    """

    path: Path
    header: list[str]
    columns: Mapping[str, int]
    rows: Iterator[tuple[int, list[str]]]

    def called(self, role: str) -> str:
        """Return what the column of a role is called, in small letters without spaces."""
        return plain(self.header[self.columns[role]])

    def unread(self) -> list[str]:
        """Return the columns that have no role."""
        known = set(self.columns.values())
        return [name.strip() for place, name in enumerate(self.header) if place not in known]


@contextmanager
def opened(path: Path, roles: Sequence[str]) -> Iterator[Listing]:
    """Open a CSV and find the columns that matter.

    Args:
        path: of the file.
        roles: those of `ALIASES` that are looked for.

    Raises:
        DataError: it cannot be read, is no CSV, or two columns could be the label.
    """
    try:
        with _text(path) as stream:
            if path.suffix.lower() == ".jsonl":
                objects = list(_objects(stream, path))
                header = list(dict.fromkeys(key for _, cells in objects for key in cells))
                rows = ((line, [cells.get(key, "") for key in header]) for line, cells in objects)
                yield Listing(path, header, _columns(header, roles, path), rows)
                return
            first = stream.readline()
            told = _TOLD.fullmatch(first)
            skipped = 1 if told else stream.seek(0)
            delimiter = told[1] if told else _delimiter(first, roles)
            reader = csv.reader(stream, delimiter=delimiter, strict=True)
            header = next(reader, [])
            rows = ((reader.line_num + skipped, fields) for fields in reader if fields)
            yield Listing(path, header, _columns(header, roles, path), rows)
    except csv.Error as error:
        raise DataError(f"{path} is not a CSV: line {reader.line_num}: {error}.") from error
    except UnicodeError as error:
        raise DataError(f"{path} is no text ({error}): save it as CSV in UTF-8.") from error
    except OSError as error:
        raise DataError(f"{path} cannot be read: {error.strerror}.") from error


def _text(path: Path) -> TextIO:
    """Open a file in UTF-8, or in UTF-16 if it says so, as spreadsheets save it."""
    with path.open("rb") as stream:
        utf16 = stream.read(2) in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
    encoding, errors = ("utf-16", "strict") if utf16 else ("utf-8-sig", "surrogateescape")
    return path.open(encoding=encoding, errors=errors, newline="")


def _objects(stream: TextIO, path: Path) -> Iterator[tuple[int, dict[str, str]]]:
    """Yield the line and the fields, as text, of each object; null is an empty field."""
    for line, text in enumerate(stream, 1):
        if not text.strip():
            continue
        try:
            found = json.loads(text)
            yield line, {str(k): "" if v is None else str(v) for k, v in found.items()}
        except (ValueError, AttributeError, RecursionError) as error:
            raise DataError(f"{path}, line {line}: is no JSON object ({error}).") from error


def _delimiter(first: str, roles: Sequence[str]) -> str:
    """Return what stands between the fields: that by which most columns are known."""
    known = {alias for role in roles for alias in ALIASES[role]}

    def columns(delimiter: str) -> int:
        return len(known & {plain(cell.strip('"')) for cell in first.strip().split(delimiter)})

    return max(_DELIMITERS, key=columns)


def _columns(header: list[str], roles: Sequence[str], path: Path) -> dict[str, int]:
    names = list(map(plain, header))
    found = {}
    for role in roles:
        here = [name for name in ALIASES[role] if name in names]
        doubled = [name for name in here if names.count(name) > 1]
        if doubled or (role == "label" and len(here) > 1 and here[0] != "label"):
            both = ", ".join(doubled * 2 or here)
            raise DataError(f"{path} has several columns for the {role} ({both}): keep one.")
        if here:
            found[role] = names.index(here[0])
    return found


def plain(cell: str) -> str:
    """Return the name of a column in small letters, without what joins its words."""
    return _JOINT.sub("", cell).lower()


def tidied(text: str) -> str:
    """Return a path as a set has it: slashes, no `./`, no spaces around it."""
    return posixpath.normpath(text.strip().replace("\\", "/")) if text.strip() else ""
