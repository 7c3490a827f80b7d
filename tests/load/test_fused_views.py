"""The compiled pass against torchvision's functions on float64, and against a naive rendering."""

import os
import subprocess
import sys

import numpy as np
import pytest
import torch
import torchvision_executor as oracle
from hypothesis import given, settings
from hypothesis import strategies as st

from fastmoco.config.recipe import View
from fastmoco.core.rng import uniforms
from fastmoco.load.fused_views import render_views, table
from fastmoco.load.view_params import ViewParams, central, draw

JITTER = (0.4, 0.4, 0.4, 0.1)
OPERATORS = {  # and the levels of 255 by which they may differ
    "crop": (View(), 0.02),
    "flip": (View(flip=1), 0.02),
    "center": (View(crop="center"), 0.02),
    "whole": (View(crop="none"), 0.02),
    "brightness": (View(jitter=(0.4, 0, 0, 0), jitter_p=1), 0.02),
    "contrast": (View(jitter=(0, 0.4, 0, 0), jitter_p=1), 0.02),
    "saturation": (View(jitter=(0, 0, 0.4, 0), jitter_p=1), 0.02),
    "hue": (View(jitter=(0, 0, 0, 0.1), jitter_p=1), 0.1),
    "any hue": (View(jitter=(0, 0, 0, 0.5), jitter_p=1), 0.1),
    "grayscale": (View(grayscale=1), 0.02),
    "blur": (View(blur=1), 0.02),
    "solarize": (View(solarize=1), 0.02),
    "all": (View(jitter=JITTER, jitter_p=0.8, grayscale=0.2, blur=0.5, flip=0.5), 0.1),
}
NORMAL = np.ones(3, np.float32), np.zeros(3, np.float32)


def rendered(images: list[np.ndarray], params: ViewParams, side: int) -> np.ndarray:
    starts = np.cumsum([0, *(image.size for image in images)])[:-1]
    sizes = np.array([image.shape[:2] for image in images])
    out = np.full((len(images), side, side, 3), np.nan, np.float32)
    pixels = np.concatenate([image.reshape(-1) for image in images])
    render_views(pixels, starts, sizes, table(params), np.arange(len(images)), *NORMAL, out)
    return out


def by_torchvision(image: np.ndarray, params: ViewParams, i: int, side: int) -> np.ndarray:
    """Draw a view without rounding, in levels of 255."""
    levels = torch.from_numpy(image).permute(2, 0, 1).double()
    return (255 * oracle.draw(levels / 255, params, i, side)).permute(1, 2, 0).numpy()


@pytest.mark.parametrize(
    ("side", "size"), [(32, (32, 32)), (96, (130, 90)), (224, (300, 410)), (224, (60, 40))], ids=str
)
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_torchvisions(operator, side, size, make_picture):
    view, allowed = OPERATORS[operator]
    images = [np.array(make_picture(i, size[::-1])) for i in range(6)]
    params = draw(view, uniforms(1, 0, 6, 1)[0], np.tile([size], (6, 1)))
    found = rendered(images, params, side)
    for i, image in enumerate(images):
        gap = np.abs(found[i] - by_torchvision(image, params, i, side))
        # A level at the threshold falls to one side by its last bit: few of them.
        wrong = (gap > allowed).mean() if operator == "solarize" else gap.max()
        assert wrong <= (1e-3 if operator == "solarize" else allowed)


def naive(image: np.ndarray, crop: list[int], side: int) -> np.ndarray:
    """Resize a crop by triangles, pixel by pixel in float64, and scale it up where it is small."""
    top, left, height, width = crop

    def weights(length: int) -> np.ndarray:
        scale = length / side
        centers, support = (np.arange(side) + 0.5) * scale, max(scale, 1.0)
        distance = np.abs(np.arange(length) + 0.5 - centers[:, None]) / support
        triangle = np.maximum(1 - distance, 0)
        return triangle / triangle.sum(axis=1, keepdims=True)

    cut = image[top : top + height, left : left + width].astype(np.float64)
    return np.einsum("yh,hwc,xw->yxc", weights(height), cut, weights(width))


@settings(max_examples=150)
@given(st.data())
def test_any_crop_of_any_size_is_drawn(data):
    height, width = data.draw(st.integers(1, 50)), data.draw(st.integers(1, 3000))
    if data.draw(st.booleans()):
        height, width = width, height
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    crop = [data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w]
    side = data.draw(st.integers(1, 64))
    image = np.random.default_rng(h * w).integers(0, 256, (height, width, 3), dtype=np.uint8)
    params = central(np.array([[height, width]]), 1.0)
    params.crop[0] = crop
    plain = rendered([image], params, side)[0]
    assert np.abs(plain - naive(image, crop, side)).max() < 0.02
    # All else at once, to its limits: finite and in range, however small the view.
    limits = draw(
        View(jitter=(1, 1, 1, 0.5), jitter_p=1, blur=1, blur_sigma=(0.1, 9), solarize=0.5),
        uniforms(side, 0, 1, 1)[0],
        np.array([[height, width]]),
    )
    limits.crop[0] = crop
    drawn = rendered([image], limits, side)
    assert np.isfinite(drawn).all() and drawn.min() >= -1e-3 and drawn.max() <= 255.001


def test_normalization_comes_last(make_picture):
    image = np.array(make_picture(1, (40, 30)))
    params = central(np.array([image.shape[:2]]), 1.0)
    scale, shift = np.array([[0.1, 0.2, 0.3], [1, 2, 3]], np.float32)
    out = np.empty((1, 16, 16, 3), np.float32)
    where = np.zeros(1, np.int64), np.array([image.shape[:2]])
    render_views(image.reshape(-1), *where, table(params), np.arange(1), scale, shift, out)
    np.testing.assert_allclose(out, rendered([image], params, 16) * scale + shift, atol=1e-4)


def test_an_image_is_drawn_alike_in_any_company(make_picture):
    """Bit for bit: whatever else a thread draws, and wherever the image lies."""
    images = [np.array(make_picture(i, (50 + i, 40))) for i in range(5)]
    sizes = np.array([image.shape[:2] for image in images])
    params = draw(OPERATORS["all"][0], uniforms(3, 0, 5, 1)[0], sizes)
    together = rendered(images, params, 24)
    for i, image in enumerate(images):
        alone = rendered([image], params.rows(slice(i, i + 1)), 24)
        assert np.array_equal(alone[0], together[i])


COLD = """
import os
import subprocess
import sys

import numpy as np
from fastmoco.load.fused_views import render_views, table
from fastmoco.load.view_params import central

image, out = np.full((8, 8, 3), 7, np.uint8), np.empty((1, 4, 4, 3), np.float32)
where = np.zeros(1, np.int64), np.array([[8, 8]]), table(central(np.array([[8, 8]]), 1.0))
one = np.ones(3, np.float32)
render_views(image.reshape(-1), *where, np.arange(1), one, 0 * one, out)
print(out.min(), out.max())
"""


@pytest.mark.slow
@pytest.mark.parametrize("writable", [True, False])
def test_compiled_functions_are_kept_where_they_can_be(tmp_path, writable):
    cache = tmp_path / "cache" if writable else "/dev/null/cache"
    environment = {**os.environ, "XDG_CACHE_HOME": str(cache)}
    environment.pop("NUMBA_CACHE_DIR", None)
    done = subprocess.run(
        [sys.executable, "-c", COLD], env=environment, capture_output=True, text=True, check=True
    )
    low, high = map(float, done.stdout.split())
    assert low == pytest.approx(7) and high == pytest.approx(7)
    assert ("compiles anew at each start" in done.stderr) is not writable
    if writable:
        assert list((tmp_path / "cache/fastmoco").rglob("*.nbc"))
