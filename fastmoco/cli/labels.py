"""The commands that choose images and labels: to ask for, to trust, to see more often."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from fastmoco.cli import options
from fastmoco.cli.terminal import progress
from fastmoco.core.terminal import echo
from fastmoco.errors import UsageError

if TYPE_CHECKING:
    from fastmoco.dataset.labels import Labelled

Strategy = Literal[
    "auto",
    "random",
    "least",
    "margin",
    "entropy",
    "intersection",
    "disagreement",
    "hybrid",
    "coreset",
    "herding",
    "kmeans",
    "typiclust",
    "scores",
]

TrainLabels = Annotated[
    str | None, typer.Option(help="Of --train, from `fastmoco label`. [default: packed]")
]
PoolFeatures = Annotated[
    Path | None, typer.Option(help="Of the pool, from `fastmoco embed`. [default: computed]")
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
    labels: TrainLabels = None,
    more: options.More = None,
    test: options.Test = None,
    feature: options.Feature = "backbone",
    balance: Annotated[
        bool, typer.Option(help="At most an equal share of each predicted class.")
    ] = True,
    members: Annotated[
        int, typer.Option(min=0, help="For disagreement: heads on bootstraps of the labels.")
    ] = 0,
    committee: Annotated[
        list[Path] | None,
        typer.Option("--with", help="For disagreement: another run, with a head; repeatable."),
    ] = None,
    max_confidence: Annotated[
        float | None, typer.Option(callback=options.share, help="Below which to ask, 0..1.")
    ] = None,
    max_margin: Annotated[
        float | None,
        typer.Option(callback=options.share, help="Likewise, of the best two classes."),
    ] = None,
    min_entropy: Annotated[
        float | None, typer.Option(callback=options.share, help="Above which to ask, 0..1.")
    ] = None,
    by: options.By = None,
    classifier: options.Classifier = None,
    features: PoolFeatures = None,
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
    from fastmoco.label.choose import Options
    from fastmoco.label.query import query as choose
    from fastmoco.label.request import check_request, describe, write_request

    check_request(out, images, replace)
    asked = Options(
        *(budget, strategy, feature, balance, seed, members, tuple(committee or ())),
        *(max_confidence, max_margin, min_entropy, by, classifier),
        *(features, scores, tuple(exclude or ()), device),
    )
    first, second = _labelled(run, train, labels, more, test)
    request = choose(run, pool, asked, first, second)
    write_request(request, out, images)
    echo("\n".join(describe(request, out)))


def pseudolabel(
    run: options.Run,
    pool: Annotated[
        Path, typer.Argument(help="A set; labels it was packed with only judge the result.")
    ],
    train: Annotated[
        Path | None, typer.Option(help="What is labelled. [default: the monitor's bank]")
    ] = None,
    labels: TrainLabels = None,
    more: options.More = None,
    test: options.Test = None,
    precision: Annotated[
        float | None,
        typer.Option(
            callback=options.share, help="Share of right ones out of fold, 0..1. [default: 0.95]"
        ),
    ] = None,
    threshold: Annotated[
        float | None,
        typer.Option(
            callback=options.share, help="Least confidence, 0..1, instead of --precision."
        ),
    ] = None,
    per_class: Annotated[
        int | None, typer.Option(min=1, help="At most so many of a class, the surest.")
    ] = None,
    agree: Annotated[
        list[Path] | None, typer.Option(help="A run that must say the same; repeatable.")
    ] = None,
    by: options.By = None,
    other: Annotated[
        Path | None,
        typer.Option("--with", help="A run to co-train with: OUT.1.csv is for RUN, .2 for it."),
    ] = None,
    rounds: Annotated[int | None, typer.Option(min=1, help="Of co-training. [default: 3]")] = None,
    per_round: Annotated[
        int | None,
        typer.Option(min=1, help="Labels that each run gives the other. [default: 1000]"),
    ] = None,
    weight: Annotated[
        Literal["one", "confidence"], typer.Option(help="What a label counts in training.")
    ] = "one",
    feature: options.Feature = "backbone",
    classifier: options.Classifier = None,
    features: PoolFeatures = None,
    out: Annotated[Path, typer.Option(help="The CSV of labels.")] = Path("pseudolabels.csv"),
    replace: Annotated[bool, typer.Option("--replace", help="Labels of this name.")] = False,
    seed: Annotated[int, options.of_seed("Of the folds.")] = 0,
    device: options.Device = "auto",
) -> None:
    """Label the images of a set that a classifier on a run's features is sure of."""
    from fastmoco.label.cotrain import CoTraining, co_label
    from fastmoco.label.pseudo import Options
    from fastmoco.label.pseudo import pseudolabel as choose
    from fastmoco.label.pseudo_file import describe, write_pseudolabels
    from fastmoco.label.request import check_absent

    asked = Options(
        *(precision, threshold, per_class, tuple(agree or ()), by),
        *(feature, features, classifier, seed, device),
    )
    if other is None:
        _refuse_beside("without --with RUN", rounds=rounds, per_round=per_round)
    else:
        chosen_by = {"precision": precision, "threshold": threshold, "per_class": per_class}
        _refuse_beside("beside --with RUN", **chosen_by, agree=agree, by=by, classifier=classifier)
    outs = [out] if other is None else [out.with_suffix(f".{n}{out.suffix}") for n in (1, 2)]
    for path in outs:
        check_absent(path, replace)
    first, second = _labelled(run, train, labels, more, test)
    if first is None:
        raise UsageError("The run has no monitor: name what is labelled by --train.")
    if other is None:
        found = [choose(run, pool, asked, first, second)]
    else:
        plan = CoTraining(other, rounds or CoTraining.rounds, per_round or CoTraining.per_round)
        found = co_label(run, pool, asked, plan, first, second)
    for path, part in zip(outs, found, strict=True):
        echo("\n".join(describe(write_pseudolabels(part, path, weight), path)))


def _refuse_beside(what: str, **values: object) -> None:
    for name, value in values.items():
        if value is not None:
            option = name.replace("_", "-")
            raise UsageError(f"--{option} does nothing {what}: leave it out.")


def _labelled(
    run: Path,
    train: Path | None,
    labels: str | None,
    more: list[str] | None,
    test: Path | None,
) -> "tuple[Labelled | None, Labelled | None]":
    """Open what is labelled, and the test set; by default those of the run's monitor."""
    from fastmoco.dataset.labels import Labelled, union
    from fastmoco.dataset.shard_set import ShardSet
    from fastmoco.label.table import read_labelled
    from fastmoco.runs.run_folder import RunFolder

    recipe = RunFolder(run).recipe()
    monitor = recipe.monitor if recipe else None
    if monitor and monitor.labelled:
        labels = labels or (monitor.labels if train is None else None)
        train, test = train or monitor.bank, test or monitor.queries
    first, second = (
        Labelled.of(ShardSet(path), table) if path else None
        for path, table in ((train, labels), (test, None))
    )
    known = [first] if first else []
    known += (read_labelled(*pair) for pair in options.split_pairs(more))
    return (union(*known) if known else None), second


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
    from fastmoco.label.request import check_absent

    check_absent(out, replace)
    with init_distributed(device) as (world, where), progress("hardness") as on_progress:
        found = module.measure_hardness(run, sets or (), rounds, seed, where, world, on_progress)
    if world.is_main:
        write_numbers(out, "hardness", found.numbers, found.data, found.about)
        echo("\n".join(module.describe(found, run, out)))
