"""Images of more than 8 bits: whether their values fill the range that 0..255 is made of."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from fastmoco.errors import DataError, UsageError

SAMPLE = 256  # images of a set that are judged; the order being shuffled, the first are a sample
_FILLED = 1 / 4  # of the range, at least: 14-bit cameras come close to it

Levels = tuple[float, float]


@dataclass(frozen=True, slots=True)
class Span:
    """The values of one image.

    Attributes:
        kind: what they are, in words.
        full: what the type allows; None: no range is known.
        least, most: of all pixels.
        low, high: what 99.8 % of the pixels lie within: a hot pixel fills no range.
    """

    kind: str
    full: Levels | None
    least: float
    most: float
    low: float
    high: float


def parse_levels(text: str | None) -> Levels | None:
    """Read `0:4095`.

    Raises:
        UsageError: it is not two numbers, the lower one first.
    """
    if text is None:
        return None
    low, _, high = text.partition(":")
    try:
        levels = float(low), float(high)
    except ValueError:
        levels = 0.0, 0.0
    if not (math.isfinite(levels[0]) and levels[0] < levels[1] < math.inf):
        raise UsageError(f"--levels {text}: write LOW:HIGH, what becomes black and what white.")
    return levels


def judge(spans: Sequence[Span]) -> None:
    """Refuse values that would come out nearly black, or whose range nobody knows.

    Raises:
        DataError: naming the levels that would fit.
    """
    for full in (None, *{span.full for span in spans if span.full}):
        some = [span for span in spans if span.full == full]
        if not some:
            continue
        least, most = min(span.least for span in some), max(span.most for span in some)
        low, high = min(span.low for span in some), max(span.high for span in some)
        if full and high - low >= _FILLED * (full[1] - full[0]):
            continue
        if full and most - least >= _FILLED * (full[1] - full[0]):
            least, most = low, high  # a few pixels lie apart
        use = (
            f"use {least:g} to {most:g} of {full[0]:g} to {full[1]:g}: they would be nearly of one "
            f"color (--levels {full[0]:g}:{full[1]:g} keeps them so)"
            if full
            else f"hold {least:g} to {most:g}, and nothing tells their range"
        )
        raise DataError(
            f"{some[0].kind} images {use}. Nothing was packed. Say what becomes black and white, "
            f"by the values of {len(some)} images: --levels {_suggested(least, most)}"
        )


def _suggested(least: float, most: float) -> str:
    """Return levels that hold the values: 0 and a round number if they begin near 0."""
    if not least.is_integer() or not most.is_integer():
        low, high = (0.0, 1.0) if least >= 0 and most <= 1 else (least, most)
    else:
        low, high = 0.0, 2.0 ** math.ceil(math.log2(max(most, 1) + 1)) - 1
    if least < low or least > high / 4:
        low, high = least, most
    # Not rounded: the levels must hold the values.
    return f"{low:.17g}:{max(high, math.nextafter(low, math.inf)):.17g}"
