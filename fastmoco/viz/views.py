"""What the network will see: a few samples and their views, to look at before training on them."""

from dataclasses import dataclass
from io import BytesIO
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageOps

from fastmoco.config.encoder import EncoderSpec, PerChannel
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.core.gray import as_shown, gray_levels
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from fastmoco.load.view_params import ViewParams
from fastmoco.plots import draw_views
from fastmoco.pretrain import resolve


@dataclass(frozen=True)
class Shown:
    """A sample in the plot.

    Attributes:
        described: its id, original name and shard, in words.
        views: what was done for each view, in words.
    """

    described: str
    views: list[str]


def preview(recipe: Recipe, path: Path, count: int, title: str) -> list[Shown]:
    """Draw the first samples of a run as a grid: original and each view.

    Args:
        recipe: of the run.
        path: of the PNG.
        count: number of samples, at most those of the data.
        title: above the grid.

    Raises:
        DataError: a set is missing or an image cannot be decoded.
    """
    data = ConcatShardSets.open(recipe.data.sets)
    # Order and numbers depend on the position alone: a smaller batch begins as the real one does.
    recipe = resolve(recipe, data.sets[0]).model_copy(update={"batch": min(count, len(data))})
    device = get_device(recipe.runtime.device, 0)
    # Of a few images: not the place to decode the set.
    runtime = recipe.runtime.model_copy(update={"pixels": "decoded"})
    loader = Loader.of(recipe, data, get_settings(runtime, World(), device))
    # The batch first: it meets what is damaged, and says so in words.
    batch = next(loader.batches())
    encoded = Reader(data).fetch(batch.ids)
    spec = recipe.encoder
    originals = [_opened(image, spec) for image in encoded]
    rows = {"original": np.stack([_fitted(image, spec.image_size) for image in originals])}
    for number, view in enumerate(batch.views, 1):
        rows[f"view {number}"] = to_pixels(view, *spec.normalization())
    draw_views(path, rows, title)
    drawn = loader.numbers(loader.plan.positions(0), batch.ids)
    return [
        Shown(data.describe(sample), [in_words(numbers, row) for numbers in drawn])
        for row, sample in enumerate(batch.ids.tolist())
    ]


def to_pixels(views: torch.Tensor, mean: PerChannel, std: PerChannel) -> npt.NDArray[np.uint8]:
    """Return the (n, side, side, 3) pixels behind (n, C, side, side) normalized views."""
    scale, shift = torch.tensor(std).view(-1, 1, 1), torch.tensor(mean).view(-1, 1, 1)
    levels = views.float().cpu() * scale + shift
    if len(mean) == 1:
        return as_shown(levels[:, 0, ..., None].numpy(), *mean, *std).repeat(3, axis=3)
    return levels.mul(255).round().clamp(0, 255).byte().permute(0, 2, 3, 1).numpy()


def in_words(numbers: ViewParams, row: int) -> str:
    """Return the numbers that drew one view: `crop 93x120 at (4, 31), flipped, ...`."""
    top, left, height, width = numbers.crop[row].tolist()
    parts = [f"crop {height}x{width} at ({top}, {left})"]
    if numbers.flip[row]:
        parts.append("flipped")
    if numbers.jitter[row]:
        factors = (numbers.brightness, numbers.contrast, numbers.saturation)
        brightness, contrast, saturation = (float(factor[row]) for factor in factors)
        parts.append(f"brightness {brightness:.2f} contrast {contrast:.2f}")
        turn = 360 * float(numbers.hue[row])
        if saturation != 1 or turn:
            parts.append(f"saturation {saturation:.2f} hue {turn:+.0f} deg")
    if numbers.grayscale[row]:
        parts.append("grayscale")
    if numbers.blur[row]:
        parts.append(f"blur {float(numbers.sigma[row]):.2f} px")
    if numbers.solarize[row]:
        parts.append("solarized")
    return ", ".join(parts)


def _opened(encoded: npt.NDArray[np.uint8], spec: EncoderSpec) -> Image.Image:
    """Return a stored image as RGB, gray as `to_pixels` shows it."""
    image = Image.open(BytesIO(encoded.tobytes()))
    if spec.channels == 3:
        return image.convert("RGB")
    (mean,), (std,) = spec.normalization()
    return Image.fromarray(as_shown(gray_levels(image) / 65535, mean, std)).convert("RGB")


def _fitted(image: Image.Image, side: int) -> npt.NDArray[np.uint8]:
    """Return an image whole, on white where it is not square."""
    return np.asarray(ImageOps.pad(image, (side, side), color="white"))
