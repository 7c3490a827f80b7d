"""The pages that a step on a CPU asks the kernel for, in a process of its own each."""

import os
import subprocess
import sys

import pytest

STEPS = """
import sys, torch
from resource import RUSAGE_SELF, getrusage
from comparisons.step import Settings
from fastmoco.check.throughput import synthetic
from fastmoco.core.distributed import World
from fastmoco.train import engine as moco

if sys.argv[1] == "as it comes":
    moco.keep_freed_memory = lambda device: None
recipe = Settings(size=64, batch=32, queue=64, precision="fp32", device="cpu").recipe()
engine = moco.Engine(recipe, World(), torch.device("cpu"))
batches = [
    [view.to(memory_format=torch.channels_last) for view in views] for views in synthetic(32, 64, 7)
]
faults = []
for step, views in enumerate(batches):
    before = getrusage(RUSAGE_SELF).ru_minflt
    engine.step(*views, step)
    faults.append(getrusage(RUSAGE_SELF).ru_minflt - before)
print(sorted(faults[2:])[2])
"""


def faults(how: str) -> int:
    """Return the page faults of a step, the median of five."""
    # Where glibc starts from is a matter of luck, but for these.
    eager = {"MALLOC_MMAP_THRESHOLD_": "131072", "MALLOC_TRIM_THRESHOLD_": "131072"}
    command = [sys.executable, "-c", STEPS, how]
    path = {"PYTHONPATH": os.pathsep.join(sys.path)}  # benchmarks/ too, as pytest has it
    done = subprocess.run(
        command, env=os.environ | eager | path, capture_output=True, check=True, text=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_a_step_uses_the_pages_of_the_one_before():
    assert faults("kept") < 0.1 * faults("as it comes")
