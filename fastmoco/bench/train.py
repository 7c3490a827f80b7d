"""End to end: loader and step together, against the same step alone and the same loader alone.

Together against the step alone says whether data waits: 1.00x, never. On a CPU both share the
cores, so that together is slower than either; on a GPU 0.95x or more is the aim. The step alone
gets synthetic batches that are made once; the loader alone reads the same set and drops the views.
"""

import json
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from fastmoco.bench.arm import Section
from fastmoco.bench.harness import Arm, OnRow, compare
from fastmoco.bench.report import Report
from fastmoco.bench.source import warm
from fastmoco.bench.step import BATCHES, synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, device_of
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import settings_of
from fastmoco.load.loader import Batch, Loader
from fastmoco.pretrain import resolve
from fastmoco.train.engine import Engine

WARM_UP = 5  # steps before the section: more than the loader makes ahead
# Of the recipe, what a report tells.
_TOLD = {
    *("arch", "image_size", "views", "batch", "bn_group", "queue", "precision"),
    *("executor", "threads", "prefetch"),
}


def bench_train(
    recipe_name: str,
    overrides: Sequence[str],
    data: Path | None,
    steps: int,
    pairs: int,
    against_itself: bool = False,
    on_row: OnRow | None = None,
) -> Report:
    """Measure images per second of a recipe on one process, end to end and in its parts.

    Args:
        recipe_name, overrides: as `load_recipe` takes them; the recipe's own sets are not read.
        data: a packed set; None: the demo's training patches, made for this and removed.
        steps: in the measured section.
        pairs, against_itself, on_row: see `compare`.

    Raises:
        UsageError: no such recipe or set, or the demo's photographs are not installed.
        DataError: the set is damaged, or smaller than a batch.
        ArmFailed: an arm failed.
    """
    with _folder(data) as root:
        recipe, opened = _recipe(recipe_name, overrides, root)
        warm(root)
        subject = {
            "recipe": recipe.name,
            "set": data.resolve().name if data else "demo patches",
            "set_ids": opened.set_ids,
            "steps": steps,
            **recipe.model_dump(mode="json", include=_TOLD),
        }
        return compare(
            _arms(recipe, steps),
            pairs,
            on_row=on_row,
            against_itself=against_itself,
            subject=subject,
        )


@contextmanager
def _folder(data: Path | None) -> Iterator[Path]:
    """Yield the set's folder; without one, the demo's patches, packed for as long as needed."""
    if data:
        yield data
        return
    from fastmoco.demo.demo import PHOTOGRAPHS, Cut, make_set

    with TemporaryDirectory(prefix="fastmoco-bench-") as folder:
        make_set(Path(folder), "train", Cut().train, PHOTOGRAPHS)
        yield Path(folder) / "train"


def _recipe(name: str, overrides: Sequence[str], root: Path) -> tuple[Recipe, ConcatShardSets]:
    """Return the resolved recipe on the set, which has been found to fit it, and the set."""
    recipe = load_recipe(name, [*overrides, f"data.sets=[{json.dumps(str(root))}]", "monitor=null"])
    opened = ConcatShardSets.open(recipe.data.sets)
    recipe = resolve(recipe, opened.sets[0])
    Loader.of(
        recipe, opened, settings_of(recipe.runtime, World(), device_of(recipe.runtime.device, 0))
    )
    return recipe, opened


def _arms(recipe: Recipe, steps: int) -> dict[str, Arm]:
    options = {"recipe": recipe.model_dump(mode="json"), "steps": steps}
    # The parts do less on purpose.
    return {
        "fastmoco": Arm.of(f"{__name__}:together", **options),
        "step alone": Arm(Arm.of(f"{__name__}:step_alone", **options).command, bound=True),
        "loader alone": Arm(Arm.of(f"{__name__}:loader_alone", **options).command, bound=True),
    }


def together(section: Section, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on what the loader draws."""
    run = _Run(recipe)
    batches, moco, waits = run.batches(), run.engine(), []

    def work(number: int) -> None:
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        query_view, key_view = batch.views
        moco.step(query_view, key_view, number)

    done = run.measured(section, work, steps)
    waited = 100 * sum(waits[WARM_UP:]) / section.seconds
    return {**done, "details": {"data_wait_percent": waited}}


def step_alone(section: Section, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on batches that are there already."""
    run = _Run(recipe)
    moco, views = run.engine(), cycle(run.synthetic())
    return run.measured(section, lambda number: moco.step(*next(views), number), steps)


def loader_alone(section: Section, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Draw batches and drop them."""
    run = _Run(recipe)
    batches = run.batches()
    return run.measured(section, lambda _: next(batches), steps)


class _Run:
    """What the arms have in common: the recipe on this machine, one rank."""

    def __init__(self, recipe: dict[str, Any]) -> None:
        self.recipe = Recipe.model_validate(recipe)
        self.device = device_of(self.recipe.runtime.device, 0)

    def engine(self) -> Engine:
        return Engine(self.recipe, World(), self.device)

    def batches(self) -> Iterator[Batch]:
        data = ConcatShardSets.open(self.recipe.data.sets)
        settings = settings_of(self.recipe.runtime, World(), self.device)
        return Loader.of(self.recipe, data, settings).batches()

    def synthetic(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        """Return batches in the layout, and the dtype, of the loader's on this device."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32

        def made(view: torch.Tensor) -> torch.Tensor:
            return view.to(self.device, dtype, memory_format=torch.channels_last)

        drawn = synthetic(self.recipe.batch, self.recipe.encoder.image_size, BATCHES)
        return [(made(q), made(k)) for q, k in drawn]

    def measured(
        self, section: Section, work: Callable[[int], object], steps: int
    ) -> dict[str, Any]:
        """Call `work` with step numbers, the first ones as a warm-up; return an arm's result."""
        for number in range(WARM_UP):
            work(number)
        self._wait()
        with section:
            for number in range(WARM_UP, WARM_UP + steps):
                work(number)
            self._wait()
        return {"images": steps * self.recipe.batch}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
