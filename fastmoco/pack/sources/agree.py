"""Finding the classes of one source among those of another, and naming a few."""

from collections.abc import Sequence

from fastmoco.classes import Known


def matched(names: Sequence[str], expected: Sequence[str]) -> dict[str, str]:
    """Return which of the expected classes each name means; see `Known`. Some may mean none."""
    known = Known(expected)
    codes = {name: known.code(name) for name in names}
    return {name: expected[code] for name, code in codes.items() if code is not None}


def few(names: Sequence[str]) -> str:
    """Return the first five of some names, and the number of the others."""
    shown = ", ".join(names[:5]) or "none"
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"
