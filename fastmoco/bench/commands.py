"""The commands of `fastmoco bench`. Heavy modules are imported inside them."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from fastmoco.bench.report import Measurement

app = typer.Typer(
    name="bench",
    help="Measure this program against what people use, in pairs, on this machine.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)


@app.callback()
def _commands() -> None:
    """Keep the command names even while there is only one command."""


_Pairs = Annotated[int, typer.Option(min=1, help="Rounds; 10 for a claim below 1.2x.")]
_Itself = Annotated[
    bool, typer.Option("--aa", help="Ours against itself: the smallest effect to be seen here.")
]
_Out = Annotated[Path | None, typer.Option(help="A .jsonl that the rows are appended to.")]


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
    from rich.console import Console

    from fastmoco.bench.harness import require_tools
    from fastmoco.bench.record import Record
    from fastmoco.bench.table import line_of, show

    require_tools()
    from fastmoco.bench.pack import Settings, bench_pack

    record, errors = Record(out, "pack"), Console(stderr=True)

    def on_row(found: "Measurement") -> None:
        record.measurement(found)
        errors.print(line_of(found), markup=False, highlight=False)

    settings = Settings(short_side=short_side, quality=quality, repeat=repeat, pool=pool)
    report = bench_pack(source, settings, pairs, aa, on_row)
    record.report(report)
    show(report, Console())
    report.require_result()
