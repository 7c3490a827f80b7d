"""Encoded images to pixels, on the CPU."""

import io

import numpy as np
import numpy.typing as npt
import torch
import torchvision.io  # registers torch.ops.image
from PIL import Image

from fastmoco.core.gray import gray_levels

# Pillow's pixels in two thirds of the time. The function around it warns that torchvision will give
# up its decoders: then Pillow takes over.
_decode_jpeg = getattr(torch.ops.image, "decode_jpeg", None)
_RGB, _GRAY = torchvision.io.ImageReadMode.RGB.value, torchvision.io.ImageReadMode.GRAY.value

Pixels = npt.NDArray[np.uint8] | npt.NDArray[np.uint16]

_FORMATS = ("JPEG", "PNG", "WEBP")  # what a set may hold


def decode(encoded: npt.NDArray[np.uint8], channels: int = 3) -> Pixels | None:
    """Return (H, W, 3) uint8 RGB, or (H, W, 1) uint16 gray as `gray_levels` has it.

    None: it is no image.
    """
    if _decode_jpeg and encoded[:2].tobytes() == b"\xff\xd8":
        mode = _RGB if channels == 3 else _GRAY
        try:
            planes: torch.Tensor = _decode_jpeg(torch.from_numpy(encoded), mode)
            pixels: npt.NDArray[np.uint8] = planes.permute(1, 2, 0).contiguous().numpy()
            return pixels if channels == 3 else pixels * np.uint16(257)
        except RuntimeError:
            pass  # Pillow reads some that it refuses
    try:
        with Image.open(io.BytesIO(encoded.tobytes()), formats=_FORMATS) as image:
            if channels == 1:
                return gray_levels(image)[..., None]
            return np.array(image.convert("RGB"))
    except (OSError, ValueError, SyntaxError):
        return None
