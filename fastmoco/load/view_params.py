"""The numbers behind the views: a pure function of (seed, position), drawn before any pixel.

Each position owns `DRAWS` numbers a view from numpy's counter-based Philox, so a rank reaches its
slice of the stream in one `advance`, and any executor given these numbers draws the same views.
"""

from collections.abc import Callable
from dataclasses import dataclass, fields

import numpy as np
import numpy.typing as npt

from fastmoco.config.recipe import View

Floats = npt.NDArray[np.float32]
Bools = npt.NDArray[np.bool_]

_TRIES = 10  # crops tried before the fallback, as in torchvision's RandomResizedCrop


@dataclass(frozen=True)
class ViewParams:
    """What is done to each of n images, in this order.

    Attributes:
        crop: (n, 4) int32 top, left, height, width in pixels of the source.
        jitter: (n,) whether the four color numbers apply; they are neutral where not.
        brightness, contrast, saturation: (n,) factors, as in torchvision.
        hue: (n,) in turns, -0.5..0.5.
        grayscale, blur, solarize, flip: (n,) whether to apply each.
        sigma: (n,) standard deviation of the blur, in output pixels.
    """

    crop: npt.NDArray[np.int32]
    jitter: Bools
    brightness: Floats
    contrast: Floats
    saturation: Floats
    hue: Floats
    grayscale: Bools
    blur: Bools
    sigma: Floats
    solarize: Bools
    flip: Bools

    def rows(self, which: slice | npt.NDArray[np.int64]) -> "ViewParams":
        """Return the numbers of some of the images."""
        return ViewParams(*(getattr(self, f.name)[which] for f in fields(self)))


def draw(view: View, u: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]) -> ViewParams:
    """Turn uniform numbers into a view's numbers.

    Args:
        view: what to draw from.
        u: (n, DRAWS) uniform numbers, see `uniforms`.
        sizes: (n, 2) height and width of the images.
    """
    crop = _CROPS[view.crop](view, u[:, : 2 * _TRIES + 2], sizes)
    rest = u[:, 2 * _TRIES + 2 :].T
    flip, jitter, grayscale, blur = (
        rest[i] < p for i, p in enumerate((view.flip, view.jitter_p, view.grayscale, view.blur))
    )
    brightness, contrast, saturation = (
        np.where(jitter, 1 + strength * (2 * rest[4 + i] - 1), 1.0).astype(np.float32)
        for i, strength in enumerate(view.jitter[:3])
    )
    hue = np.where(jitter, view.jitter[3] * (2 * rest[7] - 1), 0.0).astype(np.float32)
    low, high = view.blur_sigma
    sigma = (low + (high - low) * rest[8]).astype(np.float32)
    solarize = rest[9] < view.solarize
    return ViewParams(
        crop, jitter, brightness, contrast, saturation, hue, grayscale, blur, sigma, solarize, flip
    )


def _crops(
    view: View, u: npt.NDArray[np.float64], sizes: npt.NDArray[np.int64]
) -> npt.NDArray[np.int32]:
    """Draw crops by the rule of torchvision's `RandomResizedCrop.get_params`, all at once."""
    height, width = sizes[:, 0], sizes[:, 1]
    tries = u[:, : 2 * _TRIES].reshape(-1, _TRIES, 2)
    low, high = view.scale
    area = (height * width)[:, None] * (low + (high - low) * tries[..., 0])
    bounds = np.log(view.ratio)
    ratio = np.exp(bounds[0] + (bounds[1] - bounds[0]) * tries[..., 1])
    w = np.rint(np.sqrt(area * ratio)).astype(np.int64)
    h = np.rint(np.sqrt(area / ratio)).astype(np.int64)
    fits = (w > 0) & (w <= width[:, None]) & (h > 0) & (h <= height[:, None])
    first = (np.arange(len(u)), fits.argmax(axis=1))
    h, w = h[first], w[first]
    top = np.floor(u[:, -2] * (height - h + 1)).astype(np.int64)
    left = np.floor(u[:, -1] * (width - w + 1)).astype(np.int64)
    drawn = np.stack([top, left, h, w], axis=1)
    return np.where(fits.any(axis=1)[:, None], drawn, _fallback(view, sizes)).astype(np.int32)


def _fallback(view: View, sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """Return the central crop whose aspect ratio lies within bounds."""
    height, width = sizes[:, 0], sizes[:, 1]
    ratio = np.clip(width / height, *view.ratio)
    w = np.clip(np.rint(height * ratio), 1, width).astype(np.int64)
    h = np.clip(np.rint(width / ratio), 1, height).astype(np.int64)
    return np.stack([(height - h) // 2, (width - w) // 2, h, w], axis=1)


def _whole(sizes: npt.NDArray[np.int64]) -> npt.NDArray[np.int32]:
    return np.concatenate([np.zeros_like(sizes), sizes], axis=1).astype(np.int32)


def _central(sizes: npt.NDArray[np.int64], share: float = 1.0) -> npt.NDArray[np.int32]:
    """Return the central square of `share` of the short side."""
    side = np.rint(sizes.min(axis=1) * share).astype(np.int64)
    corner = (sizes - side[:, None]) // 2
    return np.concatenate([corner, side[:, None], side[:, None]], axis=1).astype(np.int32)


_CROPS: dict[str, Callable[..., npt.NDArray[np.int32]]] = {
    "random": _crops,
    "center": lambda view, u, sizes: _central(sizes),
    "none": lambda view, u, sizes: _whole(sizes),
}


def central(sizes: npt.NDArray[np.int64], share: float) -> ViewParams:
    """Return the numbers of the evaluation view: a central square of `share` of the short side.

    Resizing that square to S equals resizing the short side to S / share and cutting the center.

    Args:
        sizes: (n, 2) height and width of the images.
        share: 1.0 for small images, 224 / 256 for the usual ImageNet evaluation.
    """
    one, off = np.ones(len(sizes), np.float32), np.zeros(len(sizes), np.bool_)
    crop = _central(sizes, share)
    return ViewParams(crop, off, one, one, one, one * 0, off, off, one, off, off)


def color_maps(numbers: ViewParams) -> tuple[Floats, Floats]:
    """Return brightness, contrast, saturation, hue and grayscale as one affine map of the colors.

    rgb -> matrix @ rgb + share * g, where g is the mean gray of the crop: torchvision's functions
    in this order, without the rounding and clamping between them. Hue turns about the gray axis,
    which keeps grays and the mean of the channels: of all linear maps near to torchvision's turn in
    HSV, which is none. (A turn in YIQ, as DALI's own, is off by twice as much.)

    Returns:
        (n, 3, 3) matrices and (n,) shares.
    """
    colorful = ~numbers.grayscale
    gain = numbers.brightness * numbers.contrast
    saturation = numbers.saturation * colorful
    turn = _turns(2 * np.pi * numbers.hue.astype(np.float64) * colorful)
    matrix = gain[:, None, None] * (turn @ _blends(saturation))
    return matrix.astype(np.float32), numbers.brightness * (1 - numbers.contrast)


def _blends(saturation: Floats) -> npt.NDArray[np.float64]:
    """Return the (n, 3, 3) matrices that mix colors with their luma."""
    share = saturation[:, None, None].astype(np.float64)
    mixed: npt.NDArray[np.float64] = share * np.eye(3) + (1 - share) * np.tile(_LUMA, (3, 1))
    return mixed


def _turns(angle: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Return the (n, 3, 3) rotations about the gray axis, red towards green (Rodrigues)."""
    cosine, sine = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    turned: npt.NDArray[np.float64] = cosine * np.eye(3) + sine * _CROSS + (1 - cosine) / 3
    return turned


_LUMA = np.array([0.299, 0.587, 0.114])  # of ITU-R BT.601, as in PIL
_CROSS = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
