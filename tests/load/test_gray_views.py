"""Views of one channel: against numpy on float64, and against three equal channels."""

import io

import numpy as np
import pytest
import tars
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from fastmoco.config.recipe import View
from fastmoco.core.rng import uniforms
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import UsageError
from fastmoco.load.decode import decode
from fastmoco.load.executor import Settings
from fastmoco.load.fused_views import render_gray_views, table
from fastmoco.load.loader import Loader, evaluation_batches
from fastmoco.load.sampler import Plan
from fastmoco.load.view_params import ViewParams, central, draw
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

from .conftest import assert_equal
from .test_fused_views import naive, rendered

ALL = View(jitter=(0.4, 0.4, 0, 0), jitter_p=0.8, blur=0.5, solarize=0.3, flip=0.5)
OPERATORS = {
    "crop": View(flip=0),
    "flip": View(flip=1),
    "whole": View(crop="none"),
    "brightness": View(jitter=(0.9, 0, 0, 0)),
    "contrast": View(jitter=(0, 0.9, 0, 0)),
    "blur": View(blur=1),
    "solarize": View(solarize=1),
    "all": ALL,
}
LOOK = {"size": 16, "mean": (0.5,), "std": (0.2,)}


def deep(seed: int, height: int, width: int) -> np.ndarray:
    """Return a smooth picture of 16 bits with noise in the lower eight."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.random((4, 5)).astype(np.float32))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BILINEAR))
    return (65000 * smooth).astype(np.uint16) + rng.integers(0, 256, (height, width), np.uint16)


def in_gray(images: list[np.ndarray], params: ViewParams, side: int) -> np.ndarray:
    """Draw (n, side, side) views, in levels of 255."""
    starts = np.cumsum([0, *(image.size for image in images)])[:-1]
    sizes = np.array([image.shape for image in images])
    out = np.full((len(images), side, side, 1), np.nan, np.float32)
    pixels = np.concatenate([image.reshape(-1) for image in images])
    normal = np.ones(1, np.float32), np.zeros(1, np.float32)
    render_gray_views(pixels, starts, sizes, table(params), np.arange(len(images)), *normal, out)
    return out[..., 0]


def by_numpy(image: np.ndarray, params: ViewParams, i: int, side: int) -> np.ndarray:
    """Draw a view by the words of `View`, in float64."""
    x = naive(image[..., None] / 257, params.crop[i].tolist(), side)[..., 0]
    if params.jitter[i]:
        x = np.clip(float(params.brightness[i]) * x, 0, 255)
        contrast = float(params.contrast[i])
        x = np.clip(contrast * x + (1 - contrast) * x.mean(), 0, 255)
    if params.blur[i]:
        sigma = float(params.sigma[i])
        reach = int(np.ceil(3 * params.sigma[i]))
        places = np.arange(-reach, reach + 1)
        kernel = np.exp(-0.5 * (places / sigma) ** 2)
        for axis in (0, 1):
            wide = np.pad(x, [(reach, reach) if a == axis else (0, 0) for a in (0, 1)], "reflect")
            x = np.apply_along_axis(np.convolve, axis, wide, kernel / kernel.sum(), "valid")
    if params.solarize[i]:
        x = np.where(x >= 128, 255 - x, x)
    return x[:, ::-1] if params.flip[i] else x


def apart(found: np.ndarray, wanted: np.ndarray, allowed: float) -> float:
    """Return the share of pixels that differ by more; at solarize's threshold a few may."""
    return float((np.abs(found - wanted) > allowed).mean())


@pytest.mark.parametrize(("side", "size"), [(32, (40, 50)), (96, (130, 90)), (64, (30, 20))])
@pytest.mark.parametrize("operator", OPERATORS)
def test_an_operator_is_numpys_to_a_part_of_a_step_of_16_bits(operator, side, size):
    images = [deep(i, *size) for i in range(6)]
    params = draw(OPERATORS[operator], uniforms(1, 0, 6, 1)[0], np.tile([size], (6, 1)))
    found = in_gray(images, params, side)
    for i, image in enumerate(images):
        wanted = by_numpy(image, params, i, side)
        assert apart(found[i], wanted, 0.001) <= (1e-3 if params.solarize[i] else 0)


@pytest.mark.parametrize("operator", OPERATORS)
def test_three_equal_channels_are_drawn_alike(operator):
    images = [(deep(i, 60, 50) >> 8).astype(np.uint8) for i in range(6)]
    params = draw(OPERATORS[operator], uniforms(2, 0, 6, 1)[0], np.tile([[60, 50]], (6, 1)))
    colors = rendered([np.repeat(image[..., None], 3, axis=2) for image in images], params, 32)
    found = in_gray([image * np.uint16(257) for image in images], params, 32)
    for i in range(6):
        # torchvision's luma, which contrast is about, sums to 0.9999.
        same = apart(found[i], colors[i].mean(axis=2), 0.03)
        assert same <= (2e-3 if params.solarize[i] else 0)


@settings(max_examples=60)
@given(st.data())
def test_any_crop_is_drawn_within_its_image(data):
    height, width = data.draw(st.integers(1, 40)), data.draw(st.integers(1, 400))
    h, w = data.draw(st.integers(1, height)), data.draw(st.integers(1, width))
    crop = [data.draw(st.integers(0, height - h)), data.draw(st.integers(0, width - w)), h, w]
    side = data.draw(st.integers(1, 40))
    params = central(np.array([[height, width]]), 1.0)
    params.crop[0] = crop
    image = deep(h * w, height, width)
    assert apart(in_gray([image], params, side)[0], by_numpy(image, params, 0, side), 0.002) == 0
    limits = View(jitter=(1, 1, 0, 0), blur=1, blur_sigma=(0.1, 9), solarize=0.5)
    drawn = draw(limits, uniforms(side, 0, 1, 1)[0], np.array([[height, width]]))
    drawn.crop[0] = crop
    found = in_gray([image], drawn, side)
    assert np.isfinite(found).all() and found.min() >= -1e-3 and found.max() <= 255.001


def test_decoding_keeps_sixteen_bits(make_picture):
    image, gray = deep(1, 20, 30), make_picture(1).convert("L")
    coded = {
        kind: np.frombuffer(bytearray(tars.encoded(one, kind)), np.uint8)
        for kind, one in (("PNG", Image.fromarray(image)), ("JPEG", gray))
    }
    found = decode(coded["PNG"], channels=1)
    assert found.dtype == np.uint16 and np.array_equal(found[..., 0], image)
    jpeg = np.asarray(Image.open(io.BytesIO(coded["JPEG"].tobytes())))
    assert np.array_equal(decode(coded["JPEG"], channels=1)[..., 0], jpeg * np.uint16(257))
    assert decode(np.zeros(9, np.uint8), channels=1) is None


@pytest.fixture
def gray_sets(tmp_path, make_images):
    """A set of 10 PNGs of 16 bits and one of 10 JPEGs of 8, one size each."""
    (tmp_path / "in").mkdir()
    for i in range(10):
        Image.fromarray(deep(i, 24, 20)).save(tmp_path / f"in/{i}.png")
    make_images(tmp_path / "jpeg", (), 10, (30, 28))
    for source, name in (("in", "deep"), ("jpeg", "eight")):
        pack(tmp_path / source, tmp_path / name, PackOptions(gray=True))
    return ConcatShardSets.open([tmp_path / "deep", tmp_path / "eight"])


def test_a_stream_of_one_channel(gray_sets):
    """Of DALI's settings too, from memory and from the cache; what is drawn is what is stored."""
    streams = []
    for executor, pixels in (("dali", "decoded"), ("fused", "cached"), ("fused", "cached")):
        drawn = Settings(executor, threads=2, pixels=pixels)
        loader = Loader(gray_sets, Plan(20, 8, 3), (ALL, View()), **LOOK, settings=drawn)
        batches = loader.batches()
        streams.append([next(batches) for _ in range(5)])
        assert loader.settings.executor == "fused"
    assert_equal(streams[0], streams[1])
    assert_equal(streams[0], streams[2])
    assert np.load(next(gray_sets.sets[0].root.glob("pixels-*.npy"))).shape == (10, 24, 20, 1)
    view = streams[0][0].views[0]
    assert view.shape == (8, 1, 16, 16) and view.is_contiguous(memory_format=torch.channels_last)
    shown = {"ids": slice(0, 10), "batch": 10, "share": 1.0, "settings": Settings("fused")}
    seen = next(evaluation_batches(gray_sets, **shown, **LOOK))
    for row, sample in enumerate(seen.ids):
        name = gray_sets.sets[0].get_name(int(sample))
        image = np.asarray(Image.open(gray_sets.sets[0].root.parent / "in" / name))
        params = central(np.array([[24, 20]]), 1.0)
        wanted = (by_numpy(image, params, 0, 16) / 255 - 0.5) / 0.2
        assert np.abs(seen.views[0][row, 0].numpy() - wanted).max() < 1e-5


def test_sets_of_other_channels_are_refused(gray_sets, small_set):
    colors = LOOK | {"mean": (0.5,) * 3, "std": (0.2,) * 3}
    settings = Settings("fused")
    with pytest.raises(UsageError, match=r"of 1 channel, .* takes 3: .* encoder.channels=1"):
        Loader(gray_sets, Plan(20, 8, 3), (View(),), **colors, settings=settings)
    shown = {"ids": slice(0, 4), "batch": 4, "share": 1.0, "settings": settings}
    with pytest.raises(UsageError, match=r"of 3 channels, .* takes 1: pack it anew with --gray"):
        next(evaluation_batches(ConcatShardSets([small_set]), **shown, **LOOK))
