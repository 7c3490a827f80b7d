"""The commands. Heavy modules are imported inside them, so that `--help` answers at once."""

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.markup import escape

from fastmoco.errors import FastmocoError

if TYPE_CHECKING:
    from fastmoco.shardset import Manifest

INTERRUPTED = 130

app = typer.Typer(
    name="fastmoco",
    help="Momentum Contrast from a folder of images to a linear-probe number.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    add_completion=False,
)


@app.callback()
def _commands() -> None:
    """Keep the command names even while there is only one command."""


def main() -> None:
    """Run the command line; a user error ends in plain lines and its exit code."""
    try:
        app()
    except FastmocoError as error:
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


@app.command()
def shard(
    source: Annotated[Path, typer.Argument(help="A class folder or a flat folder of images.")],
    out: Annotated[Path, typer.Argument(help="The set's folder; must not exist.")],
    seed: Annotated[int, typer.Option(min=0, help="Of the global shuffle.")] = 0,
    unlabelled: Annotated[
        bool, typer.Option("--unlabelled", help="Ignore the layout, store no labels.")
    ] = False,
    like: Annotated[
        Path | None, typer.Option(help="A set whose classes must be the same (train for val).")
    ] = None,
    shard_mb: Annotated[int, typer.Option(min=1, help="Bound of a shard's size, in MB.")] = 128,
    min_side: Annotated[int, typer.Option(min=1, help="Smallest height and width, in pixels.")] = 1,
    workers: Annotated[
        int | None, typer.Option(min=1, help="Decoding processes. [default: one for each CPU]")
    ] = None,
    max_rejects: Annotated[
        int | None,
        typer.Option(min=0, help="Unfit images to put up with. [default: 1 %, at least 10]"),
    ] = None,
) -> None:
    """Check, shuffle and pack a folder of images into a shard set."""
    from fastmoco.pack.writer import PackOptions, pack

    options = PackOptions(
        seed=seed,
        unlabelled=unlabelled,
        like=like,
        shard_mb=shard_mb,
        min_side=min_side,
        workers=workers or len(os.sched_getaffinity(0)),
        max_rejects=max_rejects,
    )
    with _progress(f"packing {source}") as on_progress:
        manifest = pack(source, out, options, on_progress)
    _summarise(out, manifest)


@contextmanager
def _progress(what: str) -> Iterator[Callable[[int, int], None]]:
    """Show a bar on stderr; yield the callable that moves it to (done, total)."""
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeRemainingColumn

    columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), TimeRemainingColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
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
    import json
    from itertools import islice

    with path.open() as lines:
        for line in islice(lines, count):
            reject = json.loads(line)
            print(f"    {reject['name']!r} {reject['reason']}")
