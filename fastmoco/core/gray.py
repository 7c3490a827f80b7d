"""Images of one channel: their levels, and what a screen shows of them."""

from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

SIXTEEN_BIT = ("I;16", "I;16L", "I;16B", "I;16N")
"""Modes of 16 bits in PIL, which has I for some before version 11."""


def is_deep(image: Image.Image) -> bool:
    """Return whether a JPEG, PNG or WebP is gray of 16 bits."""
    return image.mode in (*SIXTEEN_BIT, "I")


def gray_levels(image: Image.Image) -> npt.NDArray[np.uint16]:
    """Return (H, W) levels 0..65535; of 8 bits, each is 257 times itself: white stays white."""
    if is_deep(image):
        return np.asarray(image).astype(np.uint16)
    return np.asarray(image.convert("L")).astype(np.uint16) * np.uint16(257)


def as_shown(levels: npt.NDArray[Any], mean: float, std: float) -> npt.NDArray[np.uint8]:
    """Return levels in 0..1 units as those of a screen.

    Black and white are three deviations from the mean, or 0 and 1 if those are nearer: of 16 bits a
    set may use so few that it would look like one gray.
    """
    low, high = max(0.0, mean - 3 * std), min(1.0, mean + 3 * std)
    if low >= high:  # a mean that is not one of such levels
        low, high = 0.0, 1.0
    shown: npt.NDArray[np.uint8] = np.rint(255 * ((levels - low) / (high - low)).clip(0, 1)).astype(
        np.uint8
    )
    return shown
