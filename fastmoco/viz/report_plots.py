"""The drawings of the report."""

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image

from fastmoco.core.rng import Ids
from fastmoco.plots import (
    INK,
    LINE,
    MARK,
    Images,
    draw_views,
    get_grid,
    make_figure,
    style_axes,
)

_DPI = 150
_CHANNELS = 8
_NAMED = 30  # classes whose names fit beside a matrix
_COUNTED = 20  # classes whose counts fit into its cells
_COLOURED = 20  # classes that colors can tell apart
_LONGEST = 16  # letters of a name
_PANEL = (5, 3.6)  # inches
_RATES = 5  # whose names fit into a legend
_PALE = "#b9c4d0"
_HEAT = 0.6  # of an image's color that is the attention's
_DECADE = 10  # from which spread on numbers lie on a logarithmic axis
Drawn = Sequence[float | None]


@dataclass(frozen=True)
class Tile:
    """An image with words below it.

    Attributes:
        file: its PNG.
        title: the class, or what it was taken for.
        detail: similarity or confidence.
        alt: what a reader hears who does not see it.
        right: whether the class is the true one; None: there is no question.
    """

    file: str
    title: str
    detail: str
    alt: str
    right: bool | None = None


def save_tile(path: Path, pixels: npt.NDArray[np.uint8]) -> None:
    """Write a (side, side, 3) image as it is."""
    Image.fromarray(pixels).save(path)


def draw_filters(path: Path, weight: torch.Tensor) -> None:
    """Draw the (n, C, k, k) filters of a first convolution in color, each over its own range."""
    filters = weight.float().cpu().permute(0, 2, 3, 1).expand(-1, -1, -1, 3).numpy()
    low, high = (bound(filters, axis=(1, 2, 3), keepdims=True) for bound in (np.min, np.max))
    levels = (255 * (filters - low) / np.maximum(high - low, 1e-12)).round().astype(np.uint8)
    columns = math.gcd(len(levels), 8)
    Image.fromarray(get_grid(list(levels.reshape(-1, columns, *levels.shape[1:])))).save(path)


def draw_maps(path: Path, maps: Mapping[str, torch.Tensor]) -> None:
    """Draw the channels that vary most over the image, a row for each of the (C, h, w) maps."""
    side = max(found.shape[-1] for found in maps.values())
    rows = {f"{name}\n{_size(found)}": _colored(found, side) for name, found in maps.items()}
    draw_views(path, rows, f"The {_CHANNELS} channels that vary most, each over its own range")


def draw_heat(path: Path, pixels: npt.NDArray[np.uint8], weights: torch.Tensor) -> None:
    """Draw (h, w) attention over a (side, side, 3) image, from none to its largest weight."""
    from matplotlib import colormaps

    side = len(pixels)
    shares = torch.nn.functional.interpolate(
        weights[None, None] / weights.max(), size=side, mode="bilinear"
    )[0, 0]
    heat = 255 * colormaps["inferno"](shares.numpy())[..., :3]
    # On gray, for the image's own colors would be taken for heat.
    gray = pixels.mean(axis=-1, keepdims=True)
    save_tile(path, (_HEAT * heat + (1 - _HEAT) * gray).round().astype(np.uint8))


def _size(found: torch.Tensor) -> str:
    return "×".join(map(str, found.shape))  # without spaces: there is room for ten letters


def _colored(found: torch.Tensor, side: int) -> Images:
    from matplotlib import colormaps

    order = found.flatten(1).std(dim=1, correction=0).argsort(descending=True, stable=True)
    chosen = torch.nn.functional.interpolate(found[order[:_CHANNELS], None], size=side)[:, 0]
    low, high = chosen.amin(dim=(1, 2), keepdim=True), chosen.amax(dim=(1, 2), keepdim=True)
    shares = ((chosen - low) / (high - low).clamp_min(1e-12)).numpy()
    colored: Images = colormaps["viridis"](shares, bytes=True)[..., :3]
    return colored


def draw_confusion(path: Path, confusion: Ids, names: Sequence[str]) -> None:
    """Draw the (n, n) counts of true and predicted classes as shares of each true class."""
    count = len(names)
    shares = confusion / np.maximum(confusion.sum(axis=1, keepdims=True), 1)
    side = 2.2 + (0.44 * count if count <= _NAMED else 5)
    figure = make_figure(side, side)
    axes = figure.subplots()
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xlabel("predicted", color=INK)
    axes.set_ylabel("true", color=INK)
    if count <= _NAMED:
        _name_both(axes, [_shortened(name) for name in names])
    if count <= _COUNTED:
        _count_cells(axes, confusion, shares)
    with warnings.catch_warnings():
        # A script that the font lacks is drawn as boxes; the table on the page has its letters.
        warnings.filterwarnings("ignore", "Glyph .* missing from")
        figure.tight_layout()
        figure.savefig(path, dpi=_DPI)


def _name_both(axes: Any, names: Sequence[str]) -> None:
    # A dollar sign in a name is no formula.
    axes.set_xticks(range(len(names)), names, rotation=45, ha="right", parse_math=False)
    axes.set_yticks(range(len(names)), names, parse_math=False)
    axes.tick_params(colors=INK, labelsize=9)


def _count_cells(axes: Any, confusion: Ids, shares: npt.NDArray[np.float64]) -> None:
    for (row, column), number in np.ndenumerate(confusion):
        color = "white" if shares[row, column] > 0.5 else INK
        style = {"ha": "center", "va": "center", "fontsize": 8, "color": color}
        axes.text(column, row, str(number), **style)


def _shortened(name: str) -> str:
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"


def draw_plane(path: Path, places: npt.NDArray[np.float64], labels: Ids, classes: int) -> None:
    """Draw (n, 2) places as points in the colors of their classes."""
    figure = make_figure(6.4, 6.4)
    axes = figure.add_axes((0, 0, 1, 1))
    colors = np.array(get_colors(classes))[labels]
    axes.scatter(places[:, 0], places[:, 1], c=colors, s=18, alpha=0.75, linewidths=0)
    axes.set_axis_off()
    axes.margins(0.03)
    figure.savefig(path, dpi=_DPI)


def draw_precision(
    path: Path, curve: Sequence[Mapping[str, float]], threshold: float, wanted: float | None
) -> None:
    """Draw the precision out of fold against the coverage, and where the threshold cuts.

    Args:
        path: of the PNG.
        curve: points of `coverage` and `precision`, shares, by falling `threshold`.
        threshold: that was chosen.
        wanted: the precision that it was chosen for; None: it was chosen by hand.
    """
    figure = make_figure(*_PANEL)
    axes = figure.subplots()
    coverage, precision = ([100 * p[key] for p in curve] for key in ("coverage", "precision"))
    axes.plot(coverage, precision, color=LINE, linewidth=1.6)
    kept = [place for place, point in enumerate(curve) if point["threshold"] >= threshold]
    if kept:
        place = kept[-1]
        axes.plot(coverage[place], precision[place], "o", color=MARK)
        words = f"threshold {threshold:.3f}"
        axes.axvline(coverage[place], color=MARK, linewidth=1, linestyle="--", label=words)
    if wanted is not None:
        words = f"wanted: {100 * wanted:g} %"
        axes.axhline(100 * wanted, color=INK, linewidth=1, linestyle=":", label=words)
    style_axes(axes, "Right of the labels above a threshold, %")
    axes.set_xlabel("labels above it, % (out of fold)", color=INK)
    axes.set_xlim(0, 100)
    axes.set_ylim(top=101)
    axes.legend(fontsize=9, labelcolor=INK, frameon=False, loc="lower left")
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)


def draw_reliability(
    path: Path, bins: Mapping[str, Sequence[Mapping[str, float]]], name: str
) -> None:
    """Draw accuracy against confidence, by bins, before and after calibration.

    Args:
        path: of the PNG.
        bins: for "before" and "after" those that hold samples, each with its `samples`, mean
            `confidence` and `accuracy`, shares.
        name: of the classifier.
    """
    figure = make_figure(*_PANEL)
    axes = figure.subplots()
    axes.plot([0, 100], [0, 100], color=INK, linewidth=1, linestyle=":", label="as sure as right")
    for when, color in (("before", MARK), ("after", LINE)):
        x, y = ([100 * row[key] for row in bins[when]] for key in ("confidence", "accuracy"))
        most = max(row["samples"] for row in bins[when])
        sizes = [12 + 90 * row["samples"] / most for row in bins[when]]
        axes.plot(x, y, color=color, linewidth=1.2)
        axes.scatter(
            x, y, s=sizes, color=color, alpha=0.7, linewidths=0, label=f"{when} calibration"
        )
    style_axes(axes, "Right out of fold, %")
    axes.set_title(_shortened(name), loc="right", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel("confidence, %", color=INK)
    axes.set_xlim(0, 102)
    axes.set_ylim(0, 104)
    axes.legend(fontsize=9, labelcolor=INK, frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)


def draw_accuracy(path: Path, kinds: Mapping[str, Sequence[tuple[int, float]]]) -> None:
    """Draw accuracy against the number of labels, a line through the means of each classifier.

    Args:
        path: of the PNG.
        kinds: pairs of labels and top-1, percent, for each classifier, in words.
    """
    from matplotlib.ticker import LogLocator, StrMethodFormatter

    figure = make_figure(*_PANEL)
    axes = figure.subplots()
    every = [count for points in kinds.values() for count, _ in points]
    for color, (name, points) in zip(get_colors(len(kinds)), kinds.items(), strict=True):
        x, y = zip(*points, strict=True)
        axes.scatter(x, y, s=22, color=color, alpha=0.7, linewidths=0)
        counts = sorted(set(x))
        means = [np.mean([top1 for count, top1 in points if count == one]) for one in counts]
        axes.plot(counts, means, color=color, linewidth=1.4, marker=".", label=name)
    if max(every) > _DECADE * min(every):
        axes.set_xscale("log")
        axes.minorticks_off()
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    axes.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    style_axes(axes, "Top-1 of the test images, %")
    axes.set_xlabel("labels trained on", color=INK)
    axes.legend(fontsize=9, labelcolor=INK, frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)


def draw_training(
    path: Path, x: Sequence[int], unit: str, test: Mapping[str, Drawn], train: Drawn, title: str
) -> None:
    """Draw how a classifier's accuracy came about.

    Args:
        path: of the PNG.
        x: epochs or steps.
        unit: which.
        test: top-1 of the test images for each learning rate, the chosen one first; percent, None
            where there was none.
        train: of the images that the chosen one was trained on, as they were shown.
        title: what was trained.
    """
    figure = make_figure(*_PANEL)
    axes = figure.subplots()
    mark = "o" if len(x) == 1 else ""
    few = len(test) <= _RATES
    colors = get_colors(len(test)) if few else [_PALE] * len(test)
    for place, (name, of) in enumerate(test.items()):
        words = f"test, {name}" if few or place == 0 else "test, other rates"
        style = {"color": colors[place], "linewidth": 1, "zorder": 2}
        if place == 0:
            style = {"color": LINE, "linewidth": 1.8, "zorder": 3}
        label = words if few or place < 2 else None
        axes.plot(x, _finite(of), marker=mark, label=label, **style)
    axes.plot(x, _finite(train), color=MARK, linestyle="--", marker=mark, label="training images")
    style_axes(axes, "Top-1, %")
    axes.set_title(title, loc="right", fontsize=9, color=INK, parse_math=False)
    axes.set_xlabel(unit, color=INK)
    axes.legend(fontsize=9, labelcolor=INK, edgecolor="none", framealpha=0.8)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)


def _finite(values: Drawn) -> list[float]:
    return [math.nan if value is None else value for value in values]


def get_colors(classes: int) -> list[str]:
    """Return a color `#rrggbb` a class; they differ clearly up to 20."""
    from matplotlib import colormaps
    from matplotlib.colors import to_hex

    if classes > _COLOURED:
        return [to_hex(colormaps["turbo"](number / classes)) for number in range(classes)]
    return [to_hex(colormaps["tab10" if classes <= 10 else "tab20"](n)) for n in range(classes)]


def has_legend(classes: int) -> bool:
    """Return whether a legend would help."""
    return classes <= _COLOURED
