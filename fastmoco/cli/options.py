"""Arguments and options that several commands share."""

from pathlib import Path
from typing import Annotated, Any, Literal

import typer


def positive(value: Any) -> Any:
    """Refuse a number, or one of several, that is not above 0 and finite."""
    for number in value if isinstance(value, list) else [value]:
        if number is not None and not 0 < number < float("inf"):
            raise typer.BadParameter(f"{number:g} is not above 0" + " and finite" * (number > 0))
    return value


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
Train = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's bank]")]
Test = Annotated[Path | None, typer.Option(help="Labelled set. [default: the monitor's queries]")]
Feature = Annotated[Literal["head", "backbone"], typer.Option(help="Which of the two outputs.")]
Device = Annotated[Literal["auto", "cpu", "cuda"], typer.Option(help="Where to compute.")]
Precision = Annotated[
    Literal["bf16", "fp32"] | None,
    typer.Option(help="Of the network. [default: bf16 if the run's, else fp32]"),
]
