"""Finding the classes of one source among those of another."""

import unicodedata
from collections.abc import Callable, Sequence


def matched(names: Sequence[str], expected: Sequence[str]) -> dict[str, str]:
    """Return which of the expected names each name means; those that mean none are absent.

    A name means its equal; else the one that is equal by Unicode normalization (a Mac writes é as
    two characters), or that is the same number (001 is 1), if there is no second one on either
    side.
    """
    found = {name: name for name in set(names) & set(expected)}
    for form in (_normalized, _number):
        left = _by_form(form, [name for name in expected if name not in found.values()])
        for key, mine in _by_form(form, [name for name in names if name not in found]).items():
            theirs = left.get(key, [])
            if len(mine) == len(theirs) == 1:
                found[mine[0]] = theirs[0]
    return found


def few(names: Sequence[str]) -> str:
    """Return the first five of some names, and the number of the others."""
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _by_form(form: Callable[[str], str | None], names: Sequence[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in names:
        if (key := form(name)) is not None:
            found.setdefault(key, []).append(name)
    return found


def _normalized(name: str) -> str:
    return unicodedata.normalize("NFC", name)


def _number(name: str) -> str | None:
    return name.lstrip("0") or "0" if name.isascii() and name.isdigit() else None
