"""The embedded default: Engine on patches of photographs that other packages carry.

Class = photograph. Each photograph is laid out as a checkerboard: the training patches come from
its even cells and the test patches from its odd ones, so that no pixel is shared. The patches are
the same for every seed; the seed is that of the training.

OUT/patches/{train,test}   class folders of JPEGs
OUT/{train,test}           the shard sets
OUT/run                    the run folder
OUT/views.png, curves.png  the plots
OUT/result.json            the table
OUT/demo.json              marks the folder as a demo, and says of what
"""

import json
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.files import new_folder, write_json
from fastmoco.core.rng import Stream, raw_words
from fastmoco.dataset.labels import Labelled
from fastmoco.errors import UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import Pair
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.probe import ProbeConfig, get_best, probe_cached
from fastmoco.load.loader import evaluation_batches
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.plots import draw_curves
from fastmoco.pretrain import pretrain
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import build_encoder
from fastmoco.viz.views import preview

PATCH = 64  # side, pixels
CELL = 96  # about the side of a cell of the checkerboard
GAP = 8  # pixels that belong to no cell, between any two
SHOWN = 8  # samples in views.png
_RATES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)  # of the published table's probe
VIEWS_TITLE = "What the network sees in its first step: two views of each patch"

Split = Literal["train", "test"]
SPLITS: tuple[Split, ...] = get_args(Split)
Box = tuple[int, int, int, int]
"""Top, bottom, left, right."""

_REMEDY = "`pip install 'fastmoco[demo]'`."
_FILES = {
    "views.png": "what the network saw",
    "curves.png": "how the training went",
    "result.json": "the table",
    "run": "the run: `fastmoco knn` and `fastmoco probe` take it",
    "train": "the shard set that it was trained on",
}


@dataclass(frozen=True)
class Photograph:
    """A photograph that a Python package carries.

    Attributes:
        package: its import name.
        path: of the file, below the package's folder.
        box: the part that shows something, None: all of it.
    """

    package: str
    path: str
    box: Box | None = None

    @property
    def name(self) -> str:
        """The name of the class."""
        return Path(self.path).stem

    def file(self) -> Path:
        """Return where it lies; the package is not imported, since that may take seconds.

        Raises:
            UsageError: the package is not installed, or no longer carries the file.
        """
        spec = find_spec(self.package)
        folders = spec.submodule_search_locations if spec else None
        file = Path(folders[0]) / self.path if folders else None
        if not file or not file.is_file():
            raise UsageError(f"{self.package}/{self.path} is not installed: {_REMEDY}")
        return file

    def pixels(self) -> npt.NDArray[np.uint8]:
        """Return the (height, width, 3) pixels."""
        with Image.open(self.file()) as image:
            pixels = np.asarray(image.convert("RGB"))
        top, bottom, left, right = self.box or (0, pixels.shape[0], 0, pixels.shape[1])
        return pixels[top:bottom, left:right]


_SKIMAGE = (
    *("astronaut.png", "brick.png", "camera.png", "cell.png", "chelsea.png", "coffee.png"),
    *("coins.png", "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "moon.png"),
    *("motorcycle_left.png", "page.png", "rocket.jpg", "text.png"),
)
PHOTOGRAPHS = (
    *(Photograph("skimage", f"data/{name}") for name in _SKIMAGE),
    # A disc on black: the square inside of it.
    Photograph("skimage", "data/retina.jpg", (210, 1210, 210, 1210)),
    *(Photograph("sklearn", f"datasets/images/{name}.jpg") for name in ("china", "flower")),
)


@dataclass(frozen=True)
class Cut:
    """Which patches are cut: for each split, so many from each photograph."""

    photographs: tuple[Photograph, ...] = PHOTOGRAPHS
    train: int = 200
    test: int = 50


@dataclass(frozen=True)
class Row:
    """A row of the table: percent of the test patches whose photograph is found."""

    name: str
    knn: float
    probe: float


def demo(
    out: Path, seed: int = 0, overrides: Sequence[str] = (), cut: Cut = Cut()
) -> tuple[Row, ...]:
    """Cut, pack, pretrain, evaluate, plot; the same call again goes on where it was stopped.

    Args:
        out: a folder that is new, empty, or of the same demo.
        seed: of the training.
        overrides: of the recipe, `key=value`.
        cut: which patches.

    Returns:
        The rows of the table.

    Raises:
        UsageError: `out` is something else, or an optional package is missing.
    """
    began = time.monotonic()
    _check_installed(cut.photographs)
    _claim(out, {"seed": seed, "overrides": list(overrides), "cut": asdict(cut)})
    make_set(out, "train", cut.train, cut.photographs)
    make_set(out, "test", cut.test, cut.photographs)
    recipe = _recipe(out, seed, overrides)
    preview(recipe, out / "views.png", SHOWN, VIEWS_TITLE)
    run = pretrain(recipe)
    title = f"{recipe.objective.name} on patches of photographs"
    draw_curves(out / "curves.png", run.rows(), recipe.candidates, title)
    rows = evaluate(run)
    write_json(out / "result.json", [asdict(row) for row in rows])
    _show(out, rows, len(cut.photographs), time.monotonic() - began)
    return rows


def _check_installed(photographs: Sequence[Photograph]) -> None:
    for photograph in photographs:
        photograph.file()
    if not find_spec("matplotlib"):
        raise UsageError(f"matplotlib is not installed: {_REMEDY}")


def _claim(out: Path, settings: dict[str, Any]) -> None:
    """Make `out` the folder of this demo, unless it is of another one or something else."""
    settings = json.loads(json.dumps(settings))  # as it will be read back
    mark = out / "demo.json"
    try:
        if mark.is_file():
            if json.loads(mark.read_text()) != settings:
                raise UsageError(
                    f"{out} holds a demo of another seed or version: choose another folder by "
                    "--out, or remove it."
                )
            return
        out.mkdir(parents=True, exist_ok=True)
        if any(out.iterdir()):
            raise UsageError(f"{out} exists and is not a demo: choose another folder by --out.")
        write_json(mark, settings)
    except (OSError, ValueError) as error:
        raise UsageError(f"{out} cannot be used ({error}): choose another by --out.") from error


def make_set(out: Path, split: Split, count: int, photographs: Sequence[Photograph]) -> None:
    """Cut and pack one split into OUT/SPLIT, as far as an earlier call has not done so.

    Args:
        out: the folder, which exists.
        split: "train" or "test".
        count: patches from each photograph.
        photographs: that are cut.

    Raises:
        UsageError: the package of a photograph is not installed.
    """
    patches, packed = out / "patches" / split, out / split
    if not patches.exists():
        with new_folder(patches) as folder:
            for photograph in photographs:
                _save_patches(folder / photograph.name, photograph.pixels(), split, count)
    if not packed.exists():
        pack(patches, packed, PackOptions())
    size = f"{count} patches from each of {len(photographs)} photographs"
    Console().print(f"{packed}: {size}", highlight=False, soft_wrap=True)


def _save_patches(folder: Path, pixels: npt.NDArray[np.uint8], split: Split, count: int) -> None:
    folder.mkdir()
    for number, (top, left) in enumerate(corners(pixels.shape[0], pixels.shape[1], split, count)):
        patch = Image.fromarray(pixels[top : top + PATCH, left : left + PATCH])
        patch.save(folder / f"{number:04d}.jpg", quality=95, subsampling=0)


def corners(height: int, width: int, split: Split, count: int) -> list[tuple[int, int]]:
    """Return top and left of a split's patches, the same for ever, spread evenly over its cells.

    Args:
        height, width: of the photograph.
        split: "train" or "test".
        count: of the patches.
    """
    boxes = cells(height, width)[split]
    words = raw_words(SPLITS.index(split), Stream.ORDER, 0, 2 * count).reshape(count, 2).tolist()
    found = []
    for number, (down, across) in enumerate(words):
        top, bottom, left, right = boxes[number % len(boxes)]
        found.append(
            (top + down % (bottom - top - PATCH + 1), left + across % (right - left - PATCH + 1))
        )
    return found


def cells(height: int, width: int) -> dict[Split, list[Box]]:
    """Return the even cells of a checkerboard for training and the odd ones for the test."""
    boards: dict[Split, list[Box]] = {"train": [], "test": []}
    for i, (top, bottom) in enumerate(_parts(height, max(1, height // CELL))):
        for j, (left, right) in enumerate(_parts(width, max(2, width // CELL))):
            boards[SPLITS[(i + j) % 2]].append((top, bottom, left, right))
    return boards


def _parts(length: int, number: int) -> list[tuple[int, int]]:
    """Return start and stop of equal parts of a length, a gap apart."""
    edges = [length * i // number for i in range(number + 1)]
    return [(start + GAP // 2, stop - GAP // 2) for start, stop in pairwise(edges)]


def _recipe(out: Path, seed: int, overrides: Sequence[str]) -> Recipe:
    """Return the shipped recipe, pointed at this folder."""
    train, test, run = (json.dumps(str(out / name)) for name in ("train", "test", "run"))
    here = [
        f"data.sets=[{train}]",
        f"monitor.bank={train}",
        f"monitor.queries={test}",
        f"out={run}",
    ]
    return load_recipe("demo", [*here, f"seed={seed}", *overrides])


def evaluate(run: RunFolder) -> tuple[Row, ...]:
    """Return the rows of a finished run: equal classifiers, on three kinds of features."""
    trained, recipe = Evaluation.open(run.root), run.recipe()
    assert recipe
    fresh = build_encoder(recipe).to(trained.preprocessing.settings.device)
    untrained = replace(trained, encoder=fresh.eval().requires_grad_(False))
    sets = trained.train, trained.test
    return (
        _row("untrained", trained, *(untrained.features(s, "backbone") for s in sets)),
        _row("color statistics", trained, *standardized(*(_colors(trained, s) for s in sets))),
        _row("trained", trained, *(trained.features(s, "backbone") for s in sets)),
    )


def _row(name: str, evaluation: Evaluation, train: Pair, test: Pair) -> Row:
    recipe, classes = evaluation.recipe, evaluation.classes
    assert recipe and recipe.monitor
    monitor = recipe.monitor
    knn = KNNClassifier(*train, classes, monitor.k, monitor.t).accuracy(*test)
    found = probe_cached(train, test, classes, ProbeConfig(lrs=_RATES, features="cached"))
    return Row(name, knn, get_best(found).top1)


def _colors(evaluation: Evaluation, one: Labelled) -> Pair:
    preprocessing = evaluation.preprocessing
    batches = evaluation_batches(
        one.data, ids=one.ids, share=preprocessing.share, batch=128, **preprocessing.drawn
    )
    features = torch.cat([color_statistics(batch.views[0].float()) for batch in batches])
    return features, torch.from_numpy(one.labels).to(features.device)


def color_statistics(images: torch.Tensor) -> torch.Tensor:
    """Return (n, 6) channel means and standard deviations of (n, 3, H, W) images."""
    return torch.cat([images.mean(dim=(2, 3)), images.std(dim=(2, 3), correction=0)], dim=1)


def standardized(train: Pair, test: Pair) -> tuple[Pair, Pair]:
    """Return the features shifted and scaled to mean 0 and deviation 1 on the training set."""
    mean, std = train[0].mean(dim=0), train[0].std(dim=0)
    return ((train[0] - mean) / std, train[1]), ((test[0] - mean) / std, test[1])


def _show(out: Path, rows: Sequence[Row], classes: int, elapsed_s: float) -> None:
    console = Console()
    table = Table(
        title=f"Which of {classes} photographs is a patch from? (chance {100 / classes:.1f} %)"
    )
    table.add_column("features")
    for title in ("kNN", "probe top-1"):
        table.add_column(title, justify="right")
    for row in rows:
        table.add_row(row.name, f"{row.knn:.1f} %", f"{row.probe:.1f} %")
    console.print(table)
    for name, what in _FILES.items():
        console.print(f"{out / name}  {what}", highlight=False, soft_wrap=True)
    console.print(f"{elapsed_s:.0f} s", highlight=False)
