"""The views of an image in one compiled pass: crop, resize, colors, blur, normalization.

The same operators as torchvision's, in the order of the published recipes, on floats: nothing is
rounded between them, and values are clamped where torchvision clamps them. No array of a whole
batch is made on the way, and no Python runs between an image's pixels and its place in the batch.
"""

import math
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.load.jit import jit
from fastmoco.load.view_params import ViewParams

Table = npt.NDArray[np.float32]

_COLUMNS = (
    *("flip", "jitter", "brightness", "contrast", "saturation", "hue"),
    *("grayscale", "blur", "sigma", "solarize"),
)
# Columns of a table; the crop comes first.
_TOP, _LEFT, _HEIGHT, _WIDTH = range(4)
_FLIP, _JITTER, _BRIGHTNESS, _CONTRAST, _SATURATION, _HUE = range(4, 10)
_GRAYSCALE, _BLUR, _SIGMA, _SOLARIZE = range(10, 14)

_ZERO, _ONE, _FULL = np.float32(0), np.float32(1), np.float32(255)
_RED, _GREEN, _BLUE = np.float32(0.2989), np.float32(0.587), np.float32(0.114)  # torchvision's luma
_SEXTANTS, _TINY = np.float32(6), np.float32(1e-12)
_SOLARIZED_FROM = np.float32(128)
_STEP = np.float32(255 / 65535)  # of 16 bits, in levels of 255


def table(params: ViewParams) -> Table:
    """Return a view's parameters as the (n, 14) rows that `render_views` takes."""
    # A crop's numbers are exact in fp32: an image has at most 65,535 pixels a side.
    columns = [params.crop, *(getattr(params, name)[:, None] for name in _COLUMNS)]
    return np.concatenate(columns, axis=1, dtype=np.float32, casting="unsafe")


@jit
def render_views(
    pixels: npt.NDArray[np.uint8],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    params: Table,
    places: npt.NDArray[np.int64],
    scale: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Draw one view of some of n images.

    Args:
        pixels: flat RGB images, (H, W, 3) each.
        starts: (n,) where each image begins in `pixels`.
        sizes: (n, 2) height and width of each.
        params: (n, 14), see `table`.
        places: which of the n to draw.
        scale, shift: (3,) normalization: levels * scale + shift.
        out: (n, S, S, 3), written.
    """
    side = out.shape[1]
    planes = np.empty((side, 3, side), np.float32)
    for i in places:
        p = params[i]
        height, width = sizes[i]
        rows = pixels[starts[i] : starts[i] + height * width * 3].reshape(height, width * 3)
        _resize(rows, p, planes)
        if p[_JITTER]:
            _jitter(planes, p[_BRIGHTNESS], p[_CONTRAST], p[_SATURATION], p[_HUE])
        if p[_GRAYSCALE]:
            _grayscale(planes)
        _finish(planes, p, scale, shift, out[i])


@jit
def render_gray_views(
    pixels: npt.NDArray[np.uint16],
    starts: npt.NDArray[np.int64],
    sizes: npt.NDArray[np.int64],
    params: Table,
    places: npt.NDArray[np.int64],
    scale: npt.NDArray[np.float32],
    shift: npt.NDArray[np.float32],
    out: npt.NDArray[np.float32],
) -> None:
    """Draw one view of some of n images of one channel, which saturation and hue leave as it is.

    Args:
        pixels: flat images of 0..65535, (H, W) each.
        starts, sizes, params, places: see `render_views`.
        scale, shift: (1,) normalization: levels of 255 * scale + shift.
        out: (n, S, S, 1), written.
    """
    side = out.shape[1]
    planes = np.empty((side, 1, side), np.float32)
    for i in places:
        p = params[i]
        height, width = sizes[i]
        rows = pixels[starts[i] : starts[i] + height * width].reshape(height, width)
        _resize_gray(rows, p, planes)
        if p[_JITTER]:
            _jitter_gray(planes, p[_BRIGHTNESS], p[_CONTRAST])
        _finish(planes, p, scale, shift, out[i])


@jit
def _finish(planes: Any, p: Any, scale: Any, shift: Any, view: Any) -> None:
    """Do what is the same for any number of channels, and write the (side, side, C) view."""
    if p[_BLUR]:
        _blur(planes, p[_SIGMA])
    if p[_SOLARIZE]:
        _solarize(planes)
    side, channels = len(planes), planes.shape[1]
    for y in range(side):
        for channel in range(channels):
            for x in range(side):
                place = side - 1 - x if p[_FLIP] else x
                view[y, x, channel] = planes[y, channel, place] * scale[channel] + shift[channel]


@jit
def _taps(length: int, side: int) -> tuple[Any, Any]:
    """Return how an axis is resized with antialiasing, as torch and Pillow do it: by triangles.

    Returns:
        (side,) the first pixel that each output pixel takes, and (side, taps) weights of it and of
        those behind it, which sum to 1. Of equal number: a loop of unforeseeable length is slow.
    """
    scale = length / side
    support = max(scale, 1.0)
    taps = min(math.ceil(2 * support), length)
    first, weights = np.empty(side, np.int64), np.empty((side, taps), np.float32)
    for place in range(side):
        center = (place + 0.5) * scale
        low = min(max(int(center - support + 0.5), 0), length - taps)
        total = 0.0
        for k in range(taps):
            weight = max(1.0 - abs((low + k + 0.5 - center) / support), 0.0)
            weights[place, k] = weight
            total += weight
        for k in range(taps):
            weights[place, k] /= total
        first[place] = low
    return first, weights


@jit
def _resize(rows: Any, p: Any, planes: Any) -> None:
    """Cut out the crop and resize it to (side, 3, side) `planes`."""
    side = len(planes)
    top, left = int(p[_TOP]), int(p[_LEFT])
    height, width = int(p[_HEIGHT]), int(p[_WIDTH])
    down, down_weights = _taps(height, side)
    across, across_weights = _taps(width, side)
    row = np.empty(width * 3, np.float32)
    for y in range(side):
        row[:] = _ZERO
        for k in range(down_weights.shape[1]):
            weight = down_weights[y, k]
            pixels = rows[top + down[y] + k, 3 * left : 3 * (left + width)]
            for z in range(3 * width):
                row[z] += weight * np.float32(pixels[z])
        for x in range(side):
            red, green, blue = _ZERO, _ZERO, _ZERO
            start = 3 * across[x]
            for k in range(across_weights.shape[1]):
                weight = across_weights[x, k]
                red += weight * row[start + 3 * k]
                green += weight * row[start + 3 * k + 1]
                blue += weight * row[start + 3 * k + 2]
            planes[y, 0, x], planes[y, 1, x], planes[y, 2, x] = red, green, blue


@jit
def _resize_gray(rows: Any, p: Any, planes: Any) -> None:
    """Cut out the crop and resize it to (side, 1, side) `planes`, in levels of 255."""
    side = len(planes)
    top, left = int(p[_TOP]), int(p[_LEFT])
    height, width = int(p[_HEIGHT]), int(p[_WIDTH])
    down, down_weights = _taps(height, side)
    across, across_weights = _taps(width, side)
    row = np.empty(width, np.float32)
    for y in range(side):
        row[:] = _ZERO
        for k in range(down_weights.shape[1]):
            weight = down_weights[y, k] * _STEP
            pixels = rows[top + down[y] + k, left : left + width]
            for x in range(width):
                row[x] += weight * np.float32(pixels[x])
        for x in range(side):
            level = _ZERO
            for k in range(across_weights.shape[1]):
                level += across_weights[x, k] * row[across[x] + k]
            planes[y, 0, x] = level


@jit
def _clamp(level: Any) -> Any:
    level = level if level > _ZERO else _ZERO  # min and max of numba are not vectorized
    return level if level < _FULL else _FULL


@jit
def _luma(red: Any, green: Any, blue: Any) -> Any:
    return _RED * red + _GREEN * green + _BLUE * blue


@jit
def _jitter(planes: Any, brightness: Any, contrast: Any, saturation: Any, hue: Any) -> None:
    """Apply torchvision's `adjust_*` functions in this order, clamping after each."""
    side = len(planes)
    total = 0.0
    for y in range(side):
        total += _brighten(planes[y, 0], planes[y, 1], planes[y, 2], brightness)
    gray = (_ONE - contrast) * np.float32(total / (side * side))
    turn = _SEXTANTS * (hue % _ONE)
    for y in range(side):
        _recolor(planes[y, 0], planes[y, 1], planes[y, 2], contrast, gray, saturation, turn)


@jit
def _jitter_gray(planes: Any, brightness: Any, contrast: Any) -> None:
    flat = planes.reshape(-1)
    total = 0.0
    for i in range(len(flat)):
        flat[i] = _clamp(brightness * flat[i])
        total += flat[i]
    gray = (_ONE - contrast) * np.float32(total / len(flat))
    for i in range(len(flat)):
        flat[i] = _clamp(contrast * flat[i] + gray)


@jit
def _brighten(reds: Any, greens: Any, blues: Any, brightness: Any) -> Any:
    """Apply the brightness to a row; return the sum of its luma."""
    total: Any = _ZERO
    for x in range(len(reds)):
        red, green, blue = brightness * reds[x], brightness * greens[x], brightness * blues[x]
        red, green, blue = _clamp(red), _clamp(green), _clamp(blue)
        reds[x], greens[x], blues[x] = red, green, blue
        total += _luma(red, green, blue)
    return total


@jit
def _recolor(
    reds: Any, greens: Any, blues: Any, contrast: Any, gray: Any, saturation: Any, turn: Any
) -> None:
    # Without branches, and on rows of its own: so it is vectorized (1.8 against 16 ns a pixel).
    for x in range(len(reds)):
        red = _clamp(contrast * reds[x] + gray)
        green = _clamp(contrast * greens[x] + gray)
        blue = _clamp(contrast * blues[x] + gray)
        luma = (_ONE - saturation) * _luma(red, green, blue)
        red = _clamp(saturation * red + luma)
        green = _clamp(saturation * green + luma)
        blue = _clamp(saturation * blue + luma)
        # Through HSV (Smith 1978): the hue in sextants, turned, and each channel from it.
        most = red if red > green else green
        least = green if red > green else red
        most = blue if blue > most else most
        least = blue if blue < least else least
        chroma = most - least
        per = _ONE / (chroma + _TINY)
        of_red, of_green = (green - blue) * per, np.float32(2) + (blue - red) * per
        sextant = np.float32(4) + (red - green) * per
        sextant = of_green if most == green else sextant
        sextant = of_red if most == red else sextant
        sextant += turn
        reds[x] = most - chroma * _fall(np.float32(5) + sextant)
        greens[x] = most - chroma * _fall(np.float32(3) + sextant)
        blues[x] = most - chroma * _fall(np.float32(1) + sextant)


@jit
def _fall(sextant: Any) -> Any:
    """Return how far a channel lies below the largest one, as a share of the chroma."""
    # Of -1..5 for the color, 0..6 for its turn and 1..5 for the channel: no modulo, which would
    # not be vectorized.
    sextant -= _SEXTANTS if sextant >= _SEXTANTS else _ZERO
    sextant -= _SEXTANTS if sextant >= _SEXTANTS else _ZERO
    share = sextant if sextant < np.float32(2) else np.float32(4) - sextant
    share = share if share > _ZERO else _ZERO
    return share if share < _ONE else _ONE


@jit
def _grayscale(planes: Any) -> None:
    side = len(planes)
    for y in range(side):
        for x in range(side):
            luma = _luma(planes[y, 0, x], planes[y, 1, x], planes[y, 2, x])
            planes[y, 0, x] = planes[y, 1, x] = planes[y, 2, x] = luma


@jit
def _blur(planes: Any, sigma: Any) -> None:
    """Convolve with a Gaussian of 3 sigma to either side; edges are mirrored as in torchvision."""
    side, channels = len(planes), planes.shape[1]
    radius = math.ceil(np.float32(3) * sigma)
    kernel = np.empty(2 * radius + 1, np.float32)
    total = 0.0
    for k in range(2 * radius + 1):
        kernel[k] = math.exp(-0.5 * ((k - radius) / sigma) ** 2)
        total += kernel[k]
    for k in range(2 * radius + 1):
        kernel[k] /= total
    source = planes.copy().reshape(side, channels * side)
    column = np.empty(channels * side, np.float32)
    padded = np.empty(side + 2 * radius, np.float32)
    for y in range(side):
        column[:] = _ZERO
        for k in range(2 * radius + 1):
            weight, row = kernel[k], source[_mirrored(y + k - radius, side)]
            for z in range(channels * side):
                column[z] += weight * row[z]
        for channel in range(channels):
            line, soft = column[channel * side : (channel + 1) * side], planes[y, channel]
            for x in range(side):
                padded[radius + x] = line[x]
            for k in range(radius):
                padded[k] = line[_mirrored(k - radius, side)]
                padded[radius + side + k] = line[_mirrored(side + k, side)]
            soft[:] = _ZERO
            for k in range(2 * radius + 1):
                weight = kernel[k]
                for x in range(side):
                    soft[x] += weight * padded[x + k]


@jit
def _mirrored(place: int, side: int) -> int:
    """Return the pixel that stands at a place beyond the edge."""
    if side == 1:
        return 0
    place = abs(place) % (2 * side - 2)
    return min(place, 2 * side - 2 - place)


@jit
def _solarize(planes: Any) -> None:
    flat = planes.reshape(-1)
    for i in range(len(flat)):
        if flat[i] >= _SOLARIZED_FROM:
            flat[i] = _FULL - flat[i]
