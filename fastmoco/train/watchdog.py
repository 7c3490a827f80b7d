"""A run that stands still must end, and say where it stood."""

import faulthandler

_STDERR = 2


class Watchdog:
    """Ends the process with exit code 1 and the stacks of all threads if nothing happens.

    Args:
        stall_s: how long nothing may happen, in seconds.
    """

    def __init__(self, stall_s: float) -> None:
        self._stall_s = stall_s

    def alive(self) -> None:
        """Say that something happened."""
        # In C, on a thread of its own: it fires even where a stalled call holds the interpreter.
        # Not sys.stderr: whoever has replaced it may have no file for C to write to.
        faulthandler.dump_traceback_later(self._stall_s, exit=True, file=_STDERR)

    def __enter__(self) -> "Watchdog":
        self.alive()
        return self

    def __exit__(self, *raised: object) -> None:
        faulthandler.cancel_dump_traceback_later()
