"""Arms measured in pairs: a fresh process each, in the order ABBA.

So a drift of the machine meets all arms alike, and only the ratio within a pair counts. An arm is
a command whose last line on stdout is a JSON object:

    images         done in the measured section
    seconds        wall time of the measured section, warm-up and imports left out
    check          proof of the work; must be the same in all arms, floats within a tolerance
    outside_cpu_s  optional: CPU seconds that the arm spent outside of the section
    first_batch_s  optional
    details        optional: recorded, not compared

`harness.arm` makes such a command of a function. The first arm is the one in question: a
ratio above 1 says that it is so many times faster than the other one, or takes so many times less
CPU. `harness.resource_monitor` says how costs are measured.
"""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from fastmoco.errors import FastmocoError, UsageError
from harness.report import Measurement, Report, report_of

BENCHMARKS = Path(__file__).resolve().parents[1]  # whose modules the arms are
TOLERANCE = 0.5  # of floats in `check`: half a level of 0..255, half a pixel
LEAST_CPU = 1e-6  # seconds: a section that only waits must not divide by zero
AGAIN = " (again)"
_COPIED = ("wall_s", "peak_bytes", "memory_samples", "load_before", "steal_percent")


class ArmFailed(FastmocoError):
    """An arm ended without a result."""


@dataclass(frozen=True)
class Arm:
    """A command to measure.

    Attributes:
        command: program and arguments; never recorded, as it may hold paths.
        bound: it does less on purpose, to show what is left to gain: its proof is not compared.
    """

    command: Sequence[str]
    bound: bool = False

    @classmethod
    def of(cls, target: str, **options: Any) -> "Arm":
        """Return the arm that calls `MODULE:FUNCTION`, see `harness.arm`."""
        return cls((sys.executable, "-m", "harness.arm", target, json.dumps(options)))


OnRow = Callable[[Measurement], None]


def compare(
    arms: Mapping[str, Arm],
    pairs: int,
    seconds: float = 3600,
    on_row: OnRow | None = None,
    *,
    against_itself: bool = False,
    tolerance: float = TOLERANCE,
    subject: Mapping[str, Any] | None = None,
) -> Report:
    """Measure arms in turn and compare the first with the others.

    Args:
        arms: by name; at least two, or one that is measured against itself.
        pairs: rounds in which each arm runs once; at least 5 for a claim, an even number is fair.
        seconds: that one measurement may take.
        on_row: called after each measurement.
        against_itself: run the first arm twice (A/A) instead of all of them.
        tolerance: of floats in the arms' proof of work.
        subject: what is measured, for the report: its settings and inputs, without absolute paths.

    Raises:
        UsageError: psutil is not installed, or this is not Linux.
        ArmFailed: an arm fails, takes too long, or prints no result.
    """
    require_tools()
    from fastmoco.core.environment import environment

    machine = environment()
    if against_itself:
        name, arm = next(iter(arms.items()))
        arms = {name: arm, name + AGAIN: arm}
    measurements = []
    for pair, name in schedule(list(arms), pairs):
        measurements.append(measure(name, arms[name], pair, seconds))
        if on_row:
            on_row(measurements[-1])
    bounds = {name for name, arm in arms.items() if arm.bound}
    return report_of(measurements, machine, subject or {}, tolerance, against_itself, bounds)


def require_tools() -> None:
    """Check that costs can be measured here.

    Raises:
        UsageError: they cannot.
    """
    if not Path("/proc/self/smaps_rollup").exists():
        raise UsageError(
            "A comparison reads memory and CPU time as Linux tells them: run it there."
        )
    if find_spec("psutil") is None:
        raise UsageError("A comparison needs psutil: pip install 'fastmoco[bench]'.")


def schedule(arms: Sequence[str], pairs: int) -> Iterator[tuple[int, str]]:
    """Yield (pair, arm): A B, B A, A B ..., every other pair backwards."""
    for pair in range(pairs):
        for arm in arms if pair % 2 == 0 else reversed(arms):
            yield pair, arm


def measure(name: str, arm: Arm, pair: int = 0, seconds: float = 3600) -> Measurement:
    """Run an arm once, in a fresh process.

    Raises:
        ArmFailed: it fails, takes too long, or prints no result.
    """
    told = _watched(name, arm, seconds)
    if told["status"] != 0:
        raise ArmFailed(f"The arm {name} {_end_of(told['status'])}.{_quoted(told['stderr'])}")
    result = _result(name, told["last_line"])
    return Measurement(
        arm=name,
        pair=pair,
        images=result["images"],
        seconds=result["seconds"],
        cpu_s=max(told["cpu_s"] - result.get("outside_cpu_s", 0.0), LEAST_CPU),
        whole_cpu_s=told["cpu_s"],
        check=result.get("check", {}),
        first_batch_s=result.get("first_batch_s"),
        details=result.get("details", {}),
        **{key: told[key] for key in _COPIED},
    )


def _watched(name: str, arm: Arm, seconds: float) -> dict[str, Any]:
    command = [sys.executable, "-m", "harness.resource_monitor", *arm.command]
    # A session of its own: whatever ends this measurement ends all of its processes.
    paths = (str(BENCHMARKS), os.environ.get("PYTHONPATH", ""))
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))},
    ) as process:
        try:
            out, err = process.communicate(timeout=seconds)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise ArmFailed(f"The arm {name} took more than {seconds:g} s.") from None
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    if process.returncode != 0:
        raise ArmFailed(f"The arm {name} could not be watched.{_quoted(err)}")
    told: dict[str, Any] = json.loads(out)
    return told


def _end_of(status: int) -> str:
    if status < 0:
        return f"was ended by {signal.Signals(-status).name}"
    return f"ended with exit code {status}"


def _quoted(stderr: str) -> str:
    lines = stderr.strip().splitlines()[-10:]
    return " It said:" + "".join(f"\n  {line}" for line in lines) if lines else " It said nothing."


def _result(name: str, last_line: str) -> dict[str, Any]:
    try:
        result = json.loads(last_line)
        if result["images"] > 0 and result["seconds"] > 0:
            return dict(result)
    except (ValueError, TypeError, KeyError):
        pass
    raise ArmFailed(
        f"The arm {name} did not end its output with a JSON object that holds the number of "
        f"images and seconds, but with: {last_line[:200]!r}"
    )
