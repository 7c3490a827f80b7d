"""The inside of a measured process: it runs a function, times its section, prints one JSON line.

    python -m harness.arm MODULE:FUNCTION '{"option": value}'

The function is called as `function(section, **options)`. It does what is not to be measured
(imports, warm-up), then its work inside `with section:`, then collects the proof of its work. It
returns `images`, the number done in the section; `check`, what must be the same in all arms; and,
if it likes, `first_batch_s` and `details`, which are recorded.

A worker that this process starts by spawning imports this module again: it stays light.
"""

import importlib
import json
import os
import resource
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from types import TracebackType
from typing import TYPE_CHECKING, Any

from fastmoco.errors import FastmocoError, UsageError

if TYPE_CHECKING:
    import psutil


class Section:
    """Times a `with` block, and knows the CPU seconds that were spent outside of it."""

    seconds = 0.0
    _before = _after = 0.0

    def __enter__(self) -> None:
        self._before = cpu_seconds()
        self._began = time.perf_counter()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        self.seconds = time.perf_counter() - self._began
        self._after = cpu_seconds()

    def row(self) -> dict[str, float]:
        """Return wall seconds of the block, and CPU seconds of the process so far outside of it."""
        outside = self._before + (cpu_seconds() - self._after)
        return {"seconds": self.seconds, "outside_cpu_s": outside}


def cpu_seconds() -> float:
    """Return the user and system seconds of this process and of its children, ended or not."""
    import psutil  # an extra, which whoever imports what arms do may lack

    both = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    ended = sum(used.ru_utime + used.ru_stime for used in map(resource.getrusage, both))
    return ended + sum(map(_seconds_of, psutil.Process().children(recursive=True)))


def _seconds_of(process: "psutil.Process") -> float:
    import psutil

    with suppress(psutil.Error):  # it has ended since
        used = process.cpu_times()
        return float(used.user + used.system)
    return 0.0


def run(target: str, options: Mapping[str, Any]) -> dict[str, Any]:
    """Call the function `MODULE:FUNCTION`, return its result and what its section took."""
    module, colon, name = target.partition(":")
    if not colon:
        raise UsageError(f"{target}: write MODULE:FUNCTION.")
    function = getattr(importlib.import_module(module), name)
    section = Section()
    done = function(section, **options)
    return {**done, **section.row()}


def main() -> int:
    """Run the function that the command line names; return the exit code if it fails."""
    target, options = sys.argv[1:]
    try:
        result = run(target, json.loads(options))
    except FastmocoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(result), flush=True)
    # Without taking the interpreter down: with torch in it, that is 0.7 CPU seconds of no work.
    os._exit(0)


if __name__ == "__main__":
    sys.exit(main())
