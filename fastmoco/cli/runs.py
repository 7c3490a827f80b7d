"""The commands on runs: train one, ask what it has learnt, draw it."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple

import typer

from fastmoco.cli import options
from fastmoco.cli.terminal import progress
from fastmoco.core.terminal import echo
from fastmoco.errors import UsageError

if TYPE_CHECKING:
    from fastmoco.evaluate.evaluator import Evaluation


class Sets(NamedTuple):
    """What a classifier is trained on and tested on, as the options say it."""

    train: Path | None
    test: Path | None
    labels: str | None
    more: list[str] | None
    per_class: int | None = None
    seed: int = 0


def pretrain(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a path to a .yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as optimizer.lr=0.03.")
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what the run would do and need, and stop.")
    ] = False,
) -> None:
    """Train a recipe in this process, from its last checkpoint if there is one."""
    from fastmoco.pretrain import main as run

    sys.exit(run([recipe, *(overrides or []), *["--dry-run"] * dry_run]))


def knn(
    run: options.Run,
    train: options.Train = None,
    test: options.Test = None,
    labels: options.Labels = None,
    more: options.More = None,
    feature: options.Feature = "backbone",
    k: Annotated[int, typer.Option(min=1, help="Neighbors that vote.")] = 200,
    t: Annotated[
        float, typer.Option(callback=options.positive, help="Temperature of their weights.")
    ] = 0.1,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Classify a test set by its nearest neighbors among the features of a run."""
    sets = Sets(train, test, labels, more)
    with _evaluation(run, sets, device, precision) as opened:
        found = opened.knn(feature, k, t)
        if opened.world.is_main and opened.train.relative_weights() is not None:
            echo("warning: weights of labels do not count in kNN", err=True)
        _tell(opened, found, f"kNN, {feature} features, k {k}, t {t:g}")


def probe(
    run: options.Run,
    train: options.Train = None,
    test: options.Test = None,
    labels: options.Labels = None,
    more: options.More = None,
    per_class: options.PerClass = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of training; milestones scale.")] = 100,
    lr: Annotated[
        list[float] | None,
        typer.Option(callback=options.positive, help="Repeatable. [default: ten, 0.003 to 100]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 256,
    schedule: Annotated[
        Literal["step", "cosine"], typer.Option(help="Of the rates; the paper's are steps.")
    ] = "step",
    warmup: Annotated[float, typer.Option(min=0, help="Epochs of a linear rise.")] = 0,
    cached: Annotated[
        bool, typer.Option("--cached", help="Embed once, without crops and flips: seconds.")
    ] = False,
    choose: options.Chosen = "holdout",
    seed: Annotated[int, options.of_seed("Of the order.")] = 0,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Train linear classifiers on the frozen backbone of a run: the linear-probe number."""
    from fastmoco.evaluate.probe import ProbeConfig

    protocol = ProbeConfig(
        epochs=epochs,
        lrs=tuple(lr or ProbeConfig.lrs),
        batch=batch,
        seed=seed,
        features="cached" if cached else "augmented",
        schedule=schedule,
        warmup=warmup,
        choose=choose,
    )
    sets = Sets(train, test, labels, more, per_class, seed)
    with _evaluation(run, sets, device, precision) as opened:
        with progress("probe") as on_progress:
            found = opened.probe(protocol, lambda done: on_progress(done, epochs))
        _tell(opened, found, f"linear probe, {protocol.features} features, {epochs} epochs")


def finetune(
    run: options.Run,
    train: options.Train = None,
    test: options.Test = None,
    labels: options.Labels = None,
    more: options.More = None,
    per_class: options.PerClass = None,
    fraction: Annotated[float, typer.Option(help="Of the labels of each class, 0..1.")] = 1,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights: the supervised baseline.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="[default: 30, and at least 1000 steps]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of epochs.")] = None,
    lr: Annotated[
        list[float] | None,
        typer.Option(
            callback=options.positive,
            help="Of the backbone; several to choose among. [default: 0.02, from scratch 0.1, "
            "times batch / 256]",
        ),
    ] = None,
    choose: options.Chosen = "holdout",
    head_lr: Annotated[
        float | None,
        typer.Option(
            callback=options.positive, help="Of the classifier. [default: 5 x lr; from scratch lr]"
        ),
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Images a step.")] = 256,
    weight_decay: Annotated[float, typer.Option(min=0, help="Of all weights.")] = 1e-4,
    normalize: Annotated[
        Literal["run", "imagenet", "set"], typer.Option(help="Whose mean and deviation.")
    ] = "run",
    size: Annotated[
        int | None, typer.Option(min=8, help="Of the images, pixels. [default: the run's]")
    ] = None,
    even: Annotated[
        bool,
        typer.Option(  # torchrun takes --even for the beginning of an option of its own
            "--even", "--evenly", help="Show every class equally often, in as many steps."
        ),
    ] = False,
    noise: Annotated[
        bool,
        typer.Option("--noise", help="Strong views, dropout, stochastic depth: a noisy student."),
    ] = False,
    semi: Annotated[
        Literal["fixmatch", "mixmatch", "pseudo"] | None,
        typer.Option(help="Train on images without labels too, by this method."),
    ] = None,
    unlabelled: Annotated[
        Path | None, typer.Option(help="With --semi: their set; labels in it do not count.")
    ] = None,
    ratio: Annotated[int, typer.Option(min=1, help="Of them for each image with a label.")] = 7,
    threshold: Annotated[
        float, typer.Option(min=0, max=1, help="With fixmatch: a class at least this probable.")
    ] = 0.95,
    ema: Annotated[
        float, typer.Option(min=0, max=1, help="With --semi: decay of the averaged weights.")
    ] = 0.999,
    seed: Annotated[int, options.of_seed("Of labels, order and random weights.")] = 0,
    save: Annotated[Path | None, typer.Option(help="A new folder for the weights.")] = None,
    precision: options.Precision = None,
    device: options.Device = "auto",
) -> None:
    """Train backbone and classifier on labels, all or a fraction, and test them."""
    from fastmoco.dataset.shard_set import ShardSet
    from fastmoco.evaluate.finetune import finetune as tune
    from fastmoco.evaluate.finetune_config import FinetuneConfig
    from fastmoco.evaluate.semi import SemiConfig

    if not 0 < fraction <= 1:
        raise UsageError(f"--fraction {fraction:g} is not a share: choose one above 0, up to 1.")
    if per_class and fraction < 1:
        raise UsageError("--fraction and --per-class both choose labels: pass one of them.")
    tuning = FinetuneConfig(
        fraction=fraction,
        from_scratch=from_scratch,
        epochs=epochs,
        steps=steps,
        lr=lr[0] if lr else None,
        lrs=tuple(lr or ()),
        choose=choose,
        head_lr=head_lr,
        batch=batch,
        weight_decay=weight_decay,
        seed=seed,
        normalize=normalize,
        size=size,
        even=even,
        noise=noise,
        semi=SemiConfig(semi, ratio, threshold, ema) if semi else None,
    )
    if (semi is None) is not (unlabelled is None):
        raise UsageError("--semi and --unlabelled SET go together: give both, or none.")
    if semi and noise:
        raise UsageError("--semi changes images strongly by itself: leave --noise out.")
    without = ShardSet(unlabelled) if unlabelled else None
    sets = Sets(train, test, labels, more, per_class, seed)
    with _evaluation(run, sets, device, precision) as opened:
        with progress("finetune") as on_progress:
            found = tune(opened, tuning, on_progress, save, without)
        start = "from scratch" if from_scratch else "from the run's backbone"
        images, steps_done = found["labels"]["images"], found["budget"]["steps"]
        by = f" and {len(without)} images without, by {semi}" if without else ""
        _tell(opened, found, f"fine-tuned {start} on {images} labels{by}, {steps_done} steps")


def report(
    run: options.Run,
    out: Annotated[Path | None, typer.Option(help="A folder. [default: RUN/report]")] = None,
    train: options.Train = None,
    test: options.Test = None,
    labels: options.Labels = None,
    label_file: Annotated[
        list[Path] | None, typer.Option(help="A CSV of `query` or `pseudolabel`; repeatable.")
    ] = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Images of each set to look at, at the most.")
    ] = 10_000,
    device: options.Device = "auto",
) -> None:
    """Draw a run on one HTML page: curves, neighbors, errors, filters, all its numbers."""
    from fastmoco.viz.report import report as write

    words = "looking at the run's images: minutes on a CPU, less with fewer --samples"
    echo(words, err=True)
    echo(write(run, out, train, test, samples, device, labels, label_file or ()))


def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, options.of_seed("Of the training.")] = 0,
) -> None:
    """Pack, pretrain and probe patches of photographs that come with the installation."""
    from fastmoco.demo.demo import demo as run

    run(out, seed)


@contextmanager
def _evaluation(
    run: Path, sets: Sets, device: str, precision: str | None
) -> Iterator["Evaluation"]:
    """Open a run and its labelled sets, on the ranks that torchrun started."""
    from fastmoco.core.distributed import init_distributed
    from fastmoco.evaluate.evaluator import Evaluation
    from fastmoco.label.table import read_labelled

    with init_distributed(device) as (world, _):
        opened = Evaluation.open(
            run,
            sets.train,
            sets.test,
            device,
            sets.labels,
            precision,
            world,
            [read_labelled(*pair) for pair in options.split_pairs(sets.more)],
            sets.per_class,
            sets.seed,
        )
        if world.is_main:
            for caution in opened.cautions:
                echo(f"warning: {caution}", err=True)
        yield opened


def _tell(opened: "Evaluation", found: dict[str, Any], title: str) -> None:
    """Print a result on the first rank."""
    if not opened.world.is_main:
        return
    echo(f"{title}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
    chosen = found.get("chosen")
    for score in found.get("learning_rates", []):
        mark = " <- best by test accuracy" if score == found["best"] else ""
        if chosen and score["lr"] == chosen["lr"]:
            mark = f" <- chosen by {chosen['images']} labels held out ({chosen['by']}){mark}"
        accuracies = "diverged"
        if "diverged" not in score:
            accuracies = f"top-1 {score['top1']:6.2f} %  top-5 {score['top5']:6.2f} %"
        echo(f"  lr {score['lr']:<5g} {accuracies}{mark}")
    if chosen and "learning_rates" not in found:
        echo(f"  rate {chosen['lr']:g} chosen by {chosen['images']} images ({chosen['by']}):")
        for one in chosen["candidates"]:
            top1 = "diverged" if one["top1"] is None else f"top-1 {one['top1']:6.2f} %"
            echo(f"  lr {one['lr']:<5g} {top1}")
    shares = zip(found["per_class"], opened.test.classes, strict=True)
    lowest = sorted((share, name) for share, name in shares if share is not None)[:3]
    echo("  lowest classes: " + ", ".join(f"{name} {share:.1f} %" for share, name in lowest))
    if "unrecorded" in found:
        raise UsageError(f"Not all is recorded: {found['unrecorded']}.")
    echo(f"  step {found['step']}, recorded in {opened.run.root / 'evaluations.jsonl'}")
