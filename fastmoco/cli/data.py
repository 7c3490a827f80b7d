"""The commands on sets of images."""

import json
import sys
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import Console

from fastmoco.cli import options
from fastmoco.cli.terminal import progress
from fastmoco.core.cores import count_cores
from fastmoco.core.terminal import echo
from fastmoco.errors import DataError

WIDEST = 1000  # columns

if TYPE_CHECKING:
    from fastmoco.dataset.manifest import Manifest


def shard(
    source: Annotated[
        Path, typer.Argument(help="Images: a folder, an archive, ... or a shards/*.yaml.")
    ],
    out: Annotated[Path, typer.Argument(help="The set's folder; must not exist.")],
    within: Annotated[
        Path | None,
        typer.Option(
            "--root", "--source", help="Where the images of a shards/*.yaml or of a CSV lie."
        ),
    ] = None,
    format: Annotated[str | None, typer.Option(help="Of SOURCE. [default: recognized]")] = None,
    seed: Annotated[int, options.of_seed("Of the global shuffle.")] = 0,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore the labels, store none.")
    ] = False,
    classes_at: Annotated[
        Literal["1", "2", "leaf", "path"] | None,
        typer.Option(help="Which folders are the classes. [default: recognized]"),
    ] = None,
    like: Annotated[
        Path | None, typer.Option(help="A set that numbers the classes (train for val).")
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
    square: Annotated[
        int | None,
        typer.Option(min=1, help="Cut to the central square and resize to this. [default: no]"),
    ] = None,
    quality: Annotated[
        int | None, typer.Option(min=1, max=100, help="Of resized JPEGs. [default: 90]")
    ] = None,
    levels: Annotated[
        str | None,
        typer.Option(
            help="Black and white of more than 8 bits. [default: all of 16]", metavar="LOW:HIGH"
        ),
    ] = None,
    gray: Annotated[
        bool,
        typer.Option("--gray", help="One channel, of 16 bits where there are more than 8."),
    ] = False,
    shard_mb: Annotated[
        int | None, typer.Option(min=1, help="Bound of a shard's size, in MB. [default: 128]")
    ] = None,
    min_side: Annotated[
        int | None, typer.Option(min=1, help="Smallest height and width, in pixels. [default: 1]")
    ] = None,
    max_mpixels: Annotated[
        float, typer.Option(callback=options.positive, help="Largest area, in megapixels.")
    ] = 100,
    max_mb: Annotated[
        float, typer.Option(callback=options.positive, help="Largest encoded image, in MiB.")
    ] = 128,
    workers: options.Workers = None,
    max_rejects: options.MaxRejects = None,
) -> None:
    """Check, shuffle and pack images into a shard set; after an interruption, go on."""
    from fastmoco.pack.catalog import open_known
    from fastmoco.pack.levels import parse_levels
    from fastmoco.pack.options import PackOptions, parse_splits
    from fastmoco.pack.packer import pack_sources, sources_for
    from fastmoco.pack.understood import understood

    given: dict[str, Any] = {
        "format": format,
        "seed": seed,
        "unlabelled": unlabelled,
        "classes_at": classes_at,
        "like": like,
        "splits": parse_splits(splits),
        "dedupe": dedupe,
        "short_side": short_side,
        "square": square,
        "quality": quality,
        "levels": parse_levels(levels),
        "gray": gray,
        "shard_mb": shard_mb,
        "min_side": min_side,
        "max_mpixels": max_mpixels,
        "max_mb": max_mb,
        "workers": _processes(workers),
        "max_rejects": max_rejects,
    }
    given = {name: value for name, value in given.items() if value is not None}
    if source.suffix == ".yaml":
        chosen, sources = open_known(source, within, out, given)
    else:
        chosen = PackOptions(root=within, **given)
        sources = sources_for(source, out, chosen)
    echo("\n".join(understood(sources)), err=True)
    with progress(f"packing {source}") as on_progress:
        manifests = pack_sources(sources, out, chosen, on_progress)
    for split, manifest in manifests.items():
        _summarize(out / split, manifest)


def views(
    set: Annotated[Path, typer.Argument(help="A shard set.")],
    recipe: Annotated[
        str, typer.Option(help="Whose views: a shipped name, or a path to a .yaml.")
    ] = "moco_v2_imagenet_r50",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, such as views.0.blur=0.")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples.")] = 8,
    out: Annotated[
        Path, typer.Option(help="The PNG; one that was drawn before is replaced.")
    ] = Path("views.png"),
) -> None:
    """Draw what a recipe makes of the first samples of a set, before GPU-days go into it."""
    from fastmoco.config.loading import load_recipe
    from fastmoco.plots import check_plot
    from fastmoco.viz.views import preview

    check_plot(out)
    chosen = load_recipe(recipe, [f"data.sets=[{json.dumps(str(set))}]", *(overrides or [])])
    title = f"{chosen.name}: the first {count} samples of {set.name}, seed {chosen.seed}"
    for shown in preview(chosen, out, count, title):
        echo(shown.described)
        for number, view in enumerate(shown.views, 1):
            echo(f"  view {number}: {view}")
    echo(f"drawn in {out}")


def verify(
    root: options.Set,
    full: Annotated[
        bool, typer.Option("--full", help="Read every byte and decode every image.")
    ] = False,
    workers: options.Workers = None,
) -> None:
    """Check that a set is whole: sizes and counts, or with --full every image."""
    from fastmoco.pack.verify import unhashed
    from fastmoco.pack.verify import verify as run

    with progress(f"verifying {root}") as on_progress:
        findings = run(root, full, on_progress, _processes(workers))
    for finding in findings:
        echo(finding)
    if findings:
        raise DataError(f"{root} has {len(findings)} defect(s): copy it again, or pack it anew.")
    echo(f"{root}: sound" + ("" if full else " in sizes and counts; --full reads every image"))
    older = unhashed(root)
    if older:
        echo(f"  written before there were hashes, a change would not show: {', '.join(older)}")


def inspect(
    root: options.Set,
    sheet: Annotated[
        Path | None, typer.Option(help="Draw random samples into this PNG.", metavar="PNG")
    ] = None,
    count: Annotated[int, typer.Option(min=1, help="Samples on the sheet.")] = 64,
    seed: Annotated[int, options.of_seed("Of their choice.")] = 0,
) -> None:
    """Show what a set holds: counts, classes, sizes; and a sheet of samples."""
    from fastmoco.core.files import check_replaceable
    from fastmoco.pack.inspect import contact_sheet, inspect_set, show

    if sheet:
        check_replaceable(sheet)
    # A file or a pipe has no width: nothing is broken there.
    show(inspect_set(root), Console(width=None if sys.stdout.isatty() else WIDEST))
    if sheet:
        contact_sheet(root, sheet, count, seed)
        echo(f"\n{sheet}")


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
    classes: options.Classes = None,
    workers: options.Workers = None,
    max_rejects: options.MaxRejects = None,
) -> None:
    """Adopt tar shards that others wrote, in place: check every image, add tables and indexes."""
    from fastmoco.label.from_csv import read_classes
    from fastmoco.pack.adopt import AdoptOptions, adopt_each

    options = AdoptOptions(
        label_key=label_key,
        unlabelled=unlabelled,
        classes=tuple(read_classes(classes)) if classes else (),
        workers=_processes(workers),
        max_rejects=max_rejects,
    )
    with progress(f"reading {folder}") as on_progress:
        manifests = adopt_each(folder, out, options, on_progress)
    for split, manifest in manifests.items():
        _summarize((out or folder) / split, manifest)
        if manifest.options["rotated"]:
            first = ", ".join(map(repr, manifest.options["rotated_first"]))
            echo(f"  rotated by EXIF {manifest.options['rotated']}, seen unrotated: {first}, ...")


def label(
    root: options.Set,
    table: Annotated[
        Path, typer.Argument(help="CSV: `label`, and `name` of the file or `sample` number.")
    ],
    name: Annotated[str, typer.Option(help="Of the labels; or a path that ends in .npy.")],
    classes: options.Classes = None,
    replace: Annotated[bool, typer.Option("--replace", help="Labels of the same name.")] = False,
    folder: Annotated[
        str | None,
        typer.Option("--root", help="What stands before the set's names in those of the CSV."),
    ] = None,
) -> None:
    """Add labels to a set, whose shards stay as they are; use them by --labels NAME."""
    from fastmoco.label.from_csv import label as run
    from fastmoco.label.from_csv import read_classes

    named = read_classes(classes) if classes else None
    done = run(root, table, name, named, replace, folder)
    echo(f"{done.path}: {done.labels} labels, {len(done.classes)} classes")
    for note in done.notes:
        echo(f"  {note}")


def _processes(workers: int | None) -> int:
    return workers or count_cores(1)


def _summarize(out: Path, manifest: "Manifest") -> None:
    size = sum(entry.bytes for entry in manifest.shards) / 1e6
    labels = f"{len(manifest.classes)} classes" if manifest.classes else "no labels"
    gray = "" if manifest.channels == 3 else f" of one channel of {manifest.bits} bits"
    shards = f"{len(manifest.shards)} shards, {size:.1f} MB"
    echo(f"{out}: {manifest.samples} images{gray}, {labels}, {shards}")
    for name, values in (("mean", manifest.mean), ("std", manifest.std)):
        echo(f"  {name:<5}" + " ".join(f"{value:.4f}" for value in values))
    echo(f"  set  {manifest.set_id[:16]}")
    names = ("red", "green", "blue") if manifest.channels == 3 else ("gray",)
    colors = zip(names, manifest.std, strict=True)
    if constant := [color for color, value in colors if value == 1]:  # else it is 0.5 at most
        echo(
            f"warning: all pixels of all images have one value of {' and '.join(constant)}: the "
            "deviation is taken for 1",
            err=True,
        )
    counts = zip(manifest.classes, manifest.class_counts, strict=True)
    empty = [name for name, count in counts if not count]
    if empty:
        more = ", ..." if len(empty) > 3 else ""
        echo(f"  no image of {len(empty)} classes: {', '.join(empty[:3])}{more}")
    if manifest.rejected:
        echo(f"  left out {manifest.rejected}, listed in {out / 'rejects.jsonl'}:")
        _print_rejects(out / "rejects.jsonl", 3)


def _print_rejects(path: Path, count: int) -> None:
    with path.open() as lines:
        for line in islice(lines, count):
            reject = json.loads(line)
            echo(f"    {reject['name']!r} {reject['reason']}")
