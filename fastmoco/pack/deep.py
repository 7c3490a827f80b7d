"""Images of more than 8 bits: brought to the bits that a set has, by levels or as they are."""

import re
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastmoco.core.gray import SIXTEEN_BIT
from fastmoco.pack.levels import Levels, Span

BITS_PER_SAMPLE = 0x0102
PPM_HEADER = re.compile(rb"P6(?:\s+#.*\n)*\s+\d+\s+\d+\s+(\d{1,5})\s")  # ends in the maximum
DEEP_GRAY = (*SIXTEEN_BIT, "I", "F")
SIXTEEN_BITS: Levels = (0, 65535)
_LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601, as in PIL


class Unfit(Exception):
    """An image that is refused by rule; the message is the reason."""


def to_depth(
    image: Image.Image, content: bytes, levels: Levels | None, gray: bool
) -> tuple[Image.Image, Span | None]:
    """Return an image with the bits and channels of a set, and the span of its deeper values.

    Args:
        image: opened.
        content: its file.
        levels: what becomes black and white of more than 8 bits.
        gray: one channel, in which 16 bits stay, in place of 8-bit gray or RGB.

    Raises:
        Unfit: it cannot be.
    """
    values: npt.NDArray[Any]
    full: Levels | None = SIXTEEN_BITS
    if _has_deep_color(image, content):
        kind = "16-bit color"
        if not (levels or gray):
            plain = as_mode(image, "RGB")  # of the 16 bits, PIL gives the high byte
            return plain, get_span(257 * np.asarray(plain, np.uint16), kind, full)
        values = _deep_color(image, content)
        values = values @ _LUMA if gray else values
    elif image.mode in SIXTEEN_BIT or (image.mode == "I" and image.format in ("PNG", "PPM")):
        kind = "16-bit gray"  # PIL scales PPM by the maximum in its header
        values = np.asarray(image)
    elif image.mode in ("I", "F"):
        kind, full = "32-bit floating-point" if image.mode == "F" else "32-bit", None
        values = np.asarray(image)
    else:
        return as_mode(image, "L" if gray or image.mode in ("1", "L") else "RGB"), None
    span = get_span(values, kind, full)
    # Where nothing tells the range, the set is refused by the spans of its images.
    levels = levels or full or (span.least, max(span.most, span.least + 1))
    return _leveled(values, levels, np.dtype(np.uint16 if gray else np.uint8)), span


def _leveled(values: npt.NDArray[Any], levels: Levels, dtype: np.dtype[Any]) -> Image.Image:
    (low, high), white = levels, int(np.iinfo(dtype).max)
    scaled = (values.astype(np.float64) - low) * (white / (high - low))
    return Image.fromarray(np.rint(scaled).clip(0, white).astype(dtype))


def _has_deep_color(image: Image.Image, content: bytes) -> bool:
    if image.format == "PNG":
        return content[24] == 16 and image.mode not in DEEP_GRAY
    if image.format == "TIFF":
        bits = getattr(image, "tag_v2", {}).get(BITS_PER_SAMPLE, (8,))
        return image.mode not in DEEP_GRAY and max(bits) > 8
    header = PPM_HEADER.match(content)
    return header is not None and int(header[1]) > 255


def _deep_color(image: Image.Image, content: bytes) -> npt.NDArray[Any]:
    """Return (H, W, 3) values 0..65535; of these, PIL gives the high byte alone."""
    if image.format != "PNG":
        raise Unfit(f"is 16-bit color in a {image.format}: for --levels or --gray, save it as PNG")
    import torch  # takes seconds, and few images need it
    from torchvision.io import ImageReadMode, decode_png

    encoded = torch.frombuffer(bytearray(content), dtype=torch.uint8)
    decoded: npt.NDArray[Any] = decode_png(encoded, ImageReadMode.RGB).permute(1, 2, 0).numpy()
    return decoded


def get_span(values: npt.NDArray[Any], kind: str, full: Levels | None) -> Span:
    """Return the span of an image's values.

    Raises:
        Unfit: some are not finite.
    """
    if not np.isfinite(values).all():
        raise Unfit("holds values that are not finite numbers")
    low, high = np.quantile(values, (0.001, 0.999), method="nearest")
    ends = (values.min(), values.max(), low, high)
    return Span(kind, full, *(float(end) for end in ends))


def as_mode(image: Image.Image, mode: str) -> Image.Image:
    """Return an image in a mode of PIL."""
    # `convert` copies an image that has the mode already: 4 % of the time of shrinking it.
    return image if image.mode == mode else image.convert(mode)
