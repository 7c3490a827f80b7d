"""Measures on one GPU what fastmoco claims, in ten minutes, and ends with a page.

    python benchmarks/gpu_check.py [--minutes N] [--only a,c] [--out DIR] [--photos DIR|ZIP]
                                   [--cifar SET] [--dry]

It needs the repository on PYTHONPATH and the packages that `catalog.PACKAGES` names, which it looks
for first. Each phase runs as a process of its own with a time limit; its rows are in
OUT/rows.jsonl as soon as they are measured, and a phase that fails does not keep the next from
running. OUT/page.md says what came out, OUT/log.txt what the phases said.

Exit code 0: nothing failed; 1: something did, see the page; 2: it could not start.
"""

import argparse
import importlib.util
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from gpu_phases.catalog import EVERY, PACKAGES, PHASES, SETUP, Phase
from gpu_phases.page import page_of
from gpu_phases.task import Task

ROOT = Path(__file__).resolve().parents[1]
GRACE_S = 15.0  # behind its time, after which a phase is ended
LOG_MB = 15  # of the log that are kept, its end
Row = dict[str, Any]


def main(arguments: Sequence[str] | None = None) -> int:
    """Check, run the phases, write the page, and return the exit code."""
    options = _parser().parse_args(arguments)
    letters = options.only.split(",") if options.only else [phase.letter for phase in PHASES]
    phases = [phase for phase in PHASES if phase.letter in letters]
    if faults := list(_faults(options, letters, phases)):
        print("\n".join(faults), file=sys.stderr)
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="gpu-check-") as work:
        paths = Path(work), options.out.resolve()
        task = Task(*paths, options.dry, until=0.0, photos=options.photos, cifar=options.cifar)
        minutes = options.minutes or (60.0 if options.dry else 10.0)
        return Check(task, _command(options)).run(phases, minutes)


def _path(text: str) -> Path:
    return Path(text).resolve()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="What fastmoco does on this GPU, as a page.")
    parser.add_argument("--out", type=Path, default=Path("runs/gpu_check"), help="results")
    parser.add_argument("--minutes", type=float, help="for all of it [default: 10; dry: 60]")
    parser.add_argument("--only", help=f"phases, of {','.join(_names())}")
    parser.add_argument("--photos", type=_path, help="a folder or .zip of images to draw from")
    parser.add_argument(
        "--cifar", type=_path, help="CIFAR-10: a packed set, or what packs into one"
    )
    parser.add_argument("--dry", action="store_true", help="toy sizes on a CPU")
    return parser


def _faults(
    options: argparse.Namespace, letters: Sequence[str], phases: Sequence[Phase]
) -> Iterator[str]:
    """Yield in words what keeps the check from starting."""
    yield from (f"There is no phase {letter!r}." for letter in letters if letter not in _names())
    for path in filter(None, (options.photos, options.cifar)):
        if not path.exists():
            yield f"There is no {path}."
    if (options.out / "rows.jsonl").exists():
        yield f"{options.out} holds a check already: choose another --out."
    absent = missing(phases, given=bool(options.photos))
    yield from absent
    if not (absent or options.dry or _has_gpu()):
        yield "There is no CUDA device: --dry tries the phases at toy size on the CPU."


def _names() -> list[str]:
    return sorted(phase.letter for phase in PHASES)


def _command(options: argparse.Namespace) -> str:
    """Return the command of any of the phases, without folders of this machine."""
    given = [f"--{k} {v.name}" for k in ("photos", "cifar") if (v := getattr(options, k))]
    dry = ["--dry"] if options.dry else []
    return " ".join(("python benchmarks/gpu_check.py", *dry, *given))


def missing(phases: Iterable[Phase], given: bool = False) -> list[str]:
    """Return a line for each package that is not installed.

    Args:
        phases: that shall run.
        given: whether the photographs need not be cut from what packages carry.
    """
    needed = dict.fromkeys(EVERY)
    for phase in phases:
        needed |= dict.fromkeys(phase.needs)
        if phase.photographs and not given:
            needed["sklearn"] = None
    return [f"Not installed: {PACKAGES[name]}." for name in needed if not _found(name)]


def _found(module: str) -> bool:
    try:
        return importlib.util.find_spec(module) is not None
    except ImportError:  # of the package that it is in
        return False


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


class Check:
    """A check in progress: rows are written down the moment that they come.

    Args:
        task: what each phase is told, but for its time.
        command: that started it, without the phases.
    """

    def __init__(self, task: Task, command: str) -> None:
        self.task, self.command = task, command
        self.rows: list[Row] = []
        self._began = time.time()

    def run(self, phases: Sequence[Phase], minutes: float) -> int:
        """Run the phases within the time, write the page, and return the exit code."""
        photographs = any(phase.photographs for phase in phases)
        spared = () if photographs else ("data/photographs", "data/packed set")
        queue = [SETUP, *phases]
        until = self._began + 60 * minutes - GRACE_S
        for number, phase in enumerate(queue):
            left = until - time.time()
            part = left * phase.seconds / sum(later.seconds for later in queue[number:])
            if left < phase.least:
                reason = {"status": "not measured", "reason": "no time left"}
                self._write(phase, {"item": phase.module, **reason})
            else:
                self.run_phase(phase, time.time() + max(part, phase.least), spared)
            self._write_page(phases)
        self._shorten_log()
        print(f"{self.task.out / 'page.md'}")
        return int(any(row["status"] == "failed" for row in self.rows))

    def run_phase(self, phase: Phase, until: float, spared: Sequence[str] = ()) -> None:
        """Run a phase; if its process dies, another one goes on behind the item that it died at."""
        seen = [*spared]
        while True:
            began, fate = self._process(phase, until, seen)
            if fate is None:
                return
            self._write(phase, {"item": began, "status": "failed", "reason": fate})
            # Dead before its first item, or out of time: another process would do no better.
            if began == phase.module or time.time() > until:
                return

    def _process(self, phase: Phase, until: float, seen: list[str]) -> tuple[str, str | None]:
        """Run one process; return the item that it began last, and how it died; None: it did not.

        Items that it began join `seen`.
        """
        task = replace(self.task, until=until)
        command = [sys.executable, "-m", "gpu_phases.worker", phase.module, task.to_json()]
        paths = [str(ROOT / "benchmarks"), str(ROOT), os.environ.get("PYTHONPATH", "")]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
        if self.task.dry:  # what is this small only waits for other threads
            environment["OMP_NUM_THREADS"] = "1"
        began = phase.module
        with (
            (self.task.out / "log.txt").open("a") as log,
            subprocess.Popen(
                [*command, json.dumps(seen)],
                stdout=subprocess.PIPE,
                stderr=log,
                env=environment,
                text=True,
                start_new_session=True,  # its end is that of whatever it has started
            ) as process,
        ):
            print(f"== {phase.letter}. {phase.title}", file=log, flush=True)
            limit = until + GRACE_S - time.time()
            overdue = threading.Event()
            alarm = threading.Timer(limit, _end, (process, overdue))
            alarm.start()
            assert process.stdout
            try:
                for line in process.stdout:
                    row = json.loads(line)
                    if "began" in row:
                        began = row["began"]
                        seen.append(began)
                    else:
                        self._write(phase, row)
                status = process.wait()
            finally:
                alarm.cancel()
                _end(process)
        if overdue.is_set():
            return began, f"no result within {limit:.0f} s"
        return began, _fate(status) if status else None

    def _write(self, phase: Phase, row: Row) -> None:
        """Write a row down, and show it."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        command = f"{self.command} --only {phase.letter}"
        row = {"phase": phase.letter, "at": now, "command": command, "dry": self.task.dry, **row}
        self.rows.append(row)
        with (self.task.out / "rows.jsonl").open("a") as stream:
            stream.write(json.dumps(row) + "\n")
        print(f"{phase.letter}  {row['item']}: {row.get('reason') or row['status']}", flush=True)

    def _write_page(self, phases: Sequence[Phase]) -> None:
        began = datetime.fromtimestamp(self._began, UTC).strftime("%Y-%m-%d %H:%M UTC")
        phases = sorted(phases, key=lambda phase: phase.letter)
        page = page_of(self.rows, phases, self.command, began, self.task.dry)
        (self.task.out / "page.md").write_text(page)

    def _shorten_log(self) -> None:
        log = self.task.out / "log.txt"
        if log.stat().st_size > LOG_MB * 2**20:
            log.write_bytes(log.read_bytes()[-LOG_MB * 2**20 :])


def _end(process: "subprocess.Popen[str]", overdue: threading.Event | None = None) -> None:
    """End a phase's process and all that it has started."""
    if overdue:
        overdue.set()
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def _fate(status: int) -> str:
    if status < 0:
        return f"the process was ended by {signal.Signals(-status).name}"
    return f"the process ended with exit code {status}, see log.txt"


if __name__ == "__main__":
    sys.exit(main())
