"""Many steps of a tiny network: does memory grow, do open files stay open, does it get slower?

    python benchmarks/soak.py [--steps 10000] [--every 500] [--trainer]

Without --trainer the bare step on one synthetic batch. With it the loop of a real run on a tiny
packed set: loader, log, checkpoints. A row each `--every` steps and a verdict: the growth of the
anonymous memory from the first quarter's end to the end, by a fitted line, and of the open files.
The exit code is 1 where something grows.
"""

import argparse
import json
import os
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image

from fastmoco.check.throughput import synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import AsyncAnyFlag, World
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pretrain import resolve
from fastmoco.runs.checkpoints import get_fingerprint
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine
from fastmoco.train.loop import Trainer

BATCH, SIZE, IMAGES = 8, 32, 64
TINY = [
    *(
        "encoder.arch=resnet10",
        "encoder.stem=small-stride2",
        f"encoder.image_size={SIZE}",
        f"batch={BATCH}",
    ),
    *(
        "objective.bn_group=4",
        "objective.queue=64",
        "encoder.dim=32",
        "monitor=null",
        "runtime.device=cpu",
        "optimizer.lr=0.001",
    ),
]
ALLOWED = 0.02  # growth of the memory, of its size: an allocator's noise

Sample = Callable[[int], None]


class Soak:
    """Takes samples of this process and judges them."""

    def __init__(self, every: int) -> None:
        self.rows: list[dict[str, float]] = []
        self._every, self._since = every, time.perf_counter()

    def sample(self, step: int) -> None:
        """Print a row on the steps so far."""
        now = time.perf_counter()
        row = {
            "step": step,
            "anonymous_kb": anonymous_kb(),
            "open_files": len(os.listdir("/proc/self/fd")),
            "images_per_s": round(self._every * BATCH / (now - self._since), 1),
        }
        self._since = now
        self.rows.append(row)
        print(json.dumps(row), flush=True)

    def verdict(self) -> dict[str, Any]:
        """Return whether anything grew after the first quarter."""
        rows = self.rows[len(self.rows) // 4 :]
        steps, memory = ([row[key] for row in rows] for key in ("step", "anonymous_kb"))
        slope = float(np.polyfit(steps, memory, 1)[0]) if len(rows) > 1 else 0.0
        grown = slope * (steps[-1] - steps[0])
        files = rows[-1]["open_files"] - rows[0]["open_files"]
        flat = grown <= ALLOWED * memory[0] and files <= 0
        return {
            "steps": steps[-1],  # fewer than asked for where a signal ended the run
            "verdict": "flat" if flat else "grows",
            "anonymous_kb_per_1000_steps": round(1000 * slope, 1),
            "open_files_gained": files,
        }


def anonymous_kb() -> int:
    """Return this process's anonymous memory: what it allocated, without files mapped."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("Anonymous:"))


def main() -> int:
    """Run, print the rows and the verdict, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=10_000)
    parser.add_argument("--every", type=int, default=500)
    parser.add_argument("--trainer", action="store_true")
    options = parser.parse_args()
    soak = Soak(options.every)
    run = loop if options.trainer else bare_steps
    run(options.steps, options.every, soak.sample)
    verdict = soak.verdict()
    print(json.dumps({**vars(options), **verdict}))
    return int(verdict["verdict"] != "flat")


def bare_steps(steps: int, every: int, sample: Sample) -> None:
    """Take steps on one batch."""
    recipe = load_recipe("moco_v2_imagenet_r50", TINY)
    moco = Engine(recipe, World(), torch.device("cpu"))
    ((q, k),) = synthetic(BATCH, SIZE, 1)
    views = [view.contiguous(memory_format=torch.channels_last) for view in (q, k)]
    for step in range(steps):
        moco.step(*views, step)
        if (step + 1) % every == 0:
            sample(step + 1)


def loop(steps: int, every: int, sample: Sample) -> None:
    """Let the loop of a real run take the steps."""
    with TemporaryDirectory() as folder:
        recipe = recipe_of_run(Path(folder), steps, every)
        trainer = trainer_of(recipe, sample)
        with trainer.run.locked():
            trainer.run.describe(trainer.recipe, {})
            trainer.train(0)


def recipe_of_run(folder: Path, steps: int, every: int) -> Recipe:
    """Return the recipe of a run on a tiny set, which is packed into the folder."""
    for number in range(IMAGES):
        pixels = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        (folder / "images").mkdir(exist_ok=True)
        Image.fromarray(pixels).resize((48, 48)).save(folder / "images" / f"{number}.png")
    pack(folder / "images", folder / "set", PackOptions(workers=1))
    epochs = -(-steps * BATCH // IMAGES)
    options = {
        "data.sets": json.dumps([str(folder / "set")]),
        "out": json.dumps(str(folder / "run")),
        "schedule.epochs": epochs,
        "runtime.log_every": every,
        "checkpoints.every": every,
    }
    return load_recipe("moco_v2_imagenet_r50", [*TINY, *(f"{k}={v}" for k, v in options.items())])


def trainer_of(recipe: Recipe, sample: Sample) -> Trainer:
    """Return the loop of a run, as `fastmoco.pretrain` assembles it, that shows itself to us."""
    world, device = World(), torch.device("cpu")
    data = ConcatShardSets.open(recipe.data.sets)
    recipe = resolve(recipe, data.sets[0])
    loader = Loader.of(recipe, data, get_settings(recipe.runtime, world, device))
    plan, executor = loader.plan, loader.settings.executor
    fingerprint = get_fingerprint(recipe, data.set_ids, plan.samples, plan.digest(), executor)
    engine, run = Engine(recipe, world, device), RunFolder(recipe.out)
    flag, displays = AsyncAnyFlag(world), [Watcher(sample)]
    return Trainer(recipe, engine, loader, run, fingerprint, flag, displays)


class Watcher:
    """Takes a sample at each logged step."""

    def __init__(self, sample: Sample) -> None:
        self._sample = sample

    def show(self, row: dict[str, Any]) -> None:
        """Look at this process."""
        if row["kind"] == "step":
            self._sample(row["step"])


if __name__ == "__main__":
    raise SystemExit(main())
