"""Augmentation numbers: the same however they are sliced, distributed as torchvision's."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy import stats
from torchvision.transforms import v2
from torchvision.transforms.v2 import functional as F

from fastmoco.config.recipe import View
from fastmoco.core.rng import DRAWS, uniforms
from fastmoco.load.view_params import ViewParams, central, color_maps, draw

MANY = 4000
COLOUR = {"jitter": (0.4, 0.3, 0.2, 0.1), "jitter_p": 0.8, "grayscale": 0.2}
FULL = View(scale=(0.2, 1), **COLOUR, blur=0.5, solarize=0.3)

sides = st.integers(1, 6000)
sizes_of_images = st.lists(st.tuples(sides, sides), min_size=1, max_size=20)


def table(*sizes: tuple[int, int]) -> np.ndarray:
    return np.array(sizes, dtype=np.int64)


def drawn(
    view: View, size: tuple[int, int] = (90, 120), n: int = MANY, seed: int = 1
) -> ViewParams:
    return draw(view, uniforms(seed, 0, n, 1)[0], np.tile(table(size), (n, 1)))


@given(st.integers(0, 2**40), st.integers(1, 40), st.integers(1, 3), st.data())
def test_a_slice_of_the_stream_is_the_stream(
    first: int, count: int, views: int, data: st.DataObject
) -> None:
    start = data.draw(st.integers(0, count - 1))
    length = data.draw(st.integers(1, count - start))
    stream = uniforms(11, first, count, views)
    assert stream.shape == (views, count, DRAWS)
    assert np.array_equal(
        uniforms(11, first + start, length, views), stream[:, start : start + length]
    )


def test_the_stream_is_numpys_own() -> None:
    key = np.array([5, 0x766965777300], dtype=np.uint64)
    expected = np.random.Generator(np.random.Philox(key=key)).random((6, 2, DRAWS))
    assert np.array_equal(uniforms(5, 0, 6, 2), expected.transpose(1, 0, 2))


def test_the_stream_is_uniform() -> None:
    u = uniforms(3, 10**9, 2000, 2)
    assert stats.kstest(u.ravel(), "uniform").pvalue > 0.01
    assert all(stats.kstest(u[..., i].ravel(), "uniform").pvalue > 1e-4 for i in range(DRAWS))


def test_views_positions_and_seeds_share_no_number() -> None:
    streams = [uniforms(0, 0, 50, 2), uniforms(0, 50, 50, 2), uniforms(1, 0, 50, 2)]
    assert len(np.unique(streams)) == 3 * 50 * 2 * DRAWS


@pytest.mark.parametrize("scale", [(0.2, 1.0), (0.08, 1.0)])
@pytest.mark.parametrize("size", [(90, 120), (200, 61), (500, 375)])
def test_crops_are_distributed_as_torchvisions(
    scale: tuple[float, float], size: tuple[int, int]
) -> None:
    torch.manual_seed(0)
    image, crop = torch.empty(3, *size), v2.RandomResizedCrop(8, scale=scale)
    found = (crop.make_params([image]) for _ in range(MANY))
    theirs = np.array([[p["top"], p["left"], p["height"], p["width"]] for p in found])
    ours = drawn(View(scale=scale), size).crop

    def measures(crops: np.ndarray) -> list[np.ndarray]:
        top, left, height, width = crops.T.astype(float)
        room = top / np.maximum(size[0] - height, 1), left / np.maximum(size[1] - width, 1)
        return [height * width, width / height, *room]

    for a, b in zip(measures(ours), measures(theirs), strict=True):
        assert stats.ks_2samp(a, b).pvalue > 0.005


@given(st.integers(2, 300), st.integers(3, 20), st.booleans())
def test_the_fallback_of_extreme_shapes_is_torchvisions(short: int, times: int, tall: bool) -> None:
    size = (short * times, short) if tall else (short, short * times)
    scale = (0.9, 1.0)  # no crop of this area and a ratio of 3/4 to 4/3 fits in
    params = v2.RandomResizedCrop(8, scale=scale).make_params([torch.empty(1, *size)])
    expected = [params[name] for name in ("top", "left", "height", "width")]
    assert (drawn(View(scale=scale), size, n=3).crop == expected).all()


@given(
    sizes_of_images,
    st.tuples(st.floats(0.001, 1), st.floats(0.001, 1)),
    st.tuples(st.floats(0.1, 10), st.floats(0.1, 10)),
    st.integers(0, 2**63 - 1),
)
def test_crops_stay_inside_the_image(
    sizes: list[tuple[int, int]],
    scale: tuple[float, float],
    ratio: tuple[float, float],
    seed: int,
) -> None:
    view = View(scale=(min(scale), max(scale)), ratio=(min(ratio), max(ratio)))
    top, left, height, width = draw(view, uniforms(seed, 0, len(sizes), 1)[0], table(*sizes)).crop.T
    heights, widths = table(*sizes).T
    assert (top >= 0).all() and (left >= 0).all() and (height > 0).all() and (width > 0).all()
    assert (top + height <= heights).all() and (left + width <= widths).all()


def test_the_last_row_and_column_are_reached() -> None:
    top, left, height, width = drawn(View(scale=(0.2, 0.4)), (12, 15)).crop.T
    assert (top == 0).any() and (top + height == 12).any()
    assert (left == 0).any() and (left + width == 15).any()


def test_images_of_a_batch_get_crops_of_their_own_size() -> None:
    whole = View(scale=(1, 1), ratio=(0.01, 100), flip=0)
    sizes = table((10, 500), (500, 10), (64, 64))
    u = uniforms(0, 0, 3, 1)[0]
    each = [draw(whole, u[i : i + 1], sizes[i : i + 1]).crop for i in range(3)]
    assert np.array_equal(draw(whole, u, sizes).crop, np.concatenate(each))


def test_color_factors_are_uniform_within_their_bounds() -> None:
    numbers = drawn(FULL.model_copy(update={"jitter_p": 1.0}))
    assert numbers.jitter.all()
    for values, low, high in (
        (numbers.brightness, 0.6, 1.4),
        (numbers.contrast, 0.7, 1.3),
        (numbers.saturation, 0.8, 1.2),
        (numbers.hue, -0.1, 0.1),
        (numbers.sigma, 0.1, 2.0),
    ):
        assert stats.kstest(values, stats.uniform(low, high - low).cdf).pvalue > 0.01
        assert values.min() >= np.float32(low) and values.max() <= np.float32(high)


def test_no_two_numbers_of_a_view_are_tied() -> None:
    # These crops fit at the first try, which ties nothing.
    free = FULL.model_copy(update={"jitter_p": 1.0, "scale": (0.2, 0.5)})
    numbers = drawn(free, (900, 900))
    top, left, height, width = numbers.crop.T
    room = top / (900 - height), left / (900 - width)
    columns = [height * width, width / height, *room]
    columns += [getattr(numbers, f) for f in ("brightness", "contrast", "saturation", "hue")]
    columns += [getattr(numbers, f) for f in ("grayscale", "blur", "sigma", "solarize", "flip")]
    ties = np.corrcoef(np.array(columns, dtype=float)) - np.eye(len(columns))
    assert np.abs(ties).max() < 4 / np.sqrt(MANY)


def test_the_two_views_of_an_image_are_unrelated() -> None:
    sizes = np.tile(table((90, 120)), (MANY, 1))
    one, two = (draw(FULL, u, sizes) for u in uniforms(1, 0, MANY, 2))
    for name in ("brightness", "sigma", "flip", "grayscale", "jitter", "blur"):
        assert abs(np.corrcoef(getattr(one, name), getattr(two, name))[0, 1]) < 4 / np.sqrt(MANY)


@pytest.mark.parametrize(
    ("name", "p"),
    [("flip", 0.5), ("jitter", 0.8), ("grayscale", 0.2), ("blur", 0.5), ("solarize", 0.3)],
)
def test_each_switch_is_on_as_often_as_the_view_says(name: str, p: float) -> None:
    on = int(getattr(drawn(FULL), name).sum())
    assert stats.binomtest(on, MANY, p).pvalue > 0.001


def test_factors_are_neutral_without_jitter() -> None:
    numbers = drawn(FULL)
    off = ~numbers.jitter
    assert off.any() and (numbers.hue[off] == 0).all()
    for factor in (numbers.brightness, numbers.contrast, numbers.saturation):
        assert (factor[off] == 1).all() and (factor[~off] != 1).mean() > 0.99


@pytest.mark.parametrize("p", [0.0, 1.0])
def test_probabilities_0_and_1_mean_never_and_always(p: float) -> None:
    numbers = drawn(View(flip=p, jitter=(0.4, 0, 0, 0), jitter_p=p, grayscale=p, blur=p))
    for name in ("flip", "jitter", "grayscale", "blur"):
        assert (getattr(numbers, name) == bool(p)).all(), name


def test_the_numbers_are_frozen() -> None:
    """Changed numbers would break the exact resume of every run that is under way."""
    numbers = draw(FULL, uniforms(7, 123_456_789, 2, 2)[1], table((90, 120), (31, 17)))
    assert numbers.crop.tolist() == [[25, 10, 65, 72], [13, 0, 14, 16]]
    assert numbers.brightness.tolist() == [1.1174393892288208, 1.172179937362671]
    assert numbers.sigma.tolist() == [0.7616976499557495, 1.5894591808319092]


@given(
    st.integers(1, 3000), st.integers(1, 3000), st.sampled_from([(224, 256), (32, 32), (96, 96)])
)
def test_central_is_resize_then_center_crop(
    height: int, width: int, sides: tuple[int, int]
) -> None:
    crop, resized = sides
    short = min(height, width)
    top, left, h, w = central(table((height, width)), crop / resized).crop[0]
    assert h == w == round(short * crop / resized)
    # The box that is left of resize(256) and center crop(224), back in pixels of the source.
    for start, length in ((top, height), (left, width)):
        ideal = (length * resized / short - crop) / 2 * short / resized
        assert abs(start - ideal) <= 1
        assert start >= 0 and start + h <= length


def test_views_without_a_random_crop() -> None:
    numbers = drawn(View(crop="center"), (40, 60), n=50)
    assert (numbers.crop == [0, 10, 40, 40]).all() and 0 < numbers.flip.sum() < 50
    assert (drawn(View(crop="none"), (40, 60), n=5).crop == [0, 0, 40, 60]).all()


def test_central_changes_nothing_else() -> None:
    numbers = central(table((40, 60)), 1.0)
    assert numbers.crop.tolist() == [[0, 10, 40, 40]]
    assert not any(getattr(numbers, f)[0] for f in ("flip", "jitter", "grayscale", "blur", "hue"))
    assert numbers.brightness[0] == numbers.contrast[0] == numbers.saturation[0] == 1


def mapped(image: torch.Tensor, **changes: object) -> torch.Tensor:
    """Return a (3, h, w) image in 0..1 after the affine map of these numbers."""
    numbers = replace(central(table(tuple(image.shape[1:])), 1.0), **changes)
    (matrix,), (share,) = color_maps(numbers)
    mean_gray = F.rgb_to_grayscale(image).mean()
    return torch.einsum("ij,jhw->ihw", torch.from_numpy(matrix), image) + share * mean_gray


@pytest.fixture
def pale() -> torch.Tensor:
    """A picture that no change here drives to black or white."""
    return 0.4 + 0.2 * torch.rand(3, 9, 7, generator=torch.Generator().manual_seed(0))


def test_the_color_map_is_torchvisions_functions_one_after_the_other(pale: torch.Tensor) -> None:
    factors = {"brightness": 1.2, "contrast": 0.7, "saturation": 1.4}
    changes = {name: np.array([factor], np.float32) for name, factor in factors.items()}
    expected = F.adjust_saturation(F.adjust_contrast(F.adjust_brightness(pale, 1.2), 0.7), 1.4)
    # Its luma has 0.2989 for red.
    torch.testing.assert_close(mapped(pale, **changes), expected, rtol=0, atol=2e-4)
    gray = mapped(pale, **changes, grayscale=np.array([True]), hue=np.array([0.3], np.float32))
    luma = F.rgb_to_grayscale(F.adjust_contrast(F.adjust_brightness(pale, 1.2), 0.7))
    torch.testing.assert_close(gray, luma.expand(3, -1, -1), rtol=0, atol=2e-4)


@pytest.mark.parametrize("turns", [1 / 3, -1 / 3])
def test_a_third_of_a_turn_of_hue_is_torchvisions(turns: float, pale: torch.Tensor) -> None:
    found = mapped(pale, hue=np.array([turns], np.float32))
    torch.testing.assert_close(found, F.adjust_hue(pale, turns), rtol=0, atol=1e-4)


@pytest.mark.parametrize("turns", [-0.5, -0.1, 0.05, 0.4])
def test_hue_keeps_grays_and_the_mean_of_the_channels(turns: float, pale: torch.Tensor) -> None:
    hue = np.array([turns], np.float32)
    found = mapped(pale, hue=hue)
    torch.testing.assert_close(found.mean(dim=0), pale.mean(dim=0), rtol=0, atol=1e-5)
    assert (found - pale).abs().max() > 0.01
    grays = pale[:1].expand(3, -1, -1)
    torch.testing.assert_close(mapped(grays, hue=hue), grays, rtol=0, atol=1e-5)
