"""What goes to a terminal, which a name from outside could give orders to."""

import os
import sys
import unicodedata


def printable(text: str) -> str:
    """Return a text with escapes for what is no character to be seen, and for odd bytes."""
    return text if text.isprintable() else "".join(map(_shown, text))


def _shown(char: str) -> str:
    hidden = unicodedata.category(char)[0] == "C" or char in "\u2028\u2029"
    return char.encode("unicode_escape").decode() if hidden else char


def speaks() -> bool:
    """Whether this process talks to the person: it is alone, or the first of several ranks."""
    return os.environ.get("WORLD_SIZE", "1") == "1" or os.environ.get("RANK", "0") == "0"


def echo(text: object, err: bool = False) -> None:
    """Print lines of text, printable, to stdout or stderr."""
    lines = map(printable, str(text).split("\n"))
    print("\n".join(lines), file=sys.stderr if err else sys.stdout)
