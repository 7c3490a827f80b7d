"""What a person sees of a run: a live line on a terminal, plain lines in a log."""

import math
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from fastmoco.config.objectives import Moco
from fastmoco.config.recipe import Recipe
from fastmoco.core.terminal import printable
from fastmoco.loggers.collapse import find_collapse

WIDE = 110  # columns
_MEASURED = {
    "knn_top1": "kNN {:.2f} %",
    "validation_top1": "validation {:.2f} %",
    "rankme": "RankMe {:.1f}",
    "rankme_head": "(head {:.1f})",
    "lidar": "LiDAR {:.1f}",
    "alpha_req": "alpha {:.2f}",
    "alignment": "alignment {:.3f}",
    "uniformity": "uniformity {:.2f}",
}


class LiveDisplay:
    """Shows the rows of a run; on rank 0 alone.

    Args:
        recipe: of the run.
        start: steps done before.
        steps_per_epoch: of its data.
    """

    def __init__(self, recipe: Recipe, start: int, steps_per_epoch: int) -> None:
        self._console = Console()
        self._console.soft_wrap = not self._console.is_terminal  # a log has no width
        last_step = recipe.last_step(steps_per_epoch)
        self._epochs = math.ceil(last_step / steps_per_epoch)
        # On 80 columns the time left matters more than a bar.
        bar = [BarColumn(bar_width=20)] if self._console.width >= WIDE else []
        self._progress = Progress(
            TextColumn("[bold]epoch {task.fields[epoch]}"),
            *bar,
            TextColumn("{task.completed:.0f}/{task.total:.0f}"),
            TextColumn("{task.fields[numbers]}"),
            TimeRemainingColumn(),
            console=self._console,
            disable=not self._console.is_terminal,
            speed_estimate_period=600,
        )
        self._task = self._progress.add_task(
            "", total=last_step, completed=start, epoch="-", numbers="first step ..."
        )
        self._console.print(_describe_chance(recipe), highlight=False)
        for warning in _for_ablations_only(recipe):
            self._console.print(f"{warning} Meant for ablations only.", highlight=False)

    def __enter__(self) -> "LiveDisplay":
        self._progress.start()
        return self

    def __exit__(self, *raised: object) -> None:
        self._progress.stop()

    def show(self, row: dict[str, Any]) -> None:
        """Show a row of metrics.jsonl."""
        match row["kind"]:
            case "step":
                self._step(row)
            case "epoch":
                self._epoch(row)
            case "bad":
                for sample in row["samples"]:
                    words = printable(f"goes on without {sample}: damaged")
                    self._console.print(words, markup=False, highlight=False, soft_wrap=True)
            case "unsaved":
                words = escape(printable(row["message"]))
                self._console.print(f"[bold red]{words}[/bold red]", soft_wrap=True)

    def _step(self, row: dict[str, Any]) -> None:
        numbers = (
            f"loss {row['loss']:.3f}  lr {row['lr']:.3g}  {row['images_per_s']:.0f} img/s  "
            f"data wait {row['data_wait_percent']:.0f} %"
        )
        if row["skipped"]:
            numbers += f"  [red]skipped {row['skipped']}[/red]"
        epoch = f"{min(math.floor(row['epoch']) + 1, self._epochs)}/{self._epochs}"
        self._progress.update(self._task, completed=row["step"], epoch=epoch, numbers=numbers)
        if not self._console.is_terminal:
            self._console.print(f"step {row['step']}  epoch {epoch}  {numbers}", highlight=False)

    def _epoch(self, row: dict[str, Any]) -> None:
        parts = [f"epoch {row['epoch']:g}/{self._epochs}" if row["epoch"] else "untrained"]
        if row["loss"] is not None:
            parts.append(f"mean loss {row['loss']:.3f}")
        parts += [words.format(row[name]) for name, words in _MEASURED.items() if name in row]
        self._console.print("  ".join(parts), highlight=False)
        for warning in find_collapse(row):
            self._console.print(f"[bold red]warning: {warning}[/bold red]", highlight=False)


def _describe_chance(recipe: Recipe) -> str:
    """Return what the loss of a network that knows nothing is, and where it goes at first."""
    chance = f"Chance is a loss of log({recipe.candidates:,}) = {math.log(recipe.candidates):.2f}."
    if not isinstance(recipe.objective, Moco):
        return chance
    full = math.ceil(recipe.objective.queue / recipe.encoded_per_step)
    return (
        f"{chance} The loss rises first, until the queue is full ({full} steps): that is expected."
    )


def _for_ablations_only(recipe: Recipe) -> list[str]:
    """Return in words what a recipe asks for that is known to spoil the features."""
    found = []
    if any(view.crop != "random" for view in recipe.views):
        found.append(
            "A view has no random crop: the pretext task becomes trivial, and the features with it."
        )
    if recipe.objective.shares_statistics:
        found.append(
            "Query and key share their BatchNorm statistics (objective.bn: whole or shuffle: off): "
            "the network can tell by them which belong together."
        )
    return found
