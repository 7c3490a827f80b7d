"""Metrics on their way to TensorBoard and Weights & Biases, beside metrics.jsonl."""

import math
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastmoco.config.recipe import Recipe
from fastmoco.core.files import write_bytes
from fastmoco.core.streams import Spared
from fastmoco.errors import UsageError

Write = Callable[[dict[str, float], int], None]


class Tracker:
    """Hands the numbers of logged steps and epochs to a service.

    Args:
        name: of the service; where it fails, the run goes on.
        write: takes numbers by name, and the step.
        close: called at the end.
    """

    def __init__(self, name: str, write: Write, close: Callable[[], None]) -> None:
        self._spared = Spared(f"some numbers in {name}", Exception)
        self._write, self._close = write, close

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *raised: object) -> None:
        with self._spared:
            self._close()

    def show(self, row: dict[str, Any]) -> None:
        """Hand on the numbers of a logged step or of an epoch; other rows have none."""
        group = {"step": "train", "epoch": "epoch"}.get(row["kind"])
        if group is None:
            return
        numbers = {
            f"{group}/{name}": value
            for name, value in row.items()
            if isinstance(value, int | float) and math.isfinite(value) and name != "step"
        }
        with self._spared:
            self._write(numbers, row["step"])


def trackers(recipe: Recipe, root: Path, start: int) -> list[Tracker]:
    """Return those of a recipe, for the run folder `root`, going on from step `start`.

    Raises:
        UsageError: the package of one is not installed.
    """
    known = {"tensorboard": _tensorboard, "wandb": _wandb}
    if missing := [name for name in recipe.runtime.trackers if not find_spec(name)]:
        raise UsageError(
            f"runtime.trackers={list(recipe.runtime.trackers)} needs a package that is not "
            "installed "
            f"({', '.join(missing)}): pip install 'fastmoco[trackers]', or leave it out."
        )
    found = []
    for name in recipe.runtime.trackers:
        with Spared(name, Exception):
            found.append(known[name](recipe, root, start))
    return found


def _tensorboard(recipe: Recipe, root: Path, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(root / "tensorboard"), purge_step=start + 1)

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker("tensorboard", write, writer.close)


def _get_id(root: Path) -> str:
    """Return the name that a run goes on under, for as long as its folder lives."""
    path = root / "wandb_id"
    if not path.exists():
        write_bytes(path, uuid4().hex[:16].encode())
    return path.read_text()


def _wandb(recipe: Recipe, root: Path, start: int) -> Tracker:
    import wandb

    run = wandb.init(
        project="fastmoco",
        name=recipe.name,
        dir=root,
        config=recipe.model_dump(mode="json"),
        id=_get_id(root),
        resume="allow",
    )
    return Tracker("wandb", lambda numbers, step: run.log(numbers, step=step), run.finish)
