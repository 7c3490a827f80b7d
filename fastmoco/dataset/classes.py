"""From the labels that people write down to class numbers."""

import re
import unicodedata
from collections import Counter
from collections.abc import Iterable, Sequence

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError

MAX_CLASSES = 100_000
_NUMBER = re.compile(r"([0-9]{1,18})(?:\.0*)?")  # pandas writes 3.0 beside empty cells
_PLAIN = re.compile(r"(0|[1-9][0-9]*)(?:\.0*)?")
_NONE = re.compile(r"-1(?:\.0*)?|")
_SEVERAL = re.compile(r"[|;,]")


def parse_number(value: str) -> int | None:
    """Return the whole number that a label is, as 3, 003 or 3.0; None if it is none."""
    match = _NUMBER.fullmatch(value)
    return int(match[1]) if match else None


def is_no_label(value: str) -> bool:
    """Whether a value says that there is no label: empty or -1."""
    return _NONE.fullmatch(value) is not None


def is_utf8(value: str) -> bool:
    """Whether a text that was read with surrogates for odd bytes has none."""
    return value.isascii() or value == value.encode("utf-8", "replace").decode()


def few(names: Sequence[str], most: int = 5) -> str:
    """Return the first of some names, and the number of the others."""
    shown = ", ".join(names[:most]) or "none"
    return shown if len(names) <= most else f"{shown} and {len(names) - most} more"


class Known:
    """Finds the class that a written label means, among classes that have their names already.

    By its name; else, if both are numbers, by their value (1 is 001); else by Unicode
    normalization. What could be two classes is none.

    Args:
        names: of the labels 0, 1, ...
        by_place: take a number for a place in the list, unless a name is a number.

    Raises:
        DataError: a name stands twice.
    """

    def __init__(self, names: Sequence[str], by_place: bool = False) -> None:
        self.names = list(names)
        self._exact = {name: code for code, name in enumerate(names)}
        if len(self._exact) != len(self.names):
            raise DataError("The list of classes has a name twice.")
        keys = list(map(_key, names))
        once = {key for key, count in Counter(keys).items() if count == 1}
        self._alike = {key: code for code, key in enumerate(keys) if key in once}
        self._by_place = by_place and not any(isinstance(key, int) for key in keys)

    def code(self, value: str) -> int | None:
        """Return the number of a class, None if the value is none of them."""
        if value in self._exact:
            return self._exact[value]
        key = _key(value)
        if self._by_place and isinstance(key, int):
            return key if key < len(self.names) else None
        return self._alike.get(key)

    def codes(self, values: Iterable[str]) -> npt.NDArray[np.int32]:
        """Return the number of the class of each value, -1 for one that is none of them."""
        found = map(self.code, values)
        return np.array([-1 if code is None else code for code in found], dtype=np.int32)


def _key(value: str) -> int | str:
    number = parse_number(value)
    return unicodedata.normalize("NFC", value) if number is None else number


class Found:
    """The different labels as they are written, each with a code, until all are known."""

    def __init__(self) -> None:
        self.values: dict[str, int] = {}

    def code(self, value: str) -> int:
        """Return the code of a value.

        Raises:
            DataError: there are more values than any set has classes.
        """
        code = self.values.setdefault(value, len(self.values))
        if code >= MAX_CLASSES:
            raise DataError(
                f"There are more than {MAX_CLASSES} different labels, such as {value!r}: these "
                "are no classes."
            )
        return code

    def get_labels(self, codes: Sequence[int]) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the label of each of many codes, -1 for code -1, and the class names."""
        labels, names = self.as_classes()
        return np.append(labels, np.int32(-1))[np.array(codes, dtype=np.int32)], names

    def as_classes(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the label of each code, (codes,) int32, and the names of the labels 0, 1, ...

        Whole numbers stay what they are; other values are the names, sorted. Values that are one
        number (1 and 01), or one text in Unicode, are one class.

        Raises:
            DataError: values that are lists of classes.
        """
        _refuse_lists(self.values)
        spelled: dict[int | str, str] = {}
        for value in self.values:
            spelled[_key(value)] = min(value, spelled.get(_key(value), value))
        names, places = _names(spelled)
        labels = [places[_key(value)] for value in self.values]
        return np.array(labels, dtype=np.int32), names


def get_classes(values: Iterable[str]) -> tuple[npt.NDArray[np.int32], list[str]]:
    """Return the label of each value, -1 for none, and the class names; see `Found`."""
    found = Found()
    codes = [-1 if is_no_label(value) else found.code(value) for value in values]
    return found.get_labels(codes)


def _names(spelled: dict[int | str, str]) -> tuple[list[str], dict[int | str, int]]:
    """Return the class names, and the class of each key."""
    numbers = [key for key in spelled if isinstance(key, int)]
    # Not 007: numbers with zeros before them are names.
    if len(numbers) == len(spelled) and all(map(_PLAIN.fullmatch, spelled.values())):
        largest = max(numbers, default=-1)
        if largest < MAX_CLASSES:
            return list(map(str, range(largest + 1))), {number: number for number in numbers}
        ordered: list[int | str] = [*sorted(numbers)]
        return list(map(str, ordered)), {key: place for place, key in enumerate(ordered)}
    ordered = sorted(spelled, key=lambda key: spelled[key])
    return [spelled[key] for key in ordered], {key: place for place, key in enumerate(ordered)}


def _refuse_lists(values: Iterable[str]) -> None:
    """Refuse lists such as `cat|dog`: values whose every part stands in another value too.

    `tench, Tinca tinca` is the name of one class: its parts stand nowhere else.
    """
    parts = {value: _parts(value) for value in values}
    times = Counter(part for found in parts.values() for part in set(found))
    for value, found in parts.items():
        if len(found) > 1 and all(times[part] > 1 for part in found):
            raise several_labels(f"The label {value!r} is a list")


def _parts(value: str) -> list[str]:
    """Return the parts of a label as a list would have them; `['cat', 'dog']` is of pandas."""
    if value.startswith("[") and value.endswith("]"):
        value = re.sub(r"['\"]", "", value[1:-1])
    return [part.strip() for part in _SEVERAL.split(value) if part.strip()]


def several_labels(what: str) -> DataError:
    """Return the refusal of several labels an image, after words that say where they are."""
    return DataError(
        f"{what}: several labels an image are not supported; keep one class for each, or pack "
        "without labels by --unlabelled."
    )
