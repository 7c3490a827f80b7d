"""The command line. Heavy modules are imported inside the commands, so that `--help` is quick."""

import sys
from collections.abc import Callable
from typing import Annotated

import typer

from fastmoco import __version__
from fastmoco.cli import check, data, labels, models, options, runs
from fastmoco.core.streams import lasting_output
from fastmoco.core.terminal import echo, told
from fastmoco.errors import FastmocoError

INTERRUPTED = 130

COMMANDS: dict[str, dict[str, Callable[..., None]]] = {
    "Sets of images": {
        "shard": data.shard,
        "verify": data.verify,
        "inspect": data.inspect,
        "index": data.index,
        "views": data.views,
    },
    "Runs": {
        "pretrain": runs.pretrain,
        "knn": runs.knn,
        "probe": runs.probe,
        "finetune": runs.finetune,
        "report": runs.report,
        "demo": runs.demo,
    },
    "Labels": {
        "query": labels.query,
        "label": data.label,
        "pseudolabel": labels.pseudolabel,
        "hardness": labels.hardness,
    },
    "Encoders": {
        "import": models.import_,
        "export": models.export,
        "embed": models.embed,
    },
    "This machine": {
        "doctor": check.doctor,
        "bench": check.bench,
    },
}

app = typer.Typer(
    name="fastmoco",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="markdown",  # "rich" would take `[default: ...]` for markup and drop it
    add_completion=False,
)
for panel, commands in COMMANDS.items():
    for name, command in commands.items():
        app.command(name, rich_help_panel=panel)(command)


def _show_version(asked: bool) -> None:
    if asked:
        echo(f"fastmoco {__version__}")
        raise typer.Exit()


@app.callback()
def of_all_commands(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show it.")
    ] = False,
) -> None:
    """Momentum Contrast from a folder of images to a linear-probe number."""


def main() -> None:
    """Run the command line; a user error ends in plain lines and its exit code."""
    with lasting_output() as output:
        code = _ran()
        output.flush()
        if not code and output.lost and sys.argv[1:2] != ["pretrain"]:  # whose log it is
            echo(f"error: the result could not be shown: {output.lost}", err=True)
            code = 2
    sys.exit(code)


def _ran() -> int:
    """Run the command and return its exit code."""
    try:
        app(args=options.join_pairs(sys.argv[1:]))
    except (FastmocoError, OSError) as error:
        return told(error)
    except KeyboardInterrupt:
        return _interrupted()
    except SystemExit as end:
        if end.code == INTERRUPTED:  # how typer hands on a Ctrl-C
            return _interrupted()
        return end.code if isinstance(end.code, int) else int(end.code is not None)
    return 0


def _interrupted() -> int:
    echo("interrupted", err=True)
    return INTERRUPTED
