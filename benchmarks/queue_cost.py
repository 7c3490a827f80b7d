"""What the queue costs a step, by its length K; and whether a step gets slower as the queue ages.

    python benchmarks/queue_cost.py [--batch 256] [--rounds 20]

Rows: for each K the median time of logits, loss, its gradient and the enqueueing; the line fitted
through them (cost should be linear in K); then whole steps of a small network while its queue is
filled for the first time and after it has wrapped again and again, taken in turn. JSON for
benchmarks/results/.
"""

import argparse
import json
import statistics
import time
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F

from fastmoco.check.throughput import synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.core.distributed import World
from fastmoco.core.environment import environment
from fastmoco.train.engine import Engine
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.queue import KeyQueue

LENGTHS = (4096, 16384, 65536)
DIM, TEMPERATURE = 128, 0.2
SMALL = [
    "encoder.arch=resnet18",
    "encoder.image_size=32",
    "batch=32",
    "objective.bn_group=16",
    "objective.queue=256",
    "runtime.device=cpu",
]
WRAPS = 5  # of the old queue before it is measured

EncodedBatch = Callable[[], object]


def main() -> int:
    """Measure, print the rows, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=20)
    options = parser.parse_args()
    print(json.dumps({"kind": "environment", **environment()}))
    for row in [*by_length(options.batch, options.rounds), *by_age(options.rounds)]:
        print(json.dumps(row), flush=True)
    return 0


def by_length(batch: int, rounds: int) -> list[dict[str, object]]:
    """Return a row for each K and one for the line through them."""
    medians = in_turn({k: queue_work(k, batch) for k in LENGTHS}, rounds)
    rows = [{"kind": "length", "queue": k, "batch": batch, "ms": medians[k]} for k in LENGTHS]
    return [*rows, {"kind": "line", **line_through(LENGTHS, [medians[k] for k in LENGTHS])}]


def queue_work(length: int, batch: int) -> EncodedBatch:
    """Return the part of a step that depends on K: logits, loss, gradient, enqueueing."""
    queue, ok = KeyQueue(length, DIM, seed=0), torch.tensor(True)
    queries, keys = (F.normalize(torch.randn(batch, DIM), dim=1) for _ in range(2))
    queries.requires_grad_()

    def work() -> None:
        loss, _, _ = info_nce(queries, keys, queue.keys, TEMPERATURE)
        loss.mean().backward()
        queue.enqueue(keys, ok)

    return work


def by_age(rounds: int) -> list[dict[str, object]]:
    """Return the time of a step in the first filling of the queue and after `WRAPS` wraps.

    Both engines are there from the start and measured in turn; the young one is put back to an
    empty queue whenever it is full.
    """
    young, old = engine(), engine()
    each = len(young.queue) // young.recipe.batch
    step_of_old = stepper(old)
    for _ in range(WRAPS * each):
        step_of_old()
    empty = {name: t.clone() for name, t in young.queue.state_dict().items()}
    step_of_young, taken = stepper(young), iter(range(10**9))

    def first_filling() -> None:
        if next(taken) % each == 0:
            young.queue.load_state_dict(empty)
        step_of_young()

    medians = in_turn({"first filling": first_filling, "wrapped": step_of_old}, rounds)
    return [{"kind": "age", "queue_is": age, "ms": ms} for age, ms in medians.items()]


def engine() -> Engine:
    """Return a small engine with a queue of a few batches."""
    return Engine(load_recipe("moco_v2_imagenet_r50", SMALL), World(), torch.device("cpu"))


def stepper(moco: Engine) -> EncodedBatch:
    """Return a function that takes the engine's next step, always on one batch."""
    ((q, k),) = synthetic(moco.recipe.batch, moco.recipe.encoder.image_size, 1)
    views = [view.contiguous(memory_format=torch.channels_last) for view in (q, k)]
    numbers = iter(range(10**9))
    return lambda: moco.step(*views, next(numbers))


def in_turn(works: dict, rounds: int) -> dict:
    """Return the median milliseconds of each work; a drift of the machine meets all alike."""
    times: dict = {name: [] for name in works}
    for round_ in range(rounds + 1):
        for name, work in works.items():
            began = time.perf_counter()
            work()
            if round_:  # the first one warms up
                times[name].append(1e3 * (time.perf_counter() - began))
    return {name: round(statistics.median(found), 3) for name, found in times.items()}


def line_through(lengths: tuple[int, ...], ms: list[float]) -> dict[str, float]:
    """Return slope and intercept of the least squares line, and its share of the variance."""
    slope, intercept = np.polyfit(lengths, ms, 1)
    return {
        "ms_per_1024_keys": round(1024 * slope, 4),
        "intercept_ms": round(intercept, 3),
        "r2": round(float(np.corrcoef(lengths, ms)[0, 1] ** 2), 4),
    }


if __name__ == "__main__":
    raise SystemExit(main())
