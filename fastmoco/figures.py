"""The two plots of a run: what the network sees, and how the training went."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Images = npt.NDArray[np.uint8]
"""(n, side, side, 3)."""

ZOOMED = 128  # pixels that a small view is enlarged to, about
GAP = 8
LEFT, TOP = 96, 40  # room for the names of the rows, and for the title
_DPI = 100
_INK, _LINE, _CHANCE = "#333333", "#1f5fa8", "#b5452c"


def draw_views(path: Path, rows: Mapping[str, Images], title: str) -> None:
    """Draw images as a grid, one column a sample, every pixel of a view still itself.

    Args:
        path: of the PNG.
        rows: the images of each row by its name, all of one shape.
        title: above the grid.
    """
    grid = _grid(list(rows.values()))
    height, width = grid.shape[0] + TOP, grid.shape[1] + LEFT
    figure = _figure(width / _DPI, height / _DPI)
    figure.figimage(grid, xo=LEFT, yo=0, origin="upper")
    figure.text(LEFT / width, 1 - TOP / height / 2, title, va="center", color=_INK)
    pitch = (grid.shape[0]) / len(rows)
    for number, name in enumerate(rows):
        y = 1 - (TOP + (number + 0.5) * pitch - GAP / 2) / height
        figure.text((LEFT - 12) / width, y, name, ha="right", va="center", color=_INK)
    figure.savefig(path, dpi=_DPI)


def zoom_of(side: int) -> int:
    """Return the whole number of times that views of a side are enlarged."""
    return max(1, ZOOMED // side)


def _grid(rows: Sequence[Images]) -> Images:
    """Return the zoomed images on white, a gap after each and below each."""
    zoom = zoom_of(rows[0].shape[1])
    zoomed = np.stack(rows).repeat(zoom, axis=2).repeat(zoom, axis=3)
    padded = np.pad(zoomed, ((0, 0), (0, 0), (0, GAP), (0, GAP), (0, 0)), constant_values=255)
    count, samples, height, width, _ = padded.shape
    return padded.transpose(0, 2, 1, 3, 4).reshape(count * height, samples * width, 3)


def draw_curves(path: Path, metrics: Sequence[Mapping[str, Any]], queue: int, title: str) -> None:
    """Draw loss, learning rate, kNN and speed of a run over its epochs.

    Args:
        path: of the PNG.
        metrics: rows of the run's metrics.jsonl.
        queue: number of negative keys K: chance is a loss of log(K + 1).
        title: above the panels.
    """
    steps = [row for row in metrics if row["kind"] == "step"]
    monitored = [row for row in metrics if "knn_top1" in row]
    figure = _figure(10, 6.4)
    figure.suptitle(title, x=0.015, ha="left", color=_INK)
    (loss, knn), (rate, speed) = figure.subplots(2, 2, sharex=True)
    _panel(loss, steps, "loss", "Loss (InfoNCE)")
    _mark_chance(loss, math.log(queue + 1))
    _panel(knn, monitored, "knn_top1", "kNN top-1, %", marker="o")
    _panel(rate, steps, "lr", "Learning rate")
    _panel(speed, steps, "images_per_s", "Images per second")
    for axes in (rate, speed):
        axes.set_ylim(bottom=0)
        axes.set_xlabel("epoch", color=_INK)
    figure.tight_layout()
    figure.savefig(path, dpi=_DPI)


def _figure(width: float, height: float) -> Any:
    """Return a figure of that size in inches, drawn by Agg: no display, no global state."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), dpi=_DPI, facecolor="white")
    FigureCanvasAgg(figure)
    return figure


def _panel(
    axes: Any, rows: Sequence[Mapping[str, Any]], key: str, title: str, marker: str = ""
) -> None:
    x, y = [row["epoch"] for row in rows], [row[key] for row in rows]
    axes.plot(x, y, color=_LINE, linewidth=1.6, marker=marker, markersize=4)
    axes.set_title(title, loc="left", fontsize=10, color=_INK)
    axes.grid(color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.tick_params(colors=_INK, labelsize=9)


def _mark_chance(axes: Any, chance: float) -> None:
    axes.margins(y=0.12)  # room for the words above the line
    axes.axhline(chance, color=_CHANCE, linewidth=1.2, linestyle="--")
    axes.annotate(
        f"chance: log(K + 1) = {chance:.2f}",
        (1, chance),
        xycoords=("axes fraction", "data"),
        xytext=(0, 3),
        textcoords="offset points",
        ha="right",
        fontsize=9,
        color=_CHANCE,
    )
