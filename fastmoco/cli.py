"""The commands. Heavy modules are imported inside them, so that `--help` answers at once."""

import json
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console
from rich.markup import escape

from fastmoco.bench.commands import app as bench_app
from fastmoco.errors import FastmocoError, UsageError

if TYPE_CHECKING:
    from fastmoco.evaluate.evaluation import Evaluation
    from fastmoco.shardset import Manifest

INTERRUPTED = 130

app = typer.Typer(
    name="fastmoco",
    help="Momentum Contrast from a folder of images to a linear-probe number.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)
app.add_typer(bench_app)


def main() -> None:
    """Run the command line; a user error ends in plain lines and its exit code."""
    try:
        app()
    except FastmocoError as error:
        if os.environ.get("RANK", "0") == "0" or error.exit_code == 3:  # met by one rank alone
            print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        _end_interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # how typer hands on a Ctrl-C
            _end_interrupted()
        raise


def _end_interrupted() -> None:
    print("interrupted", file=sys.stderr)
    sys.exit(INTERRUPTED)


_Workers = Annotated[
    int | None, typer.Option(min=1, help="Decoding processes. [default: one for each CPU]")
]


@app.command()
def shard(
    source: Annotated[
        Path, typer.Argument(help="Images: a folder, an archive, ... or a shards/*.yaml.")
    ],
    out: Annotated[Path, typer.Argument(help="The set's folder; must not exist.")],
    within: Annotated[
        Path | None, typer.Option("--source", help="Where the images of a shards/*.yaml lie.")
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of SOURCE. [default: recognised]")] = None,
    seed: Annotated[int, typer.Option(min=0, help="Of the global shuffle.")] = 0,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore the labels, store none.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="A set whose classes must be the same (train for val).")
    ] = None,
    splits: Annotated[
        str | None,
        typer.Option(help="Divide by class: train=0.9,val=0.1.", metavar="NAME=SHARE,.."),
    ] = None,
    dedupe: Annotated[
        bool, typer.Option("--dedupe", help="Leave out images whose bytes came before.")
    ] = False,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink larger images to this. [default: keep bytes]")
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of shrunk JPEGs. [default: 90]")
    ] = None,
    shard_mb: Annotated[
        int | None, typer.Option(min=1, help="Bound of a shard's size, in MB. [default: 128]")
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(min=1, help="Smallest height and width, in pixels. [default: 1]")
    ] = None,
    max_mpixels: Annotated[float, typer.Option(help="Largest area, in megapixels.")] = 100,
    max_mb: Annotated[float, typer.Option(help="Largest encoded image, in MiB.")] = 128,
    workers: _Workers = None,
    max_rejects: Annotated[
        int | None,
        typer.Option(min=0, help="Unfit images to put up with. [default: 1 %, at least 10]"),
    ] = None,
) -> None:
    """Check, shuffle and pack images into a shard set; after an interruption, go on."""
    from fastmoco.pack.options import PackOptions, parse_splits
    from fastmoco.pack.spec import pack_known
    from fastmoco.pack.writer import pack

    given: dict[str, Any] = {
        "format": format,
        "seed": seed,
        "unlabelled": unlabelled,
        "like": like,
        "splits": parse_splits(splits),
        "dedupe": dedupe,
        "short_side": short_side,
        "quality": quality,
        "shard_mb": shard_mb,
        "min_side": min_side,
        "max_mpixels": max_mpixels,
        "max_mb": max_mb,
        "workers": _processes(workers),
        "max_rejects": max_rejects,
    }
    given = {name: value for name, value in given.items() if value is not None}
    with _progress(f"packing {within or source}") as on_progress:
        if source.suffix == ".yaml":
            manifests = pack_known(source, within, out, given, on_progress)
        else:
            manifests = pack(source, out, PackOptions(**given), on_progress)
    for split, manifest in manifests.items():
        _summarise(out / split, manifest)


@app.command()
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


@app.command()
def views(
    set: Annotated[Path, typer.Argument(help="A shard set.")],
    recipe: Annotated[
        str, typer.Option(help="Whose views: a shipped name, or a path to a .yaml.")
    ] = "moco_v2_imagenet_r50",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as views.0.blur=0.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 8,
    out: Annotated[Path, typer.Option(help="The PNG.")] = Path("views.png"),
) -> None:
    """Draw what a recipe makes of the first samples of a set, before GPU-days go into it."""
    from fastmoco.config import load_recipe
    from fastmoco.preview import preview

    chosen = load_recipe(recipe, [f"data=[{json.dumps(str(set))}]", *(overrides or [])])
    title = f"{chosen.name}: the first {count} samples of {set.name}, seed {chosen.seed}"
    for shown in preview(chosen, out, count, title):
        print(shown.described)
        for number, view in enumerate(shown.views, 1):
            print(f"  view {number}: {view}")
    print(f"drawn in {out}")


_Set = Annotated[Path, typer.Argument(help="The set's folder.")]
_Classes = Annotated[
    Path | None, typer.Option(help="Names of the labels 0, 1, ..., one a line of a text file.")
]


@app.command()
def verify(
    root: _Set,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and decode every image.")
    ] = False,
    workers: _Workers = None,
) -> None:
    """Check that a set is whole: sizes and counts, or with --full every image."""
    from fastmoco.errors import DataError
    from fastmoco.pack.verify import verify as run

    with _progress(f"verifying {root}") as on_progress:
        findings = run(root, full, on_progress, _processes(workers))
    for finding in findings:
        print(finding)
    if findings:
        raise DataError(f"{root} has {len(findings)} defect(s): copy it again, or pack it anew.")
    print(f"{root}: sound" + ("" if full else " in sizes and counts; --full reads every image"))


@app.command()
def inspect(
    root: _Set,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw random samples into this PNG.", metavar="PNG")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 64,
    seed: Annotated[int, typer.Option(min=0, help="Of their choice.")] = 0,
) -> None:
    """Show what a set holds: counts, classes, sizes; and a sheet of samples."""
    from fastmoco.pack.summary import contact_sheet, inspect_set, show

    show(inspect_set(root), Console())
    if sheet:
        contact_sheet(root, sheet, count, seed)
        print(f"\n{sheet}")


@app.command()
def index(
    folder: Annotated[Path, typer.Argument(help="Holds the *.tar of webdataset or img2dataset.")],
    out: Annotated[
        Path | None, typer.Option(help="A new folder for the set, with links. [default: FOLDER]")
    ] = None,
    label_key: Annotated[
        str | None, typer.Option(help="Field of the .json members. [default: the .cls members]")
    ] = None,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore the labels, store none.")
    ] = False,
    classes: _Classes = None,
    workers: _Workers = None,
) -> None:
    """Adopt tar shards that others wrote, in place: check every image, add tables and indexes."""
    from fastmoco.pack.adopt import AdoptOptions, adopt
    from fastmoco.pack.classes import read_classes

    options = AdoptOptions(
        label_key=label_key,
        unlabelled=unlabelled,
        classes=tuple(read_classes(classes)) if classes else (),
        workers=_processes(workers),
    )
    with _progress(f"reading {folder}") as on_progress:
        manifest = adopt(folder, out, options, on_progress)
    _summarise(out or folder, manifest)
    if manifest.options["rotated"]:
        first = ", ".join(map(repr, manifest.options["rotated_first"]))
        print(f"  rotated by EXIF {manifest.options['rotated']}, seen unrotated: {first}, ...")


@app.command()
def label(
    root: _Set,
    table: Annotated[
        Path, typer.Argument(help="CSV: `label`, and `id` or `name`; `weight` if wanted.")
    ],
    name: Annotated[str, typer.Option(help="Of the labels; or a path that ends in .npy.")],
    classes: _Classes = None,
    replace: Annotated[bool, typer.Option("--replace", help="Labels of the same name.")] = False,
) -> None:
    """Add labels to a set, whose shards stay as they are; use them by --labels NAME."""
    from fastmoco.pack.classes import read_classes
    from fastmoco.pack.labels import label as run
    from fastmoco.shardset import ShardSet, read_labels

    path = run(root, table, name, read_classes(classes) if classes else None, replace)
    rows, names = read_labels(ShardSet(root), path)
    print(f"{path}: {len(rows)} labels, {len(names)} classes")


_Run = Annotated[Path, typer.Argument(help="The run's folder.")]
_Labels = Annotated[
    str | None, typer.Option(help="Those of `fastmoco label`. [default: the monitor's, or packed]")
]
_Train = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's bank]")]
_Test = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's queries]")]
_Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
_Precision = Annotated[
    Literal["bf16", "fp32"] | None,
    typer.Option(help="Of the network. [default: bf16 if the run's, else fp32]"),
]


def _positive(value: Any) -> Any:
    """Refuse a rate or temperature that is not above 0."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not 0 < number < float("inf"):
            raise typer.BadParameter(f"{number:g} is not above 0")
    return value


@app.command()
def knn(
    run: _Run,
    train: _Train = None,
    test: _Test = None,
    labels: _Labels = None,
    feature: Annotated[
        Literal["head", "backbone"], typer.Option(help="Which output to compare.")
    ] = "backbone",
    k: Annotated[int, typer.Option(min=1, help="Neighbours that vote.")] = 200,
    t: Annotated[
        float, typer.Option(callback=_positive, help="Temperature of their weights.")
    ] = 0.1,
    precision: _Precision = None,
    device: _Device = "auto",
) -> None:
    """Classify a test set by its nearest neighbours among the features of a run."""
    with _evaluation(run, train, test, device, labels, precision) as opened:
        found = opened.knn(feature, k, t)
        _tell(opened, found, f"kNN, {feature} features, k {k}, t {t:g}")


@app.command()
def probe(
    run: _Run,
    train: _Train = None,
    test: _Test = None,
    labels: _Labels = None,
    epochs: Annotated[int, typer.Option(min=1, help="Of training; milestones scale.")] = 100,
    lr: Annotated[
        list[float] | None,
        typer.Option(callback=_positive, help="Repeatable. [default: ten, 0.003 to 100]"),
    ] = None,
    batch: Annotated[int, typer.Option(min=1, help="Images a step.")] = 256,
    schedule: Annotated[
        Literal["step", "cosine"], typer.Option(help="Of the rates; the paper's are steps.")
    ] = "step",
    warmup: Annotated[float, typer.Option(min=0, help="Epochs of a linear rise.")] = 0,
    cached: Annotated[
        bool, typer.Option("--cached", help="Embed once, without crops and flips: seconds.")
    ] = False,
    seed: Annotated[int, typer.Option(min=0, help="Of the order.")] = 0,
    precision: _Precision = None,
    device: _Device = "auto",
) -> None:
    """Train linear classifiers on the frozen backbone of a run: the linear-probe number."""
    from fastmoco.evaluate.probe import Protocol

    protocol = Protocol(
        epochs=epochs,
        lrs=tuple(lr or Protocol.lrs),
        batch=batch,
        seed=seed,
        features="cached" if cached else "augmented",
        schedule=schedule,
        warmup=warmup,
    )
    with _evaluation(run, train, test, device, labels, precision) as opened:
        with _progress("probe") as on_progress:
            found = opened.probe(protocol, lambda done: on_progress(done, epochs))
        _tell(opened, found, f"linear probe, {protocol.features} features, {epochs} epochs")


@app.command()
def finetune(
    run: _Run,
    train: _Train = None,
    test: _Test = None,
    labels: _Labels = None,
    fraction: Annotated[float, typer.Option(help="Of the labels of each class, 0..1.")] = 1,
    from_scratch: Annotated[
        bool, typer.Option("--from-scratch", help="Random weights: the supervised baseline.")
    ] = False,
    epochs: Annotated[
        int | None, typer.Option(min=1, help="[default: 30, and at least 1000 steps]")
    ] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Instead of epochs.")] = None,
    lr: Annotated[
        float | None,
        typer.Option(callback=_positive, help="Of the backbone. [default: 0.02; from scratch 0.1]"),
    ] = None,
    head_lr: Annotated[
        float | None,
        typer.Option(
            callback=_positive, help="Of the classifier. [default: 10 x lr; from scratch lr]"
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
    seed: Annotated[int, typer.Option(min=0, help="Of labels, order and random weights.")] = 0,
    save: Annotated[Path | None, typer.Option(help="A new folder for the weights.")] = None,
    precision: _Precision = None,
    device: _Device = "auto",
) -> None:
    """Train backbone and classifier on labels, all or a fraction, and test them."""
    from fastmoco.evaluate.finetune import Tuning
    from fastmoco.evaluate.finetune import finetune as tune

    if not 0 < fraction <= 1:
        raise UsageError(f"--fraction {fraction:g} is not a share: choose one above 0, up to 1.")
    tuning = Tuning(
        fraction=fraction,
        from_scratch=from_scratch,
        epochs=epochs,
        steps=steps,
        lr=lr,
        head_lr=head_lr,
        batch=batch,
        weight_decay=weight_decay,
        seed=seed,
        normalize=normalize,
        size=size,
    )
    with _evaluation(run, train, test, device, labels, precision) as opened:
        with _progress("finetune") as on_progress:
            found = tune(opened, tuning, on_progress, save)
        start = "from scratch" if from_scratch else "from the run's backbone"
        images, steps_done = found["labels"]["images"], found["budget"]["steps"]
        _tell(opened, found, f"fine-tuned {start} on {images} labels, {steps_done} steps")


@contextmanager
def _evaluation(
    run: Path,
    train: Path | None,
    test: Path | None,
    device: str,
    labels: str | None,
    precision: str | None,
) -> Iterator["Evaluation"]:
    """Open a run and its labelled sets, on the ranks that torchrun started."""
    from fastmoco.distributed import joined
    from fastmoco.evaluate.evaluation import Evaluation

    with joined(device) as (ranks, _):
        opened = Evaluation.open(run, train, test, device, labels, precision, ranks)
        if ranks.leads:
            for caution in opened.cautions:
                print(f"warning: {caution}", file=sys.stderr)
        yield opened


def _tell(opened: "Evaluation", found: dict[str, Any], title: str) -> None:
    """Print a result on the first rank."""
    if not opened.ranks.leads:
        return
    print(f"{title}: top-1 {found['top1']:.2f} %, top-5 {found['top5']:.2f} %")
    for score in found.get("learning_rates", []):
        mark = " <- best by test accuracy" if score == found["best"] else ""
        accuracies = f"top-1 {score['top1']:6.2f} %  top-5 {score['top5']:6.2f} %"
        print(f"  lr {score['lr']:<5g} {accuracies}{mark}")
    shares = zip(found["per_class"], opened.test.classes, strict=True)
    lowest = sorted((share, name) for share, name in shares if share is not None)[:3]
    print("  lowest classes: " + ", ".join(f"{name} {share:.1f} %" for share, name in lowest))
    print(f"  step {found['step']}, recorded in {opened.run.root / 'evaluations.jsonl'}")


@app.command()
def report(
    run: _Run,
    out: Annotated[Path | None, typer.Option(help="A folder. [default: RUN/report]")] = None,
    train: _Train = None,
    test: _Test = None,
    samples: Annotated[
        int, typer.Option(min=1, help="Images of each set to look at, at the most.")
    ] = 10_000,
    device: _Device = "auto",
) -> None:
    """Draw a run on one HTML page: curves, neighbours, errors, filters, all its numbers."""
    from fastmoco.report.page import report as write

    words = "looking at the run's images: minutes on a CPU, less with fewer --samples"
    print(words, file=sys.stderr)
    print(write(run, out, train, test, samples, device))


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Where everything goes.")] = Path("demo"),
    seed: Annotated[int, typer.Option(min=0, help="Of the training.")] = 0,
) -> None:
    """Pack, pretrain and probe patches of photographs that come with the installation."""
    from fastmoco.demo import demo as run

    run(out, seed)


@app.command("import")
def import_(
    file: Annotated[Path, typer.Argument(help="A checkpoint (.pth, .pth.tar, .safetensors).")],
    out: Annotated[Path, typer.Argument(help="A new run folder.")],
    layout: Annotated[
        str, typer.Option(help="moco, solo, lightly, ...: whose names. [default: recognised]")
    ] = "auto",
    image_size: Annotated[
        int | None, typer.Option(min=8, help="Pixels. [default: 224, or 32 after a 3x3 stem]")
    ] = None,
) -> None:
    """Make a run folder of another program's ResNet, to probe or to export it."""
    from fastmoco.exchange.importing import import_weights

    found = import_weights(file, out, layout, image_size)
    recipe = found.recipe
    head = "no head" if recipe.head == "none" else f"{recipe.head} head of {recipe.dim}"
    print(f"{out}: {recipe.arch}, {recipe.stem} stem, {head}, in the layout of {found.layout}")
    for note in found.notes:
        print(f"  {note}")
    print(f"next: fastmoco probe {out} --train SET --test SET")


@app.command()
def export(
    run: _Run,
    out: Annotated[Path, typer.Argument(help="A new file; for huggingface a new folder.")],
    to: Annotated[
        Literal["torchvision", "timm", "safetensors", "huggingface", "detectron2", "onnx"],
        typer.Option(help="What shall load it."),
    ],
) -> None:
    """Write the query encoder of a run for another program, and compare what that loads."""
    import torch

    from fastmoco.evaluate.frozen import load_encoder
    from fastmoco.exchange.exporting import export as write
    from fastmoco.run import RunFolder

    encoder, recipe, step = load_encoder(RunFolder(run), torch.device("cpu"))
    done = write(encoder, recipe, out, to)
    print(f"{out}: {recipe.arch} of step {step} for {to}; {done.checked}")
    print(done.note)


@app.command()
def embed(
    run: _Run,
    set: _Set,
    out: Annotated[Path, typer.Option(help="A new .npy; .ids.npy and .json go beside it.")],
    feature: Annotated[
        Literal["head", "backbone"], typer.Option(help="Which output to write.")
    ] = "backbone",
    device: _Device = "auto",
) -> None:
    """Write the features of a set's images, in id order, as fp32 numpy files."""
    import numpy as np

    from fastmoco.distributed import Ranks, device_of
    from fastmoco.evaluate.embed import embed as features_of
    from fastmoco.evaluate.embed import frozen_sight
    from fastmoco.evaluate.frozen import load_encoder
    from fastmoco.exchange.features import check_absent, write_features
    from fastmoco.load.work import settings_of
    from fastmoco.run import RunFolder
    from fastmoco.shardset import Collection

    check_absent(out)
    where = device_of(device, 0)
    encoder, recipe, step = load_encoder(RunFolder(run), where)
    data = Collection.open([set])
    sight = frozen_sight(recipe, settings_of(recipe, Ranks(), where))
    features = features_of(encoder, data, feature, sight).numpy()
    about = {"run": recipe.name, "step": step, "set_id": data.set_ids[0], "feature": feature}
    write_features(out, features, np.arange(len(features)), about)
    print(f"{out}: {len(features)} x {features.shape[1]} {feature} features of step {step}")


def _processes(workers: int | None) -> int:
    return workers or len(os.sched_getaffinity(0))


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on a terminal's stderr; yield the callable that moves it to (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    console = Console(stderr=True)
    with Progress(
        *columns, console=console, transient=True, disable=not console.is_terminal
    ) as bar:
        task = bar.add_task(escape(what), total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _summarise(out: Path, manifest: "Manifest") -> None:
    size = sum(entry.bytes for entry in manifest.shards) / 1e6
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    print(
        f"{out}: {manifest.samples} images, {labels}, {len(manifest.shards)} shards, {size:.1f} MB"
    )
    for name, values in (("mean", manifest.mean), ("std", manifest.std)):
        print(f"  {name:<5}" + " ".join(f"{value:.4f}" for value in values))
    print(f"  set  {manifest.set_id[:16]}")
    if manifest.rejected:
        print(f"  left out {manifest.rejected}, listed in {out / 'rejects.jsonl'}:")
        _print_rejects(out / "rejects.jsonl", 3)


def _print_rejects(path: Path, count: int) -> None:
    from itertools import islice

    with path.open() as lines:
        for line in islice(lines, count):
            reject = json.loads(line)
            print(f"    {reject['name']!r} {reject['reason']}")
