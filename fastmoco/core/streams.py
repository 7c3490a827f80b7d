"""Output that cannot end a run: once it is lost, that is told and the work goes on."""

import errno
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from fastmoco.core.terminal import echo


class LastingStream:
    """Hands text to a stream until that fails, and drops it from then on.

    Attributes:
        lost: why it failed; None: it has not. A reader that left (`| head`) is no failure.
    """

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self.lost: str | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def write(self, text: str) -> int:
        """Write, or drop; what the stream's encoding lacks goes as its escape."""
        try:
            try:
                self._stream.write(text)
            except UnicodeEncodeError:
                encoding = self._stream.encoding
                self._stream.write(text.encode(encoding, "backslashreplace").decode(encoding))
        except OSError as error:
            self._lose(error)
        return len(text)

    def flush(self) -> None:
        """Flush, or drop."""
        try:
            self._stream.flush()
        except OSError as error:
            self._lose(error)

    def _lose(self, error: OSError) -> None:
        # What the stream still buffers, and what Python flushes at its end, must go somewhere.
        with suppress(OSError, ValueError):
            null = os.open(os.devnull, os.O_WRONLY)
            os.dup2(null, self._stream.fileno())
            os.close(null)
        if error.errno == errno.EPIPE or self.lost:
            return
        self.lost = error.strerror or str(error)
        if self is sys.stdout:
            echo(f"warning: the output is lost from here on ({self.lost})", err=True)


class Spared:
    """A context whose failures end nothing: the first one is told on stderr.

    Args:
        what: goes on without, in words.
        errors: that are meant.
    """

    def __init__(self, what: str, errors: type[Exception] = OSError) -> None:
        self._what, self._errors, self._told = what, errors, False

    def __enter__(self) -> "Spared":
        return self

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> bool:
        if not isinstance(error, self._errors):
            return False
        if not self._told:
            self._told = True
            reason = " ".join((getattr(error, "strerror", None) or str(error)).split())
            echo(f"warning: goes on without {self._what} ({reason})", err=True)
        return True


@contextmanager
def lasting_output() -> Iterator[LastingStream]:
    """Make stdout and stderr such streams within the block; yield stdout."""
    if isinstance(sys.stdout, LastingStream):
        yield sys.stdout
        return
    before = sys.stdout, sys.stderr
    output = LastingStream(sys.stdout)
    sys.stdout, sys.stderr = output, LastingStream(sys.stderr)
    try:
        yield output
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        sys.stdout, sys.stderr = before
