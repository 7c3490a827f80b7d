"""How close our views come to torchvision's: operation by operation, and as distributions.

    python benchmarks/augment_fidelity.py FOLDER [--size 224] [--images 64] [--draws 5000]

The first part draws the same numbers with DALI and with torchvision's functions on PIL images, as
the official code does, and prints the mean absolute difference in levels of 0..255, beside the
effect: what the operation changes at all. The second part lets each side draw its own numbers for
the views of MoCo v2, and compares the distributions of crop area, crop aspect, brightness,
saturation and sharpness by a two-sample Kolmogorov-Smirnov test. One JSON row each.
"""

import argparse
import io
import json
import random
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image, ImageFilter
from scipy import stats
from torchvision import transforms
from torchvision.transforms import functional as F

from fastmoco.config.recipe import View
from fastmoco.core.environment import environment
from fastmoco.core.rng import uniforms
from fastmoco.load import dali_executor as dali
from fastmoco.load.executor import EncodedBatch, PipelineSpec, Settings
from fastmoco.load.loader import get_enabled_ops
from fastmoco.load.view_params import ViewParams, draw

Levels = npt.NDArray[np.float32]

FULL = View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5)
OPERATIONS = {
    "crop": View(),
    "brightness": View(jitter=(0.4, 0, 0, 0)),
    "contrast": View(jitter=(0, 0.4, 0, 0)),
    "saturation": View(jitter=(0, 0, 0.4, 0)),
    "hue 0.1": View(jitter=(0, 0, 0, 0.1)),
    "hue 0.4": View(jitter=(0, 0, 0, 0.4)),
    "grayscale": View(grayscale=1),
    "blur": View(blur=1),
    "solarize": View(solarize=1),
    "MoCo v2, hue 0": FULL.model_copy(update={"jitter": (0.4, 0.4, 0.4, 0)}),
    "MoCo v2": FULL,
    "MoCo v1": View(jitter=(0.4, 0.4, 0.4, 0.4), grayscale=0.2),
}
BATCH = 32


def main() -> int:
    """Measure, print a row for each result."""
    parser = argparse.ArgumentParser()
    parser.add_argument("folder", type=Path)
    parser.add_argument("--size", type=int, default=224)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--draws", type=int, default=5000)
    options = parser.parse_args()
    paths = [p for p in sorted(options.folder.rglob("*")) if p.suffix.lower() in (".jpg", ".jpeg")]
    if not paths:
        sys.exit(f"{options.folder} holds no JPEGs.")
    files = [path.read_bytes() for path in random.Random(0).choices(paths, k=options.images)]
    head = {"size": options.size, "images": options.images, **environment()}
    for name, view in OPERATIONS.items():
        print(json.dumps({"operation": name, **differences(view, files, options.size), **head}))
    for row in distributions(files, options.size, options.draws):
        print(json.dumps({**row, **head}))
    return 0


def differences(view: View, files: Sequence[bytes], size: int) -> dict[str, float]:
    """Return mean absolute differences in levels between views drawn from the same numbers."""
    numbers = draw(view, uniforms(1, 0, len(files), 1)[0], _sizes(files))
    ours = np.concatenate(list(_by_dali(view, files, numbers, size)))
    plain = View(scale=view.scale, flip=view.flip)
    cropped = np.concatenate(list(_by_dali(plain, files, numbers, size)))
    theirs = np.stack([_by_hand(file, numbers, i, size) for i, file in enumerate(files)])
    each = np.abs(ours - theirs).mean(axis=(1, 2, 3))
    return {
        "difference": float(each.mean()),
        "worst_image": float(each.max()),
        "effect": float(np.abs(theirs - cropped).mean()),
    }


def _sizes(files: Sequence[bytes]) -> npt.NDArray[np.int64]:
    return np.array([Image.open(io.BytesIO(file)).size[::-1] for file in files])


def _by_dali(
    view: View, files: Sequence[bytes], numbers: ViewParams, size: int
) -> Iterator[Levels]:
    """Yield batches of (n, size, size, 3) levels."""
    look = PipelineSpec(size, (0.0, 0.0, 0.0), (1 / 255,) * 3, (get_enabled_ops(view),))

    def source(number: int) -> EncodedBatch | None:
        rows = np.arange(number * BATCH, min((number + 1) * BATCH, len(files)))
        if not len(rows):
            return None
        encoded = [np.frombuffer(files[row], np.uint8) for row in rows]
        return EncodedBatch(rows, encoded, [numbers.rows(rows)])

    for rendered in dali.render(source, look, BATCH, Settings(threads=2)):
        yield rendered.views[0].permute(0, 2, 3, 1).numpy()


def _by_hand(file: bytes, numbers: ViewParams, i: int, size: int) -> Levels:
    """Return the (size, size, 3) levels of a view as the official code would draw it."""
    top, left, height, width = numbers.crop[i].tolist()
    image = F.resized_crop(_opened(file), top, left, height, width, [size, size])
    image = F.adjust_brightness(image, float(numbers.brightness[i]))
    image = F.adjust_contrast(image, float(numbers.contrast[i]))
    image = F.adjust_saturation(image, float(numbers.saturation[i]))
    image = F.adjust_hue(image, float(numbers.hue[i]))
    if numbers.grayscale[i]:
        image = F.rgb_to_grayscale(image, num_output_channels=3)
    if numbers.blur[i]:
        image = image.filter(ImageFilter.GaussianBlur(float(numbers.sigma[i])))
    if numbers.solarize[i]:
        image = F.solarize(image, 128)
    return np.asarray(F.hflip(image) if numbers.flip[i] else image, dtype=np.float32)


def _opened(file: bytes) -> Image.Image:
    return Image.open(io.BytesIO(file)).convert("RGB")


def distributions(files: Sequence[bytes], size: int, draws: int) -> Iterator[dict[str, Any]]:
    """Yield a row for each measure: its medians on either side and the test of both samples."""
    # The same images, as often, in the same order on both sides.
    cycled = [files[i % len(files)] for i in range(draws)]
    sizes = _sizes(files)[np.arange(draws) % len(files)]
    numbers = draw(FULL, uniforms(2, 0, draws, 1)[0], sizes)
    views = (view for batch in _by_dali(FULL, cycled, numbers, size) for view in batch)
    ours = np.array([_looks(view) for view in views])
    theirs = np.array([_looks(view) for view in _official(cycled, size)])
    crops = (_crop_measures(one, sizes) for one in (numbers.crop, _official_crops(sizes)))
    pairs = [*zip(*crops, strict=True), *zip(ours.T, theirs.T, strict=True)]
    names = ("crop area", "crop aspect", "brightness", "saturation", "sharpness")
    for name, (one, two) in zip(names, pairs, strict=True):
        test = stats.ks_2samp(one, two)
        yield {
            "distribution": name,
            "draws": draws,
            "quartiles_ours": np.quantile(one, (0.25, 0.5, 0.75)).tolist(),
            "quartiles_torchvision": np.quantile(two, (0.25, 0.5, 0.75)).tolist(),
            "ks_statistic": float(test.statistic),
            "p": float(test.pvalue),
        }


def _looks(view: Levels) -> tuple[float, float, float]:
    """Return mean level, mean saturation (of HSV) and mean horizontal step of a view."""
    top, bottom = view.max(axis=2), view.min(axis=2)
    saturation = (top - bottom) / np.maximum(top, 1)
    return float(view.mean()), float(saturation.mean()), float(np.abs(np.diff(view, axis=1)).mean())


def _official(files: Sequence[bytes], size: int) -> Iterator[Levels]:
    torch.manual_seed(0)
    chance = random.Random(0)
    transform = transforms.Compose(
        [
            transforms.RandomResizedCrop(size, scale=FULL.scale),
            transforms.RandomApply([transforms.ColorJitter(*FULL.jitter)], p=FULL.jitter_p),
            transforms.RandomGrayscale(p=FULL.grayscale),
            transforms.RandomHorizontalFlip(),
        ]
    )
    for file in files:
        view = transform(_opened(file))
        if chance.random() < FULL.blur:
            view = view.filter(ImageFilter.GaussianBlur(chance.uniform(*FULL.blur_sigma)))
        yield np.asarray(view, dtype=np.float32)


def _official_crops(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    torch.manual_seed(1)
    params = transforms.RandomResizedCrop.get_params
    shapes = (torch.empty(1, *size) for size in sizes.tolist())
    return np.array([params(shape, list(FULL.scale), list(FULL.ratio)) for shape in shapes])


def _crop_measures(
    crops: npt.NDArray[np.int32], sizes: npt.NDArray[np.int64]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """Return the crops' shares of the image area, and their aspect ratios."""
    height, width = crops[:, 2].astype(float), crops[:, 3].astype(float)
    return height * width / sizes.prod(axis=1), width / height


if __name__ == "__main__":
    sys.exit(main())
