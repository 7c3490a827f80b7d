"""The Slurm script against stand-ins for srun and scontrol that act as Slurm's source does."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from states import status

from fastmoco.runs.run_folder import RunFolder

pytestmark = [pytest.mark.slow, pytest.mark.dist]
ROOT = Path(__file__).parents[1]
SCRIPT = ROOT / "launch" / "slurm" / "pretrain.sbatch"

# src/srun/signals.c: SIGTERM, SIGHUP and SIGQUIT make srun kill its step, SIGUSR1 is handed on;
# src/plugins/proctrack/cgroup: SIGKILL reaches all processes, any other signal the tasks alone.
SRUN = """
import itertools, os, psutil, signal, subprocess, sys, time
command = list(itertools.dropwhile(lambda word: word.startswith("--"), sys.argv[1:]))
tasks = []
for number in map(str, range(int(os.environ["SLURM_NTASKS"]))):
    places = {"SLURM_PROCID": number, "SLURM_LOCALID": number}
    tasks.append(subprocess.Popen(command, env=os.environ | places, start_new_session=True))
open("tasks", "w").write(" ".join(str(task.pid) for task in tasks))

def kill(*_):
    for process in psutil.Process().children(recursive=True):
        process.kill()

for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
    signal.signal(number, kill)
signal.signal(signal.SIGUSR1, lambda number, _: [task.send_signal(number) for task in tasks])
while None in (codes := [task.poll() for task in tasks]):
    if "--kill-on-bad-exit" in sys.argv and any(codes):
        kill()
    time.sleep(0.05)
sys.exit(max(code if code >= 0 else 128 - code for code in codes))
"""
SCONTROL = """
import os, sys
if sys.argv[1] == "show":
    print("127.0.0.1\\nanother")
else:
    open("requeued", "a").write(sys.argv[2])
"""


class Job:
    """A job in a folder, told what Slurm would tell it."""

    def __init__(self, folder: Path, tasks: int, *arguments: str) -> None:
        self.folder, self.tasks = folder, tasks
        commands = folder / "bin"
        commands.mkdir()
        for name, source in {"srun": SRUN, "scontrol": SCONTROL}.items():
            (commands / name).write_text(f"#!{sys.executable}\n{source}")
            (commands / name).chmod(0o755)
        path = os.pathsep.join(
            [str(commands), str(Path(sys.executable).parent), os.environ["PATH"]]
        )
        places = {
            "SLURM_JOB_ID": os.getpid(),
            "SLURM_JOB_NODELIST": "here[0-1]",
            "SLURM_NTASKS": tasks,
            "SLURM_NTASKS_PER_NODE": tasks,
            "SLURM_CPUS_PER_TASK": 1,
        }
        environment = os.environ | {"PATH": path, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        environment |= {name: str(value) for name, value in places.items()}
        with (folder / "said").open("w") as said:
            self.script = subprocess.Popen(
                ["bash", str(SCRIPT), *arguments],
                cwd=folder,
                env=environment,
                stdout=said,
                stderr=said,
            )

    def words(self) -> str:
        return (self.folder / "said").read_text()

    def tell_tasks(self, number: signal.Signals) -> None:
        for pid in (self.folder / "tasks").read_text().split():
            os.kill(int(pid), number)

    def warn(self) -> None:
        """Send what `--signal` of the header asks for: to the script by `B:`, else to the tasks."""
        (asked,) = [x for x in SCRIPT.read_text().splitlines() if x.startswith("#SBATCH --signal=")]
        if "=B:USR1" in asked:
            self.script.send_signal(signal.SIGUSR1)
        else:
            self.tell_tasks(signal.SIGUSR1)

    def cancel(self) -> None:
        self.tell_tasks(signal.SIGTERM)
        self.script.send_signal(signal.SIGTERM)


@pytest.mark.parametrize(
    ("told", "tasks", "code", "requeued"),
    [(Job.warn, 2, 0, True), (Job.cancel, 1, 143, False)],
    ids=["time", "scancel"],
)
def test_a_job_that_is_told_saves_and_comes_back_unless_canceled(
    recipe, tmp_path, told, tasks, code, requeued
):
    out = tmp_path / "a run"
    options = (f"out={out}", "schedule.epochs=100000", "monitor=null")
    job = Job(tmp_path, tasks, str(recipe), *options)
    deadline = time.monotonic() + 120
    while not (out / "checkpoints" / "step-000000004").exists():
        assert job.script.poll() is None, job.words()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    told(job)
    assert job.script.wait(120) == code, job.words()
    step = RunFolder(out).latest()[1]
    assert f"step {step} of 300000" in (out / "stopped").read_text()
    assert status(out)["code"] == 0
    asked = tmp_path / "requeued"
    assert (asked.read_text() if asked.exists() else None) == (
        str(os.getpid()) if requeued else None
    )


def test_a_job_with_a_wrong_recipe_ends_with_its_code_and_starts_nothing(recipe, tmp_path):
    job = Job(tmp_path, 1, str(recipe), "bacth=8")
    assert job.script.wait(120) == 2
    assert "did you mean 'batch'" in job.words()
    assert not (tmp_path / "tasks").exists() and not (tmp_path / "requeued").exists()
