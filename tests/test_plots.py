"""The plots: the grid holds the very pixels, the curves the very numbers."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.plots import GAP, LEFT, TOP, curves_in, draw_curves, draw_views, get_zoom

SIDE = 16
ZOOM = get_zoom(SIDE)
METRICS = [
    {"kind": "epoch", "epoch": 0, "loss": None, "knn_top1": 40.0},
    {"kind": "step", "epoch": 0.5, "loss": 5.0, "lr": 0.06, "images_per_s": 300.0},
    {"kind": "step", "epoch": 1.0, "loss": 4.5, "lr": 0.03, "images_per_s": 310.0},
    {"kind": "epoch", "epoch": 1, "loss": 4.7, "knn_top1": 55.0},
]


def tile(plot: np.ndarray, row: int, column: int) -> np.ndarray:
    """Cut an image out of the grid, back at its own size."""
    pitch = ZOOM * SIDE + GAP
    top, left = TOP + row * pitch, LEFT + column * pitch
    return plot[top : top + ZOOM * SIDE : ZOOM, left : left + ZOOM * SIDE : ZOOM]


@pytest.fixture
def rows() -> dict[str, np.ndarray]:
    rng = np.random.default_rng(0)
    shape = (5, SIDE, SIDE, 3)
    return {
        name: rng.integers(0, 256, shape, np.uint8) for name in ("original", "view 1", "view 2")
    }


def test_the_grid_holds_every_pixel(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    draw_views(tmp_path / "views.png", rows, "title")
    plot = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    pitch = ZOOM * SIDE + GAP
    assert plot.shape == (TOP + 3 * pitch, LEFT + 5 * pitch, 3)
    for number, images in enumerate(rows.values()):
        for column, image in enumerate(images):
            np.testing.assert_array_equal(tile(plot, number, column), image)


def test_title_and_row_names_are_drawn(rows: dict[str, np.ndarray], tmp_path: Path) -> None:
    draw_views(tmp_path / "views.png", rows, "title")
    plot = np.asarray(Image.open(tmp_path / "views.png").convert("L"))
    assert plot[:TOP].min() < 128, "the title"
    pitch = ZOOM * SIDE + GAP
    for row in range(3):
        name = plot[TOP + row * pitch : TOP + (row + 1) * pitch, :LEFT]
        assert name.min() < 128, f"the name of row {row}"
        assert (name[:, 0] == 255).all(), "it is not cut off"


def test_curves_open_and_are_not_blank(tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", METRICS, 1025, "title")
    with Image.open(tmp_path / "curves.png") as plot:
        assert plot.format == "PNG"
        assert plot.size == (1000, 640)
        assert np.asarray(plot.convert("L")).min() < 128


def test_curves_draw_the_numbers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from matplotlib.axes import Axes

    drawn: dict[tuple[float, ...], list[float]] = {}
    levels = []
    plot, line = Axes.plot, Axes.axhline

    def note(self, x, y, **style):  # type: ignore[no-untyped-def]
        drawn[tuple(y)] = x
        return plot(self, x, y, **style)

    def note_line(self, y, **style):  # type: ignore[no-untyped-def]
        levels.append(y)
        return line(self, y, **style)

    monkeypatch.setattr(Axes, "plot", note)
    monkeypatch.setattr(Axes, "axhline", note_line)
    draw_curves(tmp_path / "curves.png", METRICS, 1025, "title")
    assert drawn == {
        (5.0, 4.5): [0.5, 1.0],
        (40.0, 55.0): [0, 1],
        (0.06, 0.03): [0.5, 1.0],
        (300.0, 310.0): [0.5, 1.0],
    }
    assert levels == [pytest.approx(np.log(1025))]


def test_a_run_without_monitor_has_curves_too(tmp_path: Path) -> None:
    draw_curves(tmp_path / "curves.png", [r for r in METRICS if r["kind"] == "step"], 64, "title")
    assert (tmp_path / "curves.png").is_file()


def test_more_numbers_make_more_panels_and_none_make_none(tmp_path: Path) -> None:
    more = [row | {"pretext_top1": 0.25, "data_wait_percent": 3.0} for row in METRICS]
    titles = [curve.title for curve in curves_in(more)]
    assert len(titles) == 6 and len(curves_in(METRICS)) == 4
    (pretext,) = [curve for curve in curves_in(more) if curve.key == "pretext_top1"]
    assert pretext.points(more) == ([0.5, 1.0], [25.0, 25.0]), "a share, drawn in percent"
    draw_curves(tmp_path / "curves.png", more, 1024, "title")
    with Image.open(tmp_path / "curves.png") as plot:
        assert plot.size == (1000, 960)
    odd = [{"kind": "step", "epoch": 1, "loss": float("nan"), "lr": 0.0}, {"kind": "bad"}]
    assert [curve.key for curve in curves_in(odd)] == ["lr"]
    for rows in (odd, []):
        draw_curves(tmp_path / "few.png", rows, 1024, "title")
        assert (tmp_path / "few.png").is_file()
