"""SIGTERM, SIGUSR1 (Slurm, spot machines) and Ctrl-C ask a run to stop at the next step."""

import os
import signal
import threading
import time
from contextlib import suppress
from types import FrameType

_NAMES = ("SIGINT", "SIGTERM", "SIGUSR1")  # Windows lacks the last
_ASKING = [getattr(signal, name) for name in _NAMES if hasattr(signal, name)]
_REPEAT_S = 1.0  # within it the launcher passes on the same request once more
_ANSWER = b"\ninterrupted: saves a checkpoint after this step; Ctrl-C again ends it at once\n"
_STDERR = 2


class StopSignal:
    """Remembers a request to stop; a second one ends the process at once.

    Args:
        answers: whether to answer a Ctrl-C in words.

    Attributes:
        received: whether one came. Outside the main thread, where Python has no signals, none does.
        interrupted: whether it was a Ctrl-C.
    """

    def __init__(self, answers: bool) -> None:
        self.received = self.interrupted = False
        self._answers = answers
        self._first = 0.0

    def __enter__(self) -> "StopSignal":
        self._before = {}
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._take) for number in _ASKING}
        return self

    def __exit__(self, *raised: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.received and now - self._first > _REPEAT_S:
            os._exit(128 + number)
        if not self.received:
            self.received, self._first = True, now
            self.interrupted = number == signal.SIGINT
            if self.interrupted and self._answers:
                with suppress(OSError):  # not by print: a signal may come in the middle of one
                    os.write(_STDERR, _ANSWER)
