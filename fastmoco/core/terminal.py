"""What goes to a terminal, which a name from outside could give orders to."""

import errno
import os
import sys
import unicodedata

from fastmoco.errors import DataError, FastmocoError, UsageError

_UNWRITABLE = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES, errno.EPERM}


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


def told(error: FastmocoError | OSError) -> int:
    """Tell in plain lines what the program ends with, and return its exit code."""
    if isinstance(error, OSError):  # of a full or a read-only disk, as a rule
        where = f"{error.filename}: " if error.filename else ""
        remedy = ": make room, or choose another place" if error.errno in _UNWRITABLE else ""
        echo(f"error: {where}{error.strerror or error}{remedy}", err=True)
        return UsageError.exit_code
    # Every rank meets an error of usage; a damaged image is met by one rank alone.
    if speaks() or isinstance(error, DataError):
        echo(f"error: {error}", err=True)
    return error.exit_code
