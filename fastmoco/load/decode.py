"""Encoded images to pixels, on the CPU."""

import io

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io  # registers torch.ops.image
from PIL import Image

# Pillow's pixels in two thirds of the time. The function around it warns that torchvision will give
# up its decoders: then Pillow takes over.
_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)
_RGB = torchvision.io.ImageReadMode.RGB.value

Pixels = npt.NDArray[np.uint8]

_FORMATS = ("JPEG", "PNG", "WEBP")  # what a set may hold


def decode(encoded: Pixels) -> Pixels | None:
    """Return (H, W, 3) RGB pixels; None: it is no image."""
    if _decode_jpeg and encoded[:2].tobytes() == b"\xff\xd8":
        try:
            planes: torch.Tensor = _decode_jpeg(torch.from_numpy(encoded), _RGB)
            pixels: Pixels = planes.permute(1, 2, 0).contiguous().numpy()
            return pixels
        except RuntimeError:
            pass  # Pillow reads some that it refuses
    try:
        with Image.open(io.BytesIO(encoded.tobytes()), formats=_FORMATS) as image:
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return None
