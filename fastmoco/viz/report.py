"""The report of a run: one HTML page that needs nothing beside it, and the PNG files on it."""

import base64
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import numpy as np
from torch import nn

from fastmoco.core.distributed import get_device
from fastmoco.core.files import write_bytes
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import FastmocoError, UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import frozen_preprocessing
from fastmoco.evaluate.predictions import Predictions
from fastmoco.evaluate.results import SPARSE
from fastmoco.plots import Images, curves_in, draw_curve
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz.encoder_study import (
    Study,
    feature_maps,
    most_confident,
    most_confused,
    projected,
    shown,
)
from fastmoco.viz.evaluation_study import draw_evaluations
from fastmoco.viz.label_study import draw_label_file, read_label_file
from fastmoco.viz.report_plots import (
    Tile,
    draw_confusion,
    draw_filters,
    draw_heat,
    draw_maps,
    draw_plane,
    get_colors,
    has_legend,
    save_tile,
)
from fastmoco.viz.run_facts import Facts, gather
from fastmoco.viz.views import preview

PAGE = "report.html"
SAMPLES = 10_000  # of each labelled set: minutes on a CPU
_VIEWED, _QUERIES, _NEIGHBOURS, _EXTREMES, _PAIRS = 8, 10, 8, 16, 10
_ATTENDED = 8  # images of those that are surely right, and of the wrong ones
Found = TypeVar("Found")


@dataclass(frozen=True)
class Query:
    """A test image, and its nearest training images or its heat maps."""

    tile: Tile
    neighbors: list[Tile]


def report(
    root: Path,
    out: Path | None = None,
    train: Path | None = None,
    test: Path | None = None,
    samples: int = SAMPLES,
    device: str = "auto",
    labels: str | None = None,
    label_files: Sequence[Path] = (),
) -> Path:
    """Write the report of a run; the same run gives the same bytes.

    Args:
        root: the run folder.
        out: where to; None: `report` in the run folder.
        train, test: labelled sets; None: those of the run's monitor.
        samples: at most so many of each are looked at.
        device: "auto", "cpu" or "cuda".
        labels: side table of the training set, see `Evaluation.open`.
        label_files: CSVs of `query` and `pseudolabel`, with what lies beside them.

    Returns:
        The page. What it cannot show, for want of a set or a checkpoint, it says in a sentence.

    Raises:
        UsageError: no run there, `out` cannot be written, or an optional package is missing.
        FastmocoError: sets that were named do not serve.
    """
    _check_installed()
    run = RunFolder(root)
    out = out or run.root / "report"
    facts = gather(run)
    # A set that the user named must serve, and at once; one that the recipe names may be gone.
    asked = train or test or labels
    named = Evaluation.open(root, train, test, device, labels) if asked else None
    wrote = [read_label_file(path) for path in label_files]
    with _writing(out):
        out.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory() as aside:
        folder = Path(aside)
        content = {
            "curves": _curves(folder, facts),
            "evaluations": draw_evaluations(folder, run.root, facts.evaluations),
            "views": _or_why(lambda: _views(folder, facts, device)),
            "network": _or_why(lambda: _network(folder, run, device)),
            "labelled": _or_why(
                lambda: _labelled(folder, named or Evaluation.open(root, device=device), samples)
            ),
            "label_files": [
                draw_label_file(folder, run, one, number, device)
                for number, one in enumerate(wrote)
            ],
        }
        html = _render(folder, run, facts, content)
        with _writing(out):
            _publish(folder, out, html)
    return out / PAGE


def _check_installed() -> None:
    for package in ("matplotlib", "jinja2"):
        if not find_spec(package):
            raise UsageError(f"{package} is not installed: `pip install 'fastmoco[report]'`.")


def _or_why(make: Callable[[], Found]) -> Found | str:
    """Return what is made, or the sentence that says why it cannot be."""
    try:
        return make()
    except FastmocoError as error:
        return str(error)


@contextmanager
def _writing(out: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise UsageError(
            f"Cannot write to {out} ({error.strerror}): choose another by --out."
        ) from error


def _publish(folder: Path, out: Path, html: str) -> None:
    """Write the images, then the page; each file is whole or as before."""
    for file in sorted(folder.glob("*.png")):
        write_bytes(out / file.name, file.read_bytes())
    # A file's name may hold bytes that are no text.
    write_bytes(out / PAGE, html.encode("utf-8", "replace"))


def _render(folder: Path, run: RunFolder, facts: Facts, content: dict[str, Any]) -> str:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("fastmoco", "viz"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["inline"] = lambda name: _inlined(folder / name)
    page = environment.get_template("report.html")
    return page.render(folder=run.root.resolve().name, facts=facts, **content)


def _inlined(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _curves(folder: Path, facts: Facts) -> list[dict[str, str]]:
    drawn = []
    for curve in curves_in(facts.metrics):
        file = f"curve_{curve.key}.png"
        candidates = facts.recipe.candidates if facts.recipe else 1
        draw_curve(folder / file, facts.metrics, candidates, curve)
        values = curve.points(facts.metrics)[1]
        span = f"first {values[0]:.4g}, last {values[-1]:.4g}"
        alt = f"{curve.title} over the epochs: {span}"
        drawn.append({"file": file, "alt": alt, "note": curve.note})
    return drawn


def _views(folder: Path, facts: Facts, device: str) -> dict[str, Any]:
    if facts.recipe is None:
        raise UsageError("The weights were imported: how their views were drawn is not known.")
    runtime = facts.recipe.runtime.model_copy(update={"device": device})
    recipe = facts.recipe.model_copy(update={"runtime": runtime})
    title = f"The first samples of the run, seed {recipe.seed}"
    drawn = preview(recipe, folder / "views.png", _VIEWED, title)
    return {"file": "views.png", "samples": drawn}


def _network(folder: Path, run: RunFolder, device: str) -> dict[str, Any]:
    """Draw what needs an encoder and no labels."""
    where = get_device(device, 0)
    encoder, spec, step = load_encoder(run, where)
    weight = next(m.weight for m in encoder.backbone.modules() if isinstance(m, nn.Conv2d))
    draw_filters(folder / "filters.png", weight)
    shape = " × ".join(map(str, weight.shape))

    def maps() -> dict[str, str]:
        if (recipe := run.recipe()) is None:
            raise UsageError("The weights were imported: there are no training images to show.")
        data = ConcatShardSets.open(recipe.data.sets)
        preprocessing = frozen_preprocessing(spec, recipe.runtime, where)
        draw_maps(folder / "maps.png", feature_maps(encoder, preprocessing, data, 0))
        save_tile(folder / "maps_input.png", shown(preprocessing, data, np.array([0]))[0])
        return {"file": "maps.png", "input": "maps_input.png", "described": data.describe(0)}

    return {"step": step, "filters": "filters.png", "shape": shape, "maps": _or_why(maps)}


def _labelled(folder: Path, evaluation: Evaluation, samples: int) -> dict[str, Any]:
    """Draw what needs labels."""
    study = Study.of(evaluation, samples)
    found, names = study.predictions(), study.evaluation.train.classes
    best, worst = (_extremes(folder, study, found, right) for right in (True, False))
    if len(names) < SPARSE:
        draw_confusion(folder / "confusion.png", found.confusion().numpy(), names)
    return {
        "train": study.evaluation.train,
        "test": study.evaluation.test,
        "classifier": study.classifier,
        "feature": study.feature,
        "top1": found.top(1),
        "queries": _queries(folder, study),
        "best": best,
        "worst": worst,
        "attention": [
            *_attention(folder, study, most_confident(found, True, _ATTENDED), best),
            *_attention(folder, study, most_confident(found, False, _ATTENDED), worst),
        ],
        "confusion": "confusion.png" if len(names) < SPARSE else None,
        "confused": most_confused(found.confused().numpy(), names, _PAIRS),
        "classes": _per_class(found, names),
        "plane": _plane(folder, study, names),
    }


def _queries(folder: Path, study: Study) -> list[Query]:
    train, test = study.evaluation.train, study.evaluation.test
    places = study.some(_QUERIES)
    similarity, rows = study.nearest(places, _NEIGHBOURS)
    asked = study.pixels(test, places)
    near = study.pixels(train, rows.reshape(-1)).reshape(*rows.shape, *asked.shape[1:])
    queries = []
    for number, place in enumerate(places.tolist()):
        label = int(test.labels[place])
        tile = _tile(folder, f"query_{number}.png", asked[number], test, place)
        neighbors = [
            _tile(
                folder,
                f"query_{number}_neighbor_{rank}.png",
                near[number, rank],
                train,
                row,
                detail=f"{similarity[number, rank]:.2f}",
                right=bool(train.labels[row] == label),
            )
            for rank, row in enumerate(rows[number].tolist())
        ]
        queries.append(Query(tile, neighbors))
    return queries


def _tile(
    folder: Path,
    file: str,
    pixels: Images,
    one: Labelled,
    place: int,
    detail: str = "",
    right: bool | None = None,
) -> Tile:
    save_tile(folder / file, pixels)
    sample, name = int(one.ids[place]), one.classes[int(one.labels[place])]
    return Tile(file, name, detail, f"{name}: sample {sample}, {one.data.get_name(sample)}", right)


def _extremes(folder: Path, study: Study, found: Predictions, right: bool) -> list[Tile]:
    """Return the test images whose prediction is right (or wrong) and surest."""
    test, places = study.evaluation.test, most_confident(found, right, _EXTREMES)
    if not len(places):
        return []
    pixels = study.pixels(test, places)
    return [
        _judged(folder, pixels[number], test, found, place, number)
        for number, place in enumerate(places.tolist())
    ]


def _attention(folder: Path, study: Study, places: Ids, tiles: Sequence[Tile]) -> list[Query]:
    """Return where an encoder with attention looks in images whose tiles are drawn already."""
    stages = study.attention(places) if len(places) else []
    if not stages:
        return []
    pixels = study.pixels(study.evaluation.test, places)
    looked = []
    for number, tile in enumerate(tiles[: len(places)]):
        heat = []
        for stage, weights in zip((2, 3), stages, strict=True):
            file = f"{tile.file.removesuffix('.png')}_stage_{stage}.png"
            draw_heat(folder / file, pixels[number], weights[number])
            peak = f"{weights[number].max() * weights[number].numel():.1f} × mean"
            heat.append(Tile(file, f"stage {stage}", peak, f"stage {stage} over {tile.alt}"))
        looked.append(Query(tile, heat))
    return looked


def _judged(
    folder: Path, pixels: Images, test: Labelled, found: Predictions, place: int, number: int
) -> Tile:
    right = bool(found.place[place] == 0)
    file = f"{'best' if right else 'worst'}_{number}.png"
    tile = _tile(folder, file, pixels, test, place)
    taken = test.classes[int(found.predicted[place])]
    title = tile.title if right else f"{tile.title}, taken for {taken}"
    return Tile(file, title, f"{100 * found.confidence[place]:.0f} %", tile.alt, right)


def _per_class(found: Predictions, names: list[str]) -> list[dict[str, Any]]:
    """Return the accuracy of each class that has test samples, the worst one first."""
    totals = np.bincount(found.labels.numpy(), minlength=len(names)).tolist()
    rows = [
        {"name": name, "top1": top1, "samples": total}
        for name, top1, total in zip(names, found.per_class(), totals, strict=True)
        if top1 is not None
    ]
    return sorted(rows, key=lambda row: (row["top1"], row["name"]))


def _plane(folder: Path, study: Study, names: list[str]) -> dict[str, Any]:
    seed = study.evaluation.seed
    places, labels, method = projected(study.queries[0], study.evaluation.test.labels, seed)
    draw_plane(folder / "projection.png", places, labels, len(names))
    legend = list(zip(names, get_colors(len(names)), strict=True)) if has_legend(len(names)) else []
    return {"file": "projection.png", "method": method, "legend": legend}
