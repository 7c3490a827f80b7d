"""Compares this program with what people use, in pairs, on this machine.

    python benchmarks/compare.py pack|loader|step|train ... [--pairs N] [--out ROWS.jsonl]

It needs psutil (`pip install 'fastmoco[bench]'`). Heavy modules are imported inside the commands.
"""

import signal
import sys
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import click
import typer

from fastmoco.core.terminal import told
from fastmoco.errors import FastmocoError

if TYPE_CHECKING:
    from collections.abc import Callable

    from harness.compare import OnRow
    from harness.report import Measurement, Report

app = typer.Typer(
    name="compare.py",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


_Pairs = Annotated[int, typer.Option(min=1, help="Rounds; 10 for a claim below 1.2x.")]
_Itself = Annotated[
    bool, typer.Option("--aa", help="Ours against itself: the smallest effect to be seen here.")
]
_Out = Annotated[Path | None, typer.Option(help="A .jsonl that the rows are appended to.")]


@app.callback()
def end_cleanly_when_told_to() -> None:
    """Measure this program against what people use, in pairs, on this machine."""
    # A plain SIGTERM would leave the arm that runs, and the scratch folder, behind.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))


@app.command()
def pack(
    source: Annotated[Path, typer.Argument(help="A class folder or a flat folder of images.")],
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink to it, in pixels. [default: keep the bytes]")
    ] = None,
    quality: Annotated[int, typer.Option(min=1, max=100, help="Of the JPEGs so made.")] = 90,
    repeat: Annotated[int, typer.Option(min=1, help="How many times each image occurs.")] = 1,
    pool: Annotated[
        bool, typer.Option("--pool", help="Measure the loop with a pool of processes too.")
    ] = False,
    pairs: _Pairs = 6,
    aa: _Itself = False,
    out: _Out = None,
) -> None:
    """Pack a folder: ours against a loop of PIL and webdataset."""
    from harness.compare import require_tools

    require_tools()
    from comparisons.pack import Settings, bench_pack

    settings = Settings(short_side=short_side, quality=quality, repeat=repeat, pool=pool)
    _run("pack", out, lambda on_row: bench_pack(source, settings, pairs, aa, on_row))


@app.command()
def loader(
    source: Annotated[Path, typer.Argument(help="A class folder of images.")],
    size: Annotated[int, typer.Option(min=8, help="Side of the views, pixels.")] = 224,
    short_side: Annotated[
        int | None, typer.Option(min=1, help="Shrink our set to it. [default: keep the bytes]")
    ] = None,
    batch: Annotated[int, typer.Option(min=2, help="Images a batch.")] = 256,
    batches: Annotated[int, typer.Option(min=1, help="In the measured section.")] = 10,
    repeat: Annotated[int, typer.Option(min=1, help="How many times each image occurs.")] = 1,
    against: Annotated[
        list[str] | None,
        typer.Option(
            help="dali, cached (ours by DALI, or from decoded pixels), imagefolder, "
            "webdataset, lightly, dali-operators, ffcv, ffcv-raw (pixels instead "
            "of JPEGs); may be given several times. [default: imagefolder]"
        ),
    ] = None,
    workers: Annotated[
        int, typer.Option(min=0, help="Of the others' DataLoader; 0: the fastest, tried before.")
    ] = 0,
    bound: Annotated[
        bool, typer.Option("--bound", help="Measure decode, crops and normalization alone too.")
    ] = False,
    pairs: _Pairs = 6,
    aa: _Itself = False,
    out: _Out = None,
) -> None:
    """Draw two views of every image: ours against the loaders that people use."""
    from harness.compare import require_tools

    require_tools()
    from comparisons.loader import Settings, bench_loader

    rivals = tuple(against or ["imagefolder"])
    settings = Settings(size, short_side, batch, batches, repeat, workers, rivals, bound)
    _run("loader", out, lambda on_row: bench_loader(source, settings, pairs, aa, on_row))


@app.command()
def step(
    arch: Annotated[
        list[str] | None,
        typer.Option(
            help="Of torchvision's ResNets; may be given several times. [default: resnet18]"
        ),
    ] = None,
    size: Annotated[int, typer.Option(min=32, help="Side of the views, pixels.")] = 64,
    batch: Annotated[int, typer.Option(min=2, help="Images a step over all ranks.")] = 64,
    queue: Annotated[int, typer.Option(min=2, help="Keys; a multiple of the batch.")] = 65536,
    precision: Annotated[
        str, typer.Option(help="Of our step, bf16 or fp32; the official one has fp32.")
    ] = "bf16",
    ranks: Annotated[int, typer.Option(min=1, help="Processes that share a batch.")] = 1,
    steps: Annotated[int, typer.Option(min=1, help="In the measured section.")] = 40,
    device: Annotated[str, typer.Option(help="auto, cpu or cuda.")] = "auto",
    tuned: Annotated[
        bool,
        typer.Option("--tuned", help="Also the official step at our precision, channels-last."),
    ] = False,
    pairs: _Pairs = 6,
    aa: _Itself = False,
    out: _Out = None,
) -> None:
    """Train on synthetic batches: our step against the official one."""
    from harness.compare import require_tools

    require_tools()
    from comparisons.step import Settings, bench_step

    for name in arch or ["resnet18"]:
        settings = Settings(name, size, batch, queue, precision, ranks, steps, device, tuned)
        _run("step", out, partial(bench_step, settings, pairs, aa))


@app.command()
def train(
    recipe: Annotated[str, typer.Argument(help="A shipped recipe's name, or a .yaml.")] = "demo",
    overrides: Annotated[
        list[str] | None, typer.Argument(help="key=value, as for training.", show_default=False)
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option("--set", help="A packed set. [default: the patches of `fastmoco demo`]"),
    ] = None,
    steps: Annotated[int, typer.Option(min=1, help="In the measured section.")] = 40,
    pairs: _Pairs = 6,
    aa: _Itself = False,
    out: _Out = None,
) -> None:
    """Train end to end: loader and step together, against the step alone and the loader alone."""
    from harness.compare import require_tools

    require_tools()
    from comparisons.train import bench_train

    _run("train", out, partial(bench_train, recipe, overrides or [], data, steps, pairs, aa))


def _run(bench: str, out: Path | None, measure: "Callable[[OnRow], Report]") -> None:
    """Measure, record every row, show the report.

    Raises:
        DataError: the arms did not do the same work, or no pair counts.
    """
    from harness.record import Record
    from harness.table import line_of, show
    from rich.console import Console

    record, errors = Record(out, bench), Console(stderr=True)

    def on_row(found: "Measurement") -> None:
        record.measurement(found)
        errors.print(line_of(found), markup=False, highlight=False)

    report = measure(on_row)
    record.report(report)
    show(report, Console())
    report.require_result()


def main() -> int:
    """Run a command; a user's error is told in plain lines."""
    try:
        app(standalone_mode=False)
    except (FastmocoError, OSError) as error:
        return told(error)
    except typer.Exit as end:
        return end.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
