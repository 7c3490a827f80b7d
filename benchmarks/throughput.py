"""Images per second of the loader alone, of the step alone (on one batch), and of both.

    python benchmarks/throughput.py [RECIPE] [key=value ...]

The recipe is the demo's by default, on the sets that `fastmoco demo` packed. Each figure is the
median of `ROUNDS` rounds taken in turn, so that a drift of the machine meets all three alike. One
JSON row is printed for benchmarks/results/.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable

import torch

from fastmoco.config import Recipe, load_recipe
from fastmoco.distributed import Ranks, device_of
from fastmoco.errors import FastmocoError
from fastmoco.load.loader import Loader
from fastmoco.load.work import settings_of
from fastmoco.pretrain import resolve, versions
from fastmoco.shardset import Collection
from fastmoco.train.moco import MoCo

ROUNDS, STEPS, WARMUP = 5, 10, 3


def main() -> int:
    """Measure, print a row, return the exit code."""
    try:
        name, *overrides = sys.argv[1:] or ["demo"]
        recipe = load_recipe(name, overrides)
        row = measure(recipe)
    except FastmocoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    print(json.dumps(row))
    return 0


def measure(recipe: Recipe) -> dict[str, object]:
    """Return the row of a recipe on this machine."""
    device = device_of(recipe.device, 0)
    data = Collection.open(recipe.data)
    recipe = resolve(recipe, data.sets[0])
    batches = Loader.of(recipe, data, settings_of(recipe, Ranks(), device)).batches()
    moco = MoCo(recipe, Ranks(), device)
    fixed = next(batches)
    numbers = iter(range(10**9))
    arms: dict[str, Callable[[], object]] = {
        "loader": lambda: next(batches),
        "step": lambda: moco.step(*fixed.views, next(numbers)),
        "both": lambda: moco.step(*next(batches).views, next(numbers)),
    }
    speeds = _speeds(arms, recipe.batch, device)
    medians = {arm: round(statistics.median(found), 1) for arm, found in speeds.items()}
    return {
        "recipe": recipe.name,
        "arch": recipe.arch,
        "image_size": recipe.image_size,
        "batch": recipe.batch,
        "precision": recipe.precision,
        "images_per_s": medians,
        "rounds": speeds,
        **versions(Ranks(), device),
    }


def _speeds(
    arms: dict[str, Callable[[], object]], batch: int, device: torch.device
) -> dict[str, list[float]]:
    speeds: dict[str, list[float]] = {arm: [] for arm in arms}
    for _ in range(ROUNDS):
        for arm, run in arms.items():
            for _ in range(WARMUP):  # uses up what was made ahead during another arm
                run()
            _wait(device)
            began = time.perf_counter()
            for _ in range(STEPS):
                run()
            _wait(device)
            speeds[arm].append(round(STEPS * batch / (time.perf_counter() - began), 1))
    return speeds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


if __name__ == "__main__":
    sys.exit(main())
