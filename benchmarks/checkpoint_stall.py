"""What a checkpoint costs the steps: written while they wait, as before, and beside them.

    python benchmarks/checkpoint_stall.py [--step-ms 20] [--steps 250] [--every 500] [--rounds 5]
        [--out DIR]

The state is that of ResNet-50 with its queue (moco_v2_imagenet_r50) after a step; DIR is on the
disk that takes the checkpoints. A step is half Python, as of a thread that launches kernels, and
half sleep, as of one that waits for them. Rows: for both ways the median over the rounds, taken in
turn, of how much longer so many steps take with one checkpoint at their start, and its share of the
time of `every` steps. A write that is longer than the steps counts as a stall. JSON for
benchmarks/results/.
"""

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from fastmoco.config.loading import load_recipe
from fastmoco.core.distributed import World
from fastmoco.core.environment import environment
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine
from fastmoco.train.snapshot import snapshot

CPU = torch.device("cpu")
Save = Callable[[], Future | None]


def main() -> int:
    """Measure, print the rows, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--step-ms", type=float, default=20.0)
    parser.add_argument("--steps", type=int, default=250)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    print(json.dumps({"kind": "environment", **environment()}))
    moco = engine()
    with TemporaryDirectory(dir=options.out) as folder, ThreadPoolExecutor(1) as pool:
        run, numbers = RunFolder(Path(folder)), itertools.count()

        def waiting() -> None:
            run.save(moco.state(), next(numbers), {}, 2)

        def beside() -> Future:
            copied = snapshot(moco.state(), CPU)
            return pool.submit(lambda: run.save(copied(), next(numbers), {}, 2))

        ways: dict[str, Save] = {
            "none": lambda: None,
            "steps wait": waiting,
            "beside the steps": beside,
        }
        times = in_turn(ways, options.rounds, options.steps, python_work(options.step_ms / 2))
        size = next(run.checkpoints.glob("*/state.pt")).stat().st_size
    for way in list(ways)[1:]:
        stalls = [1e3 * (t - none) for t, none in zip(times[way], times["none"], strict=True)]
        stall = statistics.median(stalls)
        row = {
            "kind": "stall",
            "checkpoint": way,
            "mb": round(size / 1e6, 1),
            "step_ms": round(1e3 * statistics.median(times["none"]) / options.steps, 2),
            "stall_ms": round(stall, 1),
            "stalls_ms": [round(one, 1) for one in stalls],
            "every": options.every,
            "percent_of_step_time": round(100 * stall / (options.every * options.step_ms), 2),
        }
        print(json.dumps(row), flush=True)
    return 0


def engine() -> Engine:
    """Return an engine whose optimizer has its state."""
    moco = Engine(load_recipe("moco_v2_imagenet_r50", ["runtime.device=cpu"]), World(), CPU)
    for parameter in moco.encoder_q.parameters():
        parameter.grad = torch.zeros_like(parameter)
    moco.optimizer.step()
    return moco


def python_work(ms: float) -> Callable[[], None]:
    """Return work that holds the interpreter for so long, by its count on an idle machine."""
    count, began = 0, time.perf_counter()
    while time.perf_counter() - began < 1.0:
        sum(range(1000))
        count += 1
    thousands = max(1, round(count * ms / 1e3))

    def work() -> None:
        for _ in range(thousands):
            sum(range(1000))
        time.sleep(ms / 1e3)

    return work


def in_turn(
    ways: dict[str, Save], rounds: int, steps: int, work: Callable[[], None]
) -> dict[str, list[float]]:
    """Return the seconds of `steps` steps, way by way, one for each round after the first."""
    times: dict[str, list[float]] = {way: [] for way in ways}
    for round_ in range(rounds + 1):
        for way, save in ways.items():
            began = time.perf_counter()
            written = save()
            for _ in range(steps):
                work()
            if written:
                written.result()
            if round_:  # the first one warms up
                times[way].append(time.perf_counter() - began)
    return times


if __name__ == "__main__":
    raise SystemExit(main())
