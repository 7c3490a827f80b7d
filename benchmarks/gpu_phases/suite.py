"""The tests that are marked `gpu`, by pytest."""

import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

from gpu_phases.task import Figures, Item, Items, Task

ROOT = Path(__file__).parents[2]


def items(task: Task) -> Items:
    """Return one item; tests that fail add rows of their own."""
    return {"pytest/-m gpu": Item(lambda: run(task))}


def files() -> list[str]:
    """Return the files with such tests: others need packages that such a machine may lack."""
    every = sorted(ROOT.glob("tests/**/test_*.py"))
    return [str(path) for path in every if "mark.gpu" in path.read_text()]


def run(task: Task) -> Iterator[Figures]:
    """Run the tests, and yield their counts, then each that failed."""
    report = task.work / "pytest.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", f"--junitxml={report}", *files()]
    began = time.perf_counter()
    ran = subprocess.run(
        [*command, "-p", "no:cacheprovider"], cwd=ROOT, stdout=sys.stderr, check=False
    )
    if not report.is_file():
        raise RuntimeError(f"pytest ended with exit code {ran.returncode} and no report")
    yield from results(report, time.perf_counter() - began)


def results(report: Path, seconds: float) -> Iterator[Figures]:
    """Yield what a JUnit report says."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    bad = [(case, fault) for case in cases for fault in case if fault.tag in {"failure", "error"}]
    skipped = sum(case.find("skipped") is not None for case in cases)
    yield {
        "passed": len(cases) - len({id(case) for case, _ in bad}) - skipped,
        "failed": len({id(case) for case, _ in bad}),
        "skipped": skipped,
        "seconds": seconds,
    }
    for case, fault in bad:
        name = f"pytest/{case.get('classname')}::{case.get('name')}"
        reason = (fault.get("message") or fault.tag).strip().splitlines()[0]
        yield {"item": name, "status": "failed", "reason": reason}
