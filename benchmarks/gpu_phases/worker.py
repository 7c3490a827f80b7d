"""The inside of a phase's process: measures item after item, and writes each row as it has it.

    python -m gpu_phases.worker MODULE TASK SKIPPED

stdout is a stream of JSON lines: {"began": ITEM}, then that item's rows.
"""

import importlib
import json
import math
import os
import sys
import time
import traceback
from collections.abc import Callable, Collection
from typing import Any, TextIO

from gpu_phases.task import Item, Task, Unavailable

Say = Callable[[dict[str, Any]], None]


def main() -> int:
    """Run the phase that the command line names."""
    module, task, skipped = sys.argv[1:]
    stream = rows_alone()

    def say(row: dict[str, Any]) -> None:
        print(json.dumps({k: finite(v) for k, v in row.items()}), file=stream, flush=True)

    told = Task.from_json(task)
    # Under the name of the phase even what its imports raise.
    say({"began": module})
    items = importlib.import_module(module).items(told)
    measure(items, told.until, json.loads(skipped), say)
    stream.close()
    os._exit(0)  # a thread that will not end must not cost the rows, which are all written


def rows_alone() -> TextIO:
    """Return the parent's stream for rows; what else is printed joins stderr."""
    stream = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    return stream


def finite(value: Any) -> Any:
    """Return a value, and of a number that is not finite, None."""
    return None if isinstance(value, float) and not math.isfinite(value) else value


def measure(items: dict[str, Item], until: float, skipped: Collection[str], say: Say) -> None:
    """Measure the items in their order, as far as the time reaches."""
    for name, item in items.items():
        if name in skipped:
            continue
        if time.time() + item.least > until:
            say({"item": name, "status": "not measured", "reason": "no time left"})
            continue
        say({"began": name})
        began = time.perf_counter()
        try:
            found = item.work()
            for figures in [found] if isinstance(found, dict) else found:
                took = {"took_s": round(time.perf_counter() - began, 1)}
                say({"item": name, "status": "measured", **took, **figures})
        except Unavailable as error:
            say({"item": name, "status": "not measured", "reason": str(error)})
        except Exception as error:
            traceback.print_exc()
            reason = f"{type(error).__name__}: {str(error).strip() or 'no message'}"
            say({"item": name, "status": "failed", "reason": reason.splitlines()[0]})


if __name__ == "__main__":
    sys.exit(main())
