"""The plots of a run: what the network sees, and how the training went."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import SOFTWARE, check_replaceable, new_file
from fastmoco.errors import UsageError

Images = npt.NDArray[np.uint8]
"""(n, side, side, 3)."""
Metrics = Sequence[Mapping[str, Any]]
"""Rows of a run's metrics.jsonl."""

ZOOMED = 128  # pixels that a small view is enlarged to, about
GAP = 8
LEFT, TOP = 96, 40  # room for the names of the rows, and for the title
_DPI = 100
INK = "#333333"
LINE, MARK = "#1f5fa8", "#b5452c"
_WIDTH, _HEIGHT = 5, 3.2  # of a panel, inches


@dataclass(frozen=True)
class Curve:
    """A number of the metrics over the epochs.

    Attributes:
        key: its name in the rows.
        title: what is drawn, with its unit.
        kind: of the rows that it is taken from.
        scale: from the rows' unit to the drawn one.
        from_zero: whether the axis begins at 0.
    """

    key: str
    title: str
    kind: str = "step"
    scale: float = 1.0
    from_zero: bool = False

    def points(self, metrics: Metrics) -> tuple[list[float], list[float]]:
        """Return epochs and values, as far as there are finite ones."""
        rows = [row for row in metrics if row.get("kind") == self.kind]
        found = [
            (row["epoch"], self.scale * row[self.key])
            for row in rows
            if row.get(self.key) is not None and math.isfinite(row[self.key])
        ]
        return [epoch for epoch, _ in found], [value for _, value in found]


CURVES = (
    Curve("loss", "Loss (InfoNCE)"),
    Curve("pretext_top1", "Pretext top-1, %", scale=100),
    Curve("knn_top1", "kNN top-1, %", kind="epoch"),
    Curve("lr", "Learning rate", from_zero=True),
    Curve("images_per_s", "Images per second", from_zero=True),
    Curve("data_wait_percent", "Waiting for data, % of the time", from_zero=True),
)


def check_plot(path: Path) -> None:
    """Refuse the name of a plot before the work that it takes; see `check_replaceable`.

    Raises:
        UsageError: also if matplotlib is not installed.
    """
    check_replaceable(path)
    if not find_spec("matplotlib"):
        raise UsageError("Plots need matplotlib: pip install 'fastmoco[report]'.")


def draw_views(path: Path, rows: Mapping[str, Images], title: str) -> None:
    """Draw images as a grid, one column a sample, every pixel of a view still itself.

    Args:
        path: of the PNG.
        rows: the images of each row by its name, all of one shape.
        title: above the grid.
    """
    grid = get_grid(list(rows.values()))
    height, width = grid.shape[0] + TOP, grid.shape[1] + LEFT
    figure = make_figure(width / _DPI, height / _DPI)
    figure.figimage(grid, xo=LEFT, yo=0, origin="upper")
    figure.text(LEFT / width, 1 - TOP / height / 2, title, va="center", color=INK)
    pitch = (grid.shape[0]) / len(rows)
    for number, name in enumerate(rows):
        y = 1 - (TOP + (number + 0.5) * pitch - GAP / 2) / height
        figure.text((LEFT - 12) / width, y, name, ha="right", va="center", color=INK)
    _save(figure, path, _DPI)


def get_zoom(side: int) -> int:
    """Return the whole number of times that views of a side are enlarged."""
    return max(1, ZOOMED // side)


def get_grid(rows: Sequence[Images]) -> Images:
    """Return the zoomed images on white, a gap after each and below each."""
    zoom = get_zoom(rows[0].shape[1])
    zoomed = np.stack(rows).repeat(zoom, axis=2).repeat(zoom, axis=3)
    padded = np.pad(zoomed, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, samples, height, width, _ = padded.shape
    return padded.transpose(0, 2, 1, 3, 4).reshape(count * height, samples * width, 3)


def curves_in(metrics: Metrics) -> list[Curve]:
    """Return the curves that the metrics have points of."""
    return [curve for curve in CURVES if curve.points(metrics)[0]]


def draw_curves(path: Path, metrics: Metrics, queue: int, title: str) -> None:
    """Draw loss, kNN, learning rate, speed, ... of a run over its epochs: what there is of them.

    Args:
        path: of the PNG.
        metrics: see `Metrics`.
        queue: number of negative keys K: chance is a loss of log(K + 1).
        title: above the panels.
    """
    curves = curves_in(metrics)
    lines = max(1, math.ceil(len(curves) / 2))
    figure = make_figure(2 * _WIDTH, lines * _HEIGHT)
    figure.suptitle(title, x=0.015, ha="left", color=INK)
    panels = figure.subplots(lines, 2, sharex=True, squeeze=False).ravel()
    for axes, curve in zip(panels, curves, strict=False):
        _panel(axes, metrics, curve, queue)
    for axes in panels[len(curves) :]:
        axes.set_axis_off()
    for axes in panels[max(0, len(curves) - 2) : len(curves)]:
        axes.tick_params(labelbottom=True)  # also above a place that stays empty
        axes.set_xlabel("epoch", color=INK)
    figure.tight_layout()
    _save(figure, path, _DPI)


def draw_curve(path: Path, metrics: Metrics, queue: int, curve: Curve) -> None:
    """Draw one curve alone, as sharp as a telephone's screen; see `draw_curves`."""
    figure = make_figure(_WIDTH, _HEIGHT)
    axes = figure.subplots()
    _panel(axes, metrics, curve, queue)
    axes.set_xlabel("epoch", color=INK)
    figure.tight_layout()
    _save(figure, path, 2 * _DPI)


def _save(figure: Any, path: Path, dpi: int) -> None:
    with new_file(path) as aside:
        figure.savefig(aside, dpi=dpi, metadata={"Software": SOFTWARE})


def make_figure(width: float, height: float) -> Any:
    """Return a figure of that size in inches, drawn by Agg: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _panel(axes: Any, metrics: Metrics, curve: Curve, queue: int) -> None:
    x, y = curve.points(metrics)
    # Few points are seen as such, and one alone makes no line.
    marker = "o" if curve.kind == "epoch" or len(x) == 1 else ""
    axes.plot(x, y, color=LINE, linewidth=1.6, marker=marker, markersize=4)
    style_axes(axes, curve.title)
    if curve.from_zero:
        axes.set_ylim(0, 1.05 * max(y) or 1)
    if curve.key == "loss":
        _mark_chance(axes, math.log(queue + 1))


def style_axes(axes: Any, title: str) -> None:
    """Give a panel its title, a pale grid and no frame."""
    axes.set_title(title, loc="left", fontsize=10, color=INK)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=INK, labelsize=9)


def _mark_chance(axes: Any, chance: float) -> None:
    axes.margins(y=0.12)  # room for the words above the line
    axes.axhline(chance, color=MARK, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"chance: log(K + 1) = {chance:.2f}",
        (1, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=MARK,
    )
