"""From the labels that people write down to class numbers."""

import re
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError, UsageError

MAX_CLASSES = 100_000
_NUMBER = re.compile(r"0|[1-9][0-9]{0,17}")


def is_number(value: str) -> bool:
    """Whether a value is a whole number as a label has it: no sign, no leading zero."""
    return _NUMBER.fullmatch(value) is not None


def read_classes(path: Path) -> list[str]:
    """Read the names of the labels 0, 1, ... from a text file, one a line.

    Raises:
        UsageError: the file cannot be read, or holds an empty line or none.
    """
    try:
        names = [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines()]
    except (OSError, ValueError) as error:
        raise UsageError(f"{path} cannot be read ({error}).") from error
    if not names or not all(names):
        raise UsageError(f"{path} must hold the name of one class a line, and no empty line.")
    return names


class Classes:
    """Turns written labels into class numbers.

    With `given` names, a value is a name, or else a number into them; but not a number if a name
    looks like one ("10" comes before "2" among folders). Without, the values decide when all are
    known: whole numbers stay what they are, other values are the names, sorted.

    Args:
        given: the names of the labels 0, 1, ...

    Raises:
        DataError: a name stands twice.
    """

    def __init__(self, given: Sequence[str] = ()) -> None:
        self.given = list(given)
        self._codes = {name: code for code, name in enumerate(given)}
        if len(self._codes) != len(self.given):
            raise DataError("The list of classes has a name twice.")
        self._numbers = bool(given) and not any(map(is_number, given))

    def code(self, value: str) -> int | None:
        """Return a number for a value, for `finished`; None if it is none of the given classes.

        Raises:
            DataError: there are more values than any set has classes.
        """
        if not self.given:
            code = self._codes.setdefault(value, len(self._codes))
            if code >= MAX_CLASSES:
                raise DataError(
                    f"There are more than {MAX_CLASSES} different labels, such as {value!r}: these "
                    "are no classes."
                )
            return code
        if self._numbers and is_number(value):
            return int(value) if int(value) < len(self.given) else None
        return self._codes.get(value)

    def finished(self) -> tuple[npt.NDArray[np.int32], list[str]]:
        """Return the label of each code, (codes,) int32, and the names of the labels 0, 1, ..."""
        if self.given:
            return np.arange(len(self.given), dtype=np.int32), self.given
        names = _names(self._codes)
        places = {name: place for place, name in enumerate(names)}
        return np.array([places[value] for value in self._codes], dtype=np.int32), names


def _names(values: Iterable[str]) -> list[str]:
    values = list(values)
    if not all(map(is_number, values)):
        return sorted(values)
    largest = max(map(int, values), default=-1)
    if largest < MAX_CLASSES:
        return [str(number) for number in range(largest + 1)]
    return sorted(values, key=int)
