"""Metrics on their way to TensorBoard and Weights & Biases, beside metrics.jsonl."""

from collections.abc import Callable
from pathlib import Path
from typing import Any
from uuid import uuid4

from fastmoco.config import Recipe
from fastmoco.errors import UsageError
from fastmoco.files import write_bytes

Write = Callable[[dict[str, float], int], None]


class Tracker:
    """Hands the numbers of logged steps and epochs to a service.

    Args:
        write: takes numbers by name, and the step.
        close: called at the end.
    """

    def __init__(self, write: Write, close: Callable[[], None]) -> None:
        self._write, self._close = write, close

    def __enter__(self) -> "Tracker":
        return self

    def __exit__(self, *raised: object) -> None:
        self._close()

    def step(self, row: dict[str, Any]) -> None:
        """Hand on a logged step."""
        self._numbers("train", row)

    def epoch(self, row: dict[str, Any]) -> None:
        """Hand on the end of an epoch."""
        self._numbers("epoch", row)

    def bad(self, row: dict[str, Any]) -> None:
        """Damaged samples are no number."""

    def unsaved(self, row: dict[str, Any]) -> None:
        """A failed checkpoint is no number."""

    def _numbers(self, group: str, row: dict[str, Any]) -> None:
        numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and k != "step"}
        self._write({f"{group}/{name}": value for name, value in numbers.items()}, row["step"])


def trackers(recipe: Recipe, root: Path, start: int) -> list[Tracker]:
    """Return those of a recipe, for the run folder `root`, going on from step `start`.

    Raises:
        UsageError: the package of one is not installed.
    """
    known = {"tensorboard": _tensorboard, "wandb": _wandb}
    try:
        return [known[name](recipe, root, start) for name in recipe.trackers]
    except ImportError as error:
        raise UsageError(
            f"trackers={list(recipe.trackers)} needs a package that is not installed "
            f"({error.name}): pip install 'fastmoco[trackers]', or leave it out."
        ) from None


def _tensorboard(recipe: Recipe, root: Path, start: int) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    writer = SummaryWriter(str(root / "tensorboard"), purge_step=start + 1)

    def write(numbers: dict[str, float], step: int) -> None:
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return Tracker(write, writer.close)


def _id_of(root: Path) -> str:
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
        id=_id_of(root),
        resume="allow",
    )
    return Tracker(lambda numbers, step: run.log(numbers, step=step), run.finish)
