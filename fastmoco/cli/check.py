"""The commands that say whether a machine is ready, and how fast a recipe is on it."""

from pathlib import Path
from typing import Annotated

import typer

from fastmoco.core.terminal import echo


def bench(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a path to a .yaml.")],
    overrides: Annotated[
        list[str] | None,
        typer.Argument(help="key=value, such as data.sets=[SET].", show_default=False),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="In each of the three measurements.")] = 40,
) -> None:
    """Measure images per second of a recipe: loader, step, and both together."""
    from fastmoco.check.throughput import throughput
    from fastmoco.config.loading import load_recipe
    from fastmoco.dataset.shard_set import ConcatShardSets
    from fastmoco.pretrain import resolve

    chosen = load_recipe(recipe, [*(overrides or []), "monitor=null"])
    chosen = resolve(chosen, ConcatShardSets.open(chosen.data.sets).sets[0])
    found = throughput(chosen, steps)
    for name in ("loader", "step", "together"):
        alone = "" if name == "together" else " alone"
        echo(f"{name + alone:13}{getattr(found, name):10,.0f} img/s")
    echo(f"{'data wait':13}{found.data_wait_percent:10.1f} % of the time together")
    echo(found.verdict())


def doctor(
    set: Annotated[
        Path | None, typer.Argument(help="A packed set, whose reading is timed.")
    ] = None,
) -> None:
    """Say what is installed here, what is missing, and what would be slow."""
    from fastmoco.check.doctor import examine

    for finding in examine(set):
        echo(f"{finding.name:20}{finding.found}")
        if finding.remedy:
            echo(f"{'':20}-> {finding.remedy}")
