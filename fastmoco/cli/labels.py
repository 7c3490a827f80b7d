"""The commands that say which images to ask labels for, and which are hard."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastmoco.cli import options
from fastmoco.cli.terminal import progress
from fastmoco.core.terminal import echo

if TYPE_CHECKING:
    from fastmoco.dataset.labels import Labelled

Strategy = Literal[
    "auto", "random", "least", "margin", "entropy", "intersection", "coreset", "herding", "scores"
]


def query(
    run: options.Run,
    pool: Annotated[Path, typer.Argument(help="A set; labels it was packed with do not count.")],
    budget: Annotated[int, typer.Option(help="How many images to ask for.")],
    strategy: Annotated[
        Strategy, typer.Option(help="auto: herding below 100 labels a class, else margin.")
    ] = "auto",
    train: Annotated[
        Path | None,
        typer.Option(help="What is labelled. [default: the monitor's bank; none: a first request]"),
    ] = None,
    labels: Annotated[
        str | None, typer.Option(help="Of --train, from `fastmoco label`. [default: packed]")
    ] = None,
    test: options.Test = None,
    feature: options.Feature = "backbone",
    balance: Annotated[
        bool, typer.Option(help="At most an equal share of each predicted class.")
    ] = True,
    scores: Annotated[
        Path | None, typer.Option(help="For --strategy scores: a number a sample, .csv or .npy.")
    ] = None,
    exclude: Annotated[
        list[Path] | None, typer.Option(help="A request that is still out; repeatable.")
    ] = None,
    images: Annotated[
        Path | None, typer.Option(help="A new folder for copies of the images.")
    ] = None,
    out: Annotated[Path, typer.Option(help="The CSV to be filled in.")] = Path("request.csv"),
    replace: Annotated[bool, typer.Option("--replace", help="A request of this name.")] = False,
    seed: Annotated[int, options.of_seed("Of folds and samples.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Choose the images of a set whose labels would help most, for people to label."""
    from fastmoco.label import query as module

    module.check_absent(out, replace)
    asked = module.Options(
        budget, strategy, feature, balance, seed, scores, tuple(exclude or ()), device
    )
    first, second = _labelled(run, train, labels, test)
    found = module.query(run, pool, asked, first, second)
    if images:
        module.write_images(found, images)
    module.write_request(found, out)
    echo("\n".join(module.describe(found, out)))


def _labelled(
    run: Path, train: Path | None, labels: str | None, test: Path | None
) -> "tuple[Labelled | None, Labelled | None]":
    """Open what is labelled, and the test set; by default those of the run's monitor."""
    from fastmoco.dataset.labels import Labelled
    from fastmoco.dataset.shard_set import ShardSet
    from fastmoco.runs.run_folder import RunFolder

    recipe = RunFolder(run).recipe()
    monitor = recipe.monitor if recipe else None
    if monitor:
        labels = labels or (monitor.labels if train is None else None)
        train, test = train or monitor.bank, test or monitor.queries
    first, second = (
        Labelled.of(ShardSet(path), table) if path else None
        for path, table in ((train, labels), (test, None))
    )
    return first, second


def hardness(
    run: options.Run,
    sets: Annotated[
        list[Path] | None, typer.Argument(help="One or more, as one. [default: those of the run]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Pairs of views of each image.")] = 8,
    out: Annotated[Path, typer.Option(help="A CSV; a .json goes beside it.")] = Path(
        "hardness.csv"
    ),
    replace: Annotated[bool, typer.Option("--replace", help="A file of this name.")] = False,
    seed: Annotated[int, options.of_seed("Of the views.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Measure how hard each image is for a run: its mean loss over pairs of the run's views."""
    from fastmoco.core.distributed import init_distributed
    from fastmoco.dataset.numbers import write_numbers
    from fastmoco.label import hardness as module
    from fastmoco.label.query import check_absent

    check_absent(out, replace)
    with init_distributed(device) as (world, where), progress("hardness") as on_progress:
        found = module.measure_hardness(run, sets or (), rounds, seed, where, world, on_progress)
    if world.is_main:
        write_numbers(out, "hardness", found.numbers, found.data, found.about)
        echo("\n".join(module.describe(found, run, out)))
