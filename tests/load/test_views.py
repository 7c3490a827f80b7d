"""Views: DALI against torchvision, and both against the definition, from the same numbers."""

import io
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
import torchvision_executor as oracle
from PIL import Image, ImageEnhance, ImageOps
from torchvision.transforms.v2 import functional as F

from fastmoco.config.recipe import View
from fastmoco.core.rng import uniforms
from fastmoco.load import dali_executor as dali
from fastmoco.load import fused_executor as fused
from fastmoco.load.executor import EnabledOps, EncodedBatch, PipelineSpec, Settings
from fastmoco.load.view_params import ViewParams, central, draw

N, SIZE = 16, 32
EVERY = EnabledOps(color=True, blur=True, solarize=True)
EXECUTORS = pytest.mark.parametrize(
    "executor", [dali, fused, oracle], ids=["dali", "fused", "torchvision"]
)


@pytest.fixture(scope="module")
def images(make_picture: Callable[..., Image.Image]) -> list[Image.Image]:
    """Pictures of as many sizes, none smaller than a view."""
    return [make_picture(i, (40 + 3 * i, 90 - 2 * i)) for i in range(N)]


@pytest.fixture(scope="module")
def files(images: list[Image.Image], encode: Callable[..., np.ndarray]) -> list[np.ndarray]:
    """The pictures as PNG, so that decoders have no say."""
    return [encode(image) for image in images]


def numbers_of(view: View, images: list[Image.Image]) -> ViewParams:
    sizes = np.array([[image.height, image.width] for image in images])
    return draw(view, uniforms(1, 0, len(images), 1)[0], sizes)


def plain(images: list[Image.Image], **changes: object) -> ViewParams:
    """Return numbers that show the images whole, but for the changes."""
    n = len(images)
    whole = [[0, 0, image.height, image.width] for image in images]
    filled = {name: np.full(n, value) for name, value in changes.items() if np.isscalar(value)}
    numbers = central(np.array([[i.height, i.width] for i in images]), 1.0)
    return replace(numbers, crop=np.array(whole, np.int32), **{**changes, **filled})


def render(
    executor: object,
    files: list[np.ndarray],
    numbers: ViewParams,
    stages: EnabledOps = EVERY,
    size: int = SIZE,
    mean: tuple[float, float, float] = (0, 0, 0),
    std: tuple[float, float, float] = (1 / 255,) * 3,
) -> torch.Tensor:
    """Return one view of all files, in levels of 0..255 unless mean and std say otherwise."""
    work = EncodedBatch(np.arange(len(files)), files, [numbers])
    batches = executor.render(
        lambda number: None if number else work,
        PipelineSpec(size, mean, std, (stages,)),
        len(files),
        Settings(threads=1, prefetch=1),
    )
    return next(iter(batches)).views[0]


def levels(image: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(image)).permute(2, 0, 1).float()


def by_hand(image: Image.Image, numbers: ViewParams, i: int) -> torch.Tensor:
    """Draw a view as torchvision's transforms do on a PIL image."""
    top, left, height, width = numbers.crop[i].tolist()
    image = F.resized_crop(image, top, left, height, width, [SIZE, SIZE])
    image = ImageEnhance.Brightness(image).enhance(float(numbers.brightness[i]))
    image = ImageEnhance.Contrast(image).enhance(float(numbers.contrast[i]))
    image = ImageEnhance.Color(image).enhance(float(numbers.saturation[i]))
    image = F.adjust_hue(image, float(numbers.hue[i]))
    if numbers.grayscale[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if numbers.blur[i]:
        image = F.gaussian_blur(image, [23, 23], [float(numbers.sigma[i])])
    if numbers.solarize[i]:
        image = ImageOps.solarize(image, 128)
    return levels(F.horizontal_flip(image) if numbers.flip[i] else image)


# Mean difference between the executors, in levels of 255. torchvision rounds (crop, blur) or
# truncates (color: half a level each time) to 8 bits after every stage, DALI keeps fractions.
# DALI's crop weighs in pixels beyond the crop's edge, as PIL's `resize(box=)` does; torchvision's
# cuts first. DALI turns hue about the gray axis, torchvision in HSV.
STAGES = {
    "crop": (View(flip=0.5), 0.35),
    "brightness": (View(jitter=(0.4, 0, 0, 0)), 0.8),
    "contrast": (View(jitter=(0, 0.4, 0, 0)), 0.8),
    "saturation": (View(jitter=(0, 0, 0.4, 0)), 0.8),
    "grayscale": (View(grayscale=1), 0.8),
    "blur": (View(blur=1), 0.3),
    "solarize": (View(solarize=0.5), 0.5),
    "center, solarize": (View(crop="center", solarize=1), 0.5),
    "whole": (View(crop="none"), 0.35),
    "hue": (View(jitter=(0, 0, 0, 0.1)), 10.0),
    "all but hue": (View(jitter=(0.4, 0.4, 0.4, 0), grayscale=0.2, blur=0.5), 2.5),
    "all": (View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5), 10.0),
}


@pytest.mark.parametrize("stage", STAGES)
def test_executors_agree(stage: str, images: list[Image.Image], files: list[np.ndarray]) -> None:
    view, bound = STAGES[stage]
    numbers = numbers_of(view, images)
    color = any(view.jitter) or view.grayscale > 0
    stages = EnabledOps(color, view.blur > 0, view.solarize > 0)
    one, two = (render(executor, files, numbers, stages) for executor in (dali, oracle))
    assert (one - two).abs().mean() < bound


@pytest.mark.parametrize("stage", STAGES)
def test_the_torchvision_executor_does_what_torchvision_does(
    stage: str, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    numbers = numbers_of(STAGES[stage][0], images)
    found = render(oracle, files, numbers)
    expected = torch.stack([by_hand(image, numbers, i) for i, image in enumerate(images)])
    assert (found - expected).abs().mean() < 1  # an old torchvision truncates gray
    assert (found - expected).abs().mean(dim=(1, 2, 3)).max() < 3


def test_dali_crops_as_pil_does(images: list[Image.Image], files: list[np.ndarray]) -> None:
    numbers = numbers_of(View(flip=0), images)
    found = render(dali, files, numbers, EnabledOps())
    for image, crop, view in zip(images, numbers.crop.tolist(), found, strict=True):
        top, left, height, width = crop
        box = (left, top, left + width, top + height)
        expected = image.resize((SIZE, SIZE), Image.Resampling.BILINEAR, box)
        assert (view - levels(expected)).abs().max() <= 1.01


@pytest.fixture(scope="module")
def squares(make_picture: Callable[..., Image.Image]) -> list[Image.Image]:
    """Pictures of the very size of a view: the crop then changes no pixel."""
    return [make_picture(50 + i, (SIZE, SIZE)) for i in range(4)]


COLOURS = {
    "brightness": F.adjust_brightness,
    "contrast": F.adjust_contrast,
    "saturation": F.adjust_saturation,
}


@pytest.mark.parametrize("name", COLOURS)
@pytest.mark.parametrize("factor", [0.6, 1.0, 1.4])
def test_dali_changes_colors_as_torchvision_does_without_rounding(
    name: str, factor: float, squares: list[Image.Image], encode: Callable[..., np.ndarray]
) -> None:
    numbers = plain(squares, **{name: np.float32(factor)}, jitter=True)
    found = render(dali, [encode(image) for image in squares], numbers)
    expected = torch.stack([COLOURS[name](levels(x) / 255, factor) * 255 for x in squares])
    # DALI takes the mean of grays that are rounded, which may move it a little.
    assert (found - expected).abs().max() < 0.3


@EXECUTORS
@pytest.mark.parametrize("factor", [0.6, 1.4])
def test_contrast_leaves_the_mean_gray_of_the_view_where_it_is(
    executor: object,
    factor: float,
    make_picture: Callable[..., Image.Image],
    encode: Callable[..., np.ndarray],
) -> None:
    """A pull towards 128, DALI's default, would move this dark picture by 30 levels."""
    dark = make_picture(3, (SIZE, SIZE)).point(lambda level: 20 + level // 5)
    gray = np.array(dark.convert("L"), dtype=float)
    numbers = plain([dark], contrast=np.float32(factor), jitter=True)
    found = render(executor, [encode(dark)], numbers)[0]
    weights = torch.tensor([0.299, 0.587, 0.114]).view(3, 1, 1)
    assert abs(float((found * weights).sum(0).mean()) - gray.mean()) < 0.8
    assert float((found * weights).sum(0).std()) == pytest.approx(factor * gray.std(), rel=0.03)


def test_contrast_takes_the_mean_of_the_crop_not_of_the_image(
    encode: Callable[..., np.ndarray],
) -> None:
    halves = np.zeros((64, 64, 3), np.uint8)
    halves[:, 32:] = 200
    numbers = replace(
        plain([Image.fromarray(halves)], contrast=np.float32(0.5), jitter=True),
        crop=np.array([[0, 34, 30, 30]], np.int32),
    )
    found = render(dali, [encode(Image.fromarray(halves))], numbers)
    assert (found - 200).abs().max() < 0.6


@EXECUTORS
def test_hue_turns_the_same_way_as_torchvisions(
    executor: object, encode: Callable[..., np.ndarray]
) -> None:
    red = Image.new("RGB", (SIZE, SIZE), (200, 40, 40))
    for hue, more, less in ((0.1, 1, 2), (-0.1, 2, 1)):
        numbers = plain([red], hue=np.float32(hue), jitter=True)
        view = render(executor, [encode(red)], numbers)[0].mean(dim=(1, 2))
        assert view[more] > view[less] + 20


@EXECUTORS
def test_grayscale_is_the_luma_in_every_channel(
    executor: object, squares: list[Image.Image], encode: Callable[..., np.ndarray]
) -> None:
    found = render(executor, [encode(x) for x in squares], plain(squares, grayscale=True))
    expected = torch.stack([levels(x.convert("L").convert("RGB")) for x in squares])
    assert (found[:, :1] - found).abs().max() < 0.01
    assert (found - expected).abs().max() < 1.5


@pytest.mark.parametrize("sigma", [0.1, 0.7, 2.0])
def test_dali_blurs_as_torchvision_does(
    sigma: float, squares: list[Image.Image], encode: Callable[..., np.ndarray]
) -> None:
    numbers = plain(squares, blur=True, sigma=np.float32(sigma))
    found = render(dali, [encode(x) for x in squares], numbers, EnabledOps(blur=True))
    expected = F.gaussian_blur(torch.stack([levels(x) for x in squares]), [23, 23], [sigma])
    # On uint8 DALI rounds its result; its window ends at 3 sigma.
    assert (found - expected).abs().max() < 1.0
    assert (found - expected).abs().mean() < 0.3


@EXECUTORS
def test_flip_mirrors_the_finished_view(
    executor: object, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    view = View(jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.2, blur=0.5, flip=0)
    numbers = numbers_of(view, images)
    still = render(executor, files, numbers)
    turned = render(executor, files, replace(numbers, flip=np.arange(N) % 2 == 1))
    assert torch.equal(turned[::2], still[::2])
    assert torch.equal(turned[1::2], still[1::2].flip(3))
    assert not torch.equal(turned[1::2], still[1::2])


@EXECUTORS
def test_each_image_is_drawn_by_its_own_numbers(
    executor: object, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    numbers = numbers_of(View(jitter=(0.4, 0.4, 0.4, 0.1), grayscale=0.3, blur=0.5), images)
    together = render(executor, files, numbers)
    for i in range(0, N, 5):
        alone = render(executor, files[i : i + 1], numbers.rows(slice(i, i + 1)))
        assert torch.equal(alone[0], together[i])


@EXECUTORS
def test_channels_are_normalized(
    executor: object, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    mean, std = (0.1, 0.4, 0.7), (0.2, 0.5, 0.3)
    numbers = numbers_of(View(), images)
    raw = render(executor, files, numbers, EnabledOps())
    found = render(executor, files, numbers, EnabledOps(), mean=mean, std=std)
    columns = (torch.tensor(x).view(3, 1, 1) for x in (mean, std))
    center, spread = columns
    torch.testing.assert_close(found, (raw / 255 - center) / spread, rtol=0, atol=1e-5)


@EXECUTORS
@pytest.mark.parametrize("mode", ["L", "RGB", "P"])
def test_any_stored_mode_becomes_rgb(
    executor: object,
    mode: str,
    squares: list[Image.Image],
    encode: Callable[..., np.ndarray],
) -> None:
    image = squares[0].convert(mode)
    found = render(executor, [encode(image)], plain([image]), EnabledOps())
    assert (found[0] - levels(image.convert("RGB"))).abs().max() <= 0.01


@EXECUTORS
def test_jpegs_decode_as_in_pil_and_are_never_turned(
    executor: object, make_picture: Callable[..., Image.Image], encode: Callable[..., np.ndarray]
) -> None:
    image = make_picture(9, (SIZE, SIZE))
    exif = Image.Exif()
    exif[0x0112] = 6  # a quarter turn, if anyone asks
    file = encode(image, "jpeg", quality=95, exif=exif)
    stored = Image.open(io.BytesIO(file))
    found = render(executor, [file], plain([image]), EnabledOps())[0]
    assert (found - levels(stored)).abs().mean() < 1
    assert (found - levels(stored.rotate(-90))).abs().mean() > 20


@EXECUTORS
def test_views_are_channels_last_fp32(
    executor: object, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    view = render(executor, files, numbers_of(View(), images))
    assert view.shape == (N, 3, SIZE, SIZE) and view.dtype == torch.float32
    assert view.is_contiguous(memory_format=torch.channels_last)


def test_dali_hands_its_memory_over(images: list[Image.Image], files: list[np.ndarray]) -> None:
    numbers = numbers_of(View(), images)
    feed = [files, *dali.inputs(numbers, EnabledOps())]
    pipeline = dali.build(
        lambda info: feed,
        PipelineSpec(SIZE, (0, 0, 0), (1, 1, 1), (EnabledOps(),)),
        batch=N,
        threads=1,
        prefetch=1,
        device="cpu",
        device_id=None,
        decoder="cpu",
        hw_decoder_load=0.65,
    )
    (output,) = pipeline.run()
    assert dali.to_torch(output).data_ptr() == output.as_tensor().data_ptr()


def test_a_view_survives_the_batches_after_it(
    images: list[Image.Image], files: list[np.ndarray]
) -> None:
    numbers = numbers_of(View(flip=0), images)
    works = [EncodedBatch(np.arange(N), files[i:] + files[:i], [numbers]) for i in range(6)]
    batches = dali.render(
        lambda number: works[number] if number < 6 else None,
        PipelineSpec(SIZE, (0, 0, 0), (1, 1, 1), (EnabledOps(),)),
        N,
        Settings(threads=1, prefetch=2),
    )
    first = next(batches).views[0]
    kept = first.clone()
    assert len(list(batches)) == 5
    assert torch.equal(first, kept)


@EXECUTORS
def test_two_views_of_an_image_come_from_one_decode(
    executor: object, images: list[Image.Image], files: list[np.ndarray]
) -> None:
    plainer, richer = View(flip=0), View(jitter=(0.4, 0.4, 0.4, 0), blur=0.5)
    pair = [numbers_of(plainer, images), numbers_of(richer, images)]
    look = PipelineSpec(SIZE, (0, 0, 0), (1 / 255,) * 3, (EnabledOps(), EVERY))
    work = EncodedBatch(np.arange(N), files, pair)
    batches = executor.render(lambda i: None if i else work, look, N, Settings(threads=1))
    views = next(iter(batches)).views
    alone = [render(executor, files, pair[0], EnabledOps()), render(executor, files, pair[1])]
    assert all(torch.equal(a, b) for a, b in zip(views, alone, strict=True))
