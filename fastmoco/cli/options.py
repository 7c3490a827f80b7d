"""Arguments and options that several commands share."""

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def positive(value: Any) -> Any:
    """Refuse a number, or one of several, that is not above 0 and finite."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not 0 < number < float("inf"):
            raise typer.BadParameter(f"{number:g} is not above 0" + " and finite" * (number > 0))
    return value


def share(value: float | None) -> float | None:
    """Refuse a number that is not of 0 to 1."""
    if value is not None and not 0 <= value <= 1:
        raise typer.BadParameter(f"{value:g} is not a share: choose one of 0 to 1")
    return value


def join_pairs(words: Sequence[str]) -> list[str]:
    """Join the two values of each `--more`: typer has no option of two values that can be repeated.

    By a NUL, which no path holds.
    """
    found: list[str] = []
    for word in words:
        if found[-2:-1] == ["--more"] and "\0" not in found[-1] and not word.startswith("-"):
            found[-1] += f"\0{word}"
        else:
            found.append(word)
    return found


def split_pairs(values: Sequence[str] | None) -> list[tuple[Path, str]]:
    """Return the set and the table of each `--more`."""
    pairs = (value.split("\0") for value in values or ())
    return [(Path(root), table) for root, table in pairs]


def _refuse_single(values: list[str] | None) -> list[str] | None:
    for value in values or ():
        if "\0" not in value:
            raise typer.BadParameter("two values are needed, as in --more data/pool asked")
    return values


def of_seed(help: str) -> Any:
    """Return the option of a seed, bounded as that of a recipe is."""
    return typer.Option(min=0, max=2**63 - 1, help=help)


Set = Annotated[Path, typer.Argument(help="The set's folder.")]
Classes = Annotated[
    Path | None, typer.Option(help="Names of the labels 0, 1, ...: a text, one a line; or a set.")
]
Workers = Annotated[
    int | None, typer.Option(min=1, help="Decoding processes. [default: one for each CPU]")
]
MaxRejects = Annotated[
    int | None,
    typer.Option(min=0, help="Left-out images to put up with. [default: 1 %, at least 10]"),
]
Run = Annotated[Path, typer.Argument(help="The run's folder.")]
Labels = Annotated[
    str | None, typer.Option(help="Those of `fastmoco label`. [default: the monitor's, or packed]")
]
More = Annotated[
    list[str] | None,
    typer.Option(
        callback=_refuse_single,
        metavar="SET TABLE",
        help="Labels to train on too: TABLE of `fastmoco label`, or a CSV; repeatable.",
    ),
]
PerClass = Annotated[
    int | None, typer.Option(min=1, help="Labels of each class, drawn by --seed. [default: all]")
]
Chosen = Annotated[
    Literal["holdout", "test"],
    typer.Option(help="By what the best of several rates is chosen: labels held out, or the test."),
]
Train = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's bank]")]
Test = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's queries]")]
Feature = Annotated[Literal["head", "backbone"], typer.Option(help="Which of the two outputs.")]
By = Annotated[
    Path | None, typer.Option(help="What `finetune --save` wrote: its network is the classifier.")
]
Classifier = Annotated[
    Path | None, typer.Option(help="A file: read if it is there, else fitted and kept in it.")
]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Precision = Annotated[
    Literal["bf16", "fp32"] | None,
    typer.Option(
        help="Of the network. [default: bf16 if the run's and the device has it, else fp32]"
    ),
]
