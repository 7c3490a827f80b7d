"""End to end: loader and step together, against the same step alone and the same loader alone.

Together against the step alone says whether data waits: 1.00x, never. On a CPU both share the
cores, so that together is slower than either; on a GPU 0.95x or more is the aim. The step alone
gets synthetic batches that are made once; the loader alone reads the same set and drops the views.
"""

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from harness.compare import Arm, OnRow, compare
from harness.images import warm
from harness.report import Report

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from fastmoco.pretrain import resolve

ARMS = "fastmoco.check.throughput"
# Of the recipe, what a report tells.
_TOLD = {"batch", "views", "encoder", "objective", "runtime"}


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
        recipe, opened, get_settings(recipe.runtime, World(), get_device(recipe.runtime.device, 0))
    )
    return recipe, opened


def _arms(recipe: Recipe, steps: int) -> dict[str, Arm]:
    options = {"recipe": recipe.model_dump(mode="json"), "steps": steps}
    # The parts do less on purpose.
    return {
        "fastmoco": Arm.of(f"{ARMS}:together", **options),
        "step alone": Arm(Arm.of(f"{ARMS}:step_alone", **options).command, bound=True),
        "loader alone": Arm(Arm.of(f"{ARMS}:loader_alone", **options).command, bound=True),
    }
