"""The same views from the same numbers, drawn by torchvision, batch by batch: the tests' oracle."""

import io
from collections.abc import Iterator, Sequence
from itertools import count

import numpy as np
import numpy.typing as npt
import torch
from PIL import Image
from torchvision.transforms.v2 import functional as F

from fastmoco.load.executor import DecodedBatch, PipelineSpec, Settings, Source
from fastmoco.load.view_params import ViewParams

_FORMATS = ("JPEG", "PNG", "WEBP")  # what a set may hold


def render(
    source: Source, look: PipelineSpec, batch: int, settings: Settings
) -> Iterator[DecodedBatch]:
    """Draw batches one by one, fp32 on every device; see `work.Executor`."""
    for number in count():
        work = source(number)
        if work is None:
            return
        images = [_decode(encoded) for encoded in work.images]
        views = (_view(images, numbers, look) for numbers in work.numbers)
        yield DecodedBatch(work, tuple(view.to(settings.device) for view in views))


def _decode(encoded: npt.NDArray[np.uint8]) -> torch.Tensor:
    # By PIL, as the packer does: torchvision is giving up its own decoders.
    with Image.open(io.BytesIO(encoded.tobytes()), formats=_FORMATS) as image:
        return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1)


def _view(images: Sequence[torch.Tensor], numbers: ViewParams, look: PipelineSpec) -> torch.Tensor:
    drawn = torch.stack([draw(x, numbers, i, look.size) for i, x in enumerate(images)])
    mean, std = torch.tensor(look.mean).view(3, 1, 1), torch.tensor(look.std).view(3, 1, 1)
    return ((drawn / 255 - mean) / std).contiguous(memory_format=torch.channels_last)


def draw(image: torch.Tensor, view: ViewParams, i: int, size: int) -> torch.Tensor:
    """Draw the i-th of some views, (3, size, size); on floats of 0..1 nothing is rounded."""
    top, left, height, width = view.crop[i].tolist()
    x: torch.Tensor = F.resized_crop(image, top, left, height, width, [size, size], antialias=True)
    if view.jitter[i]:
        x = F.adjust_brightness(x, float(view.brightness[i]))
        x = F.adjust_contrast(x, float(view.contrast[i]))
        x = F.adjust_saturation(x, float(view.saturation[i]))
        x = F.adjust_hue(x, float(view.hue[i]))
    if view.grayscale[i]:
        x = F.rgb_to_grayscale(x, num_output_channels=3)
    if view.blur[i]:
        sigma = float(view.sigma[i])
        # The window of DALI's default: 3 sigma to either side.
        window = 2 * int(np.ceil(3 * sigma)) + 1
        x = F.gaussian_blur(x, [window, window], [sigma, sigma])
    if view.solarize[i]:
        x = F.solarize(x, 128 / 255 if x.is_floating_point() else 128)
    return F.horizontal_flip(x) if view.flip[i] else x
