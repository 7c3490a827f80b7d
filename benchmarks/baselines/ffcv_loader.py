"""FFCV's dataset file (.beton), and two views of MoCo v2 drawn from it.

FFCV crops, flips, changes brightness, contrast and saturation, and normalizes. It has no hue, which
is left out in its favor, and neither grayscale nor blur: they are compiled operations of our own
here, as its documentation advises. Operations in Python (torchvision's, OpenCV's) may only come
behind all compiled ones: FFCV never returns from building a pipeline that goes back.

Importing this imports FFCV.
"""

import os
from collections.abc import Callable, Generator
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
import torch
from ffcv.fields import RGBImageField
from ffcv.fields.rgb_image import IMAGE_MODES, RandomResizedCropRGBImageDecoder
from ffcv.loader import Loader, OrderOption
from ffcv.pipeline.compiler import Compiler
from ffcv.pipeline.operation import Operation
from ffcv.pipeline.pipeline_spec import PipelineSpec
from ffcv.reader import Reader as Beton
from ffcv.transforms import (
    NormalizeImage,
    RandomBrightness,
    RandomContrast,
    RandomHorizontalFlip,
    RandomSaturation,
    ToTensor,
    ToTorchImage,
)
from ffcv.writer import DatasetWriter
from harness.view_timing import MEAN, STD, Views
from PIL import Image

from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets

PAGE = 2**26  # bytes; an image must fit into one, or FFCV's writer waits for ever


class _Stored(RGBImageField):  # type: ignore[misc]
    """An encoded image, stored as it is where FFCV can decode it (JPEG), by its pixels elsewhere.

    FFCV's own field encodes JPEGs anew.
    """

    def __init__(self, raw: bool) -> None:
        super().__init__(write_mode="raw")
        self.raw = raw

    def encode(self, destination: Any, image: bytes, malloc: Callable[[int], Any]) -> None:
        with Image.open(BytesIO(image)) as opened:
            if self.raw or opened.format != "JPEG":
                super().encode(destination, opened.convert("RGB"), malloc)
                return
            destination["width"], destination["height"] = opened.size
        destination["mode"] = IMAGE_MODES["jpg"]
        destination["data_ptr"], storage = malloc(len(image))
        storage[:] = np.frombuffer(image, dtype=np.uint8)


class _Images:
    """The images of a shard set, encoded, as FFCV's writer asks for them."""

    def __init__(self, root: Path) -> None:
        self.data = ConcatShardSets.open([root])
        self.reader = Reader(self.data)

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[bytes]:
        return (self.reader.fetch(np.array([index]))[0].tobytes(),)


def write(root: Path, out: Path, raw: bool = False) -> None:
    """Write the images of a shard set into FFCV's file; raw: by their pixels."""
    # From a set, whose images are known to decode: FFCV's writer waits for ever on a bad one.
    cores = len(os.sched_getaffinity(0))
    writer = DatasetWriter(str(out), {"image": _Stored(raw)}, page_size=PAGE, num_workers=cores)
    writer.from_indexed_dataset(_Images(root))


class _Grayscale(Operation):  # type: ignore[misc]
    """Turns images gray with a probability, in place."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def generate_code(self) -> Callable[..., Any]:
        span, p = Compiler.get_iterator(), self.p

        def grayscale(images: Any, _: Any) -> Any:
            chosen = np.random.rand(images.shape[0]) < p
            for i in span(images.shape[0]):
                if chosen[i]:
                    for y in range(images.shape[1]):
                        for x in range(images.shape[2]):
                            red, green, blue = images[i, y, x]
                            images[i, y, x] = np.uint8(0.299 * red + 0.587 * green + 0.114 * blue)
            return images

        grayscale.is_parallel = True  # type: ignore[attr-defined]
        return grayscale

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True), None


class _Blur(Operation):  # type: ignore[misc]
    """Blurs images with a probability, in place: a Gaussian, by rows and then by columns."""

    def __init__(self, p: float) -> None:
        super().__init__()
        self.p = p

    def generate_code(self) -> Callable[..., Any]:
        span, p, blurred = Compiler.get_iterator(), self.p, Compiler.compile(_blurred)

        def blur(images: Any, _: Any) -> Any:
            chosen = np.random.rand(images.shape[0]) < p
            sigmas = np.random.uniform(0.1, 2.0, images.shape[0])
            for i in span(images.shape[0]):
                if chosen[i]:
                    blurred(images[i], sigmas[i])
            return images

        blur.is_parallel = True  # type: ignore[attr-defined]
        return blur

    def declare_state_and_memory(self, previous_state: Any) -> tuple[Any, None]:
        return replace(previous_state, jit_mode=True), None


def _blurred(image: Any, sigma: float) -> None:
    """Blur a (height, width, 3) uint8 image in place, by loops that a compiler makes vectors of."""
    height, width = image.shape[0], image.shape[1]
    reach = min(int(np.ceil(3 * sigma)), width - 1, height - 1)
    weights = np.exp(-0.5 * (np.arange(-reach, reach + 1) / sigma) ** 2).astype(np.float32)
    weights /= weights.sum()
    rows = np.empty((height + 2 * reach, 3 * width), np.float32)
    padded = np.empty(3 * (width + 2 * reach), np.float32)
    for y in range(height):
        for x in range(width + 2 * reach):
            at = min(max(x - reach, 0), width - 1)
            for c in range(3):
                padded[3 * x + c] = image[y, at, c]
        row = rows[y + reach]
        row[:] = 0
        for k in range(2 * reach + 1):
            weight, shift = weights[k], 3 * k
            for j in range(3 * width):
                row[j] += weight * padded[j + shift]
    for k in range(reach):
        rows[k] = rows[reach]
        rows[height + reach + k] = rows[height + reach - 1]
    total = np.empty(3 * width, np.float32)
    for y in range(height):
        total[:] = np.float32(0.5)  # rounds
        for k in range(2 * reach + 1):
            weight = weights[k]
            row = rows[y + k]
            for j in range(3 * width):
                total[j] += weight * row[j]
        line = image[y].reshape(3 * width)
        for j in range(3 * width):
            line[j] = np.uint8(total[j])


def views(path: str, size: int, batch: int, batches: int) -> Generator[Views]:
    """Yield batches of two views from FFCV's file, on all cores."""
    fields = {"image": RGBImageField}
    images = int(Beton(path, fields).num_samples)
    loader = Loader(
        path,
        batch,
        num_workers=len(os.sched_getaffinity(0)),
        order=OrderOption.RANDOM,
        # One epoch of them all: between epochs, FFCV's threads would wait.
        indices=np.resize(np.arange(images, dtype=np.uint64), batches * batch),
        pipelines={"image": _view(size), "again": _view(size)},
        custom_fields=fields,
    )
    for found in loader:
        # It sets torch's threads. In this thread they do nothing but spin, at FFCV's cost.
        torch.set_num_threads(1)
        yield found


def _view(size: int) -> PipelineSpec:
    operations = [
        RandomBrightness(0.4, p=0.8),
        RandomContrast(0.4, p=0.8),
        RandomSaturation(0.4, p=0.8),
        _Grayscale(0.2),
        _Blur(0.5),
        RandomHorizontalFlip(),
        NormalizeImage(255 * np.array(MEAN), 255 * np.array(STD), np.float32),
        ToTensor(),
        ToTorchImage(),
    ]
    crop = RandomResizedCropRGBImageDecoder((size, size), scale=(0.2, 1.0))
    return PipelineSpec("image", crop, operations)
