"""From somebody's checkpoint to a run folder that `fastmoco probe` and `fastmoco knn` read."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastmoco.config import Recipe, validate
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.exchange.layouts import layout_names
from fastmoco.exchange.matching import Match, match
from fastmoco.exchange.reading import About, read_weights
from fastmoco.files import new_folder, sha256_of, write_json
from fastmoco.run import ORIGIN, RunFolder


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    Attributes:
        recipe: of the run folder.
        layout: that the file was in.
        notes: sentences that its user must know.
    """

    recipe: Recipe
    layout: str
    notes: tuple[str, ...]


def import_weights(
    file: Path, out: Path, layout: str = "auto", image_size: int | None = None
) -> Imported:
    """Make a run folder, at step 0, of the weights of another program.

    Args:
        file: safetensors, or a checkpoint of torch that holds tensors and plain values only.
        out: the run folder; must not exist.
        layout: one of `layout_names()`, or "auto": the one that the file fills.
        image_size: that the network is shown, pixels; None: what our own export says, else 224,
            or 32 after a 3x3 stem.

    Raises:
        UsageError: no such file or layout, or `out` exists.
        CheckpointError: the file is damaged, unsafe, or does not fill a network in full.
    """
    if layout not in ("auto", *layout_names()):
        raise UsageError(f"There is no layout {layout!r}: use auto, {', '.join(layout_names())}.")
    if out.exists():
        raise UsageError(f"{out} exists: choose another folder.")
    weights = read_weights(file)
    try:
        found = match(weights.tensors, layout, weights.about.stem)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    recipe = _recipe(found, out, weights.about, image_size)
    notes = _notes(found, recipe)
    origin = {
        "file": file.name,
        "sha256": sha256_of(file),
        "layout": found.layout.name,
        "prefix": found.layout.prefix,
        "notes": notes,
    }
    with new_folder(out) as folder:
        run = RunFolder(folder)
        run.describe(recipe, {name: version(name) for name in ("fastmoco", "torch")})
        run.save({"encoder_q": found.weights}, step=0, marks={}, keep=1)
        write_json(folder / ORIGIN, origin)
    return Imported(recipe, found.layout.name, notes)


def _recipe(found: Match, out: Path, about: About, image_size: int | None) -> Recipe:
    """Return a recipe that says what an evaluation asks; how it was trained is not in the file."""
    values = {
        "name": out.name,
        "data": ["unknown"],
        "out": str(out),
        "arch": found.arch,
        "stem": found.stem,
        "head": found.head,
        "dim": found.dim,
        "image_size": image_size or about.image_size or (224 if found.stem == "imagenet" else 32),
        "views": [{}, {}],
        "optimizer": {"lr": 1.0},
        "schedule": {"epochs": 1},
        "precision": "fp32",  # the numbers of the weights as they came
    }
    statistics = about.model_dump(include={"mean", "std"}, exclude_none=True)
    return validate(values | statistics, str(out))


def _notes(found: Match, recipe: Recipe) -> tuple[str, ...]:
    notes = [
        f"Images are shown at {recipe.image_size} px, mean {recipe.mean}, std {recipe.std}: "
        "if the weights were trained with others, put those into config.yaml."
    ]
    if found.left_out:
        notes.append(f"The head was left out: {found.left_out}.")
    elif found.head == "none":
        notes.append("No head was taken; head features are the backbone's.")
    if found.layout.name == "solo" and found.stem == "small":
        notes.append(
            "solo-learn pads the 3x3 stem of its CIFAR networks by 2 pixels and ours by 1: "
            "features differ at the borders, and a number from here is not quite theirs."
        )
    return tuple(notes)
