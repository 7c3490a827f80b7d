"""Deciding what is stored for an image: its own bytes, a clean re-encoding, or a reason why not.

DALI cannot skip a damaged image, so every image is decoded here. Bytes are kept where the training
decoder is sure to read them as PIL does: 8-bit Huffman-coded JPEG, sequential or progressive, with
1 or 3 components; 8-bit PNG; still WebP whose EXIF is in step; each without EXIF rotation. All
other JPEG becomes JPEG of quality 95 without chroma subsampling, all other formats and raw pixels
become PNG, upright and 8-bit: more bits are mapped by levels or, of 16, rounded, alpha is dropped,
of an animation the first frame stays. With a short side to shrink to, larger images become JPEG.
Of a set of one channel, colors become gray, and 16-bit gray stays so, in PNG.

A large JPEG may be decoded at an eighth of its size: the entropy-coded data is read to its end all
the same, so the same files are refused (held by a test), at a third of the time.
"""

import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from importlib.util import find_spec

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from fastmoco.core.gray import gray_levels, is_deep
from fastmoco.pack.deep import SIXTEEN_BITS, Unfit, as_mode, get_span, to_depth
from fastmoco.pack.inputs import Input, Pixels, Unreadable
from fastmoco.pack.kinds import START, by_content, heif_is_read
from fastmoco.pack.levels import Levels, Span

MAX_SIDE = 2**16 - 1  # the sample table holds sides as uint16

# A closed list: PIL's other plugins are attack surface (EPS starts Ghostscript).
FORMATS: tuple[str, ...] = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
if find_spec("PIL.AvifImagePlugin"):  # since Pillow 11.3
    FORMATS += ("AVIF",)
if heif_is_read():
    import pillow_heif

    pillow_heif.register_heif_opener()
    FORMATS += ("HEIF",)
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
LONE_MARKERS = frozenset([0x00, 0x01, *range(0xD0, 0xDA)])  # not followed by a length
POWERS = np.arange(256, dtype=np.int64)[:, None] ** [1, 2]
SMALL = 2**16  # pixels up to which a scaled decode saves nothing


@dataclass(frozen=True, slots=True)
class Rules:
    """What is accepted, and what becomes of it.

    Attributes:
        min_side: the smallest height and width, in pixels.
        max_pixels: the largest area.
        max_bytes: the largest encoded size.
        rotated: bytes are kept although EXIF says to rotate the image.
        short_side: images with a longer short side are shrunk to it; None: none is.
        square: all are cut to their central square and resized to this side; None: none is.
        quality: of the JPEGs that resizing gives.
        levels: what becomes black and white of values of more than 8 bits; None: all of 16 bits.
        gray: all become one channel, in which 16 bits stay.
    """

    min_side: int = 1
    max_pixels: int = 100_000_000
    max_bytes: int = 128 * 2**20
    rotated: bool = False
    short_side: int | None = None
    square: int | None = None
    quality: int = 90
    levels: Levels | None = None
    gray: bool = False


@dataclass(frozen=True, slots=True)
class Statistics:
    """Sums over the pixels of an image: exact, so that no mean depends on the order of addition.

    Attributes:
        pixels: their number.
        sums: of the 0..255 values of R, G and B; of one channel, of the 0..65535 of gray.
        squares: of the squared values.
    """

    pixels: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Checked:
    """An image that decodes, and what is stored for it.

    Attributes:
        content: the bytes to store.
        extension: `jpg`, `png` or `webp`.
        height: in pixels.
        width: in pixels.
        progressive: whether it is a progressive JPEG.
        statistics: of its pixels, if they were asked for.
        span: of its values, if they had more than 8 bits.
        bits: of a channel, 8 or 16.
    """

    content: bytes
    extension: str
    height: int
    width: int
    progressive: bool
    statistics: Statistics | None
    span: Span | None = None
    bits: int = 8


def check_input(source: Input, rules: Rules, measure: bool) -> Checked | str:
    """Return what to store for an input, or the reason why it cannot be stored.

    Args:
        source: where the image lies.
        rules: what is accepted.
        measure: also give the statistics, for which the image is decoded in full size.
    """
    try:
        if isinstance(source, Pixels):
            return check_image(_png(Image.fromarray(source.array)), rules, measure)
        return check_image(source.read(rules.max_bytes), rules, measure)
    except Unreadable as reason:
        return str(reason)


def check_image(content: bytes, rules: Rules = Rules(), measure: bool = True) -> Checked | str:
    """Return what to store for an encoded image, or the reason why it cannot be stored."""
    try:
        return _check(content, rules, measure)
    except UnidentifiedImageError:
        kind = by_content(content[:START])
        return (kind and kind.about) or "is not an image of a known format"
    except Image.DecompressionBombError:
        return _too_many_pixels(rules)
    except Unfit as reason:
        return str(reason)
    except MemoryError:  # says something about this machine, not about the image
        raise
    except Exception as error:  # decoders raise anything on damaged bytes
        return f"cannot be decoded ({error})"


@contextmanager
def without_warnings() -> Iterator[None]:
    """Silence PIL, which warns of harmless oddities; the rules are ours."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def _check(content: bytes, rules: Rules, measure: bool) -> Checked:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _refuse_by_header(image, rules)
        if image.format == "PNG":
            _verify_checksums(content)
        if rules.square and image.size != (rules.square, rules.square):
            return _resized(image, content, rules.square, rules, measure)
        if rules.short_side and min(image.size) > rules.short_side:
            return _resized(image, content, rules.short_side, rules, measure)
        size = image.size
        # PIL's scaled decoder would also give way to a mode that is re-encoded: leave those alone.
        large = size[0] * size[1] > SMALL
        if not measure and large and image.format in ("JPEG", "MPO"):
            image.draft(None, (size[0] // 8, size[1] // 8))
        image.load()
        if not _is_kept(image, content, rules):
            plain, span = _reencoded(content, rules)
            # What the levels were for is done.
            return replace(_check(plain, replace(rules, levels=None), measure), span=span)
        return _described(image, content, size, rules, measure)


def _too_many_pixels(rules: Rules) -> str:
    return f"has more than {rules.max_pixels / 10**6:g} million pixels"


def _refuse_by_header(image: Image.Image, rules: Rules) -> None:
    width, height = image.size
    if width * height > rules.max_pixels:
        raise Unfit(_too_many_pixels(rules))
    if max(width, height) > MAX_SIDE:
        raise Unfit(f"has a side of more than {MAX_SIDE} pixels")
    if min(width, height) < rules.min_side:
        raise Unfit(f"is {width} x {height}, smaller than {rules.min_side} pixels")


def _verify_checksums(content: bytes) -> None:
    # PIL stops at the last pixel; libpng, which DALI uses, fails on damage behind it.
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.verify()


def _is_kept(image: Image.Image, content: bytes, rules: Rules) -> bool:
    # A camera's MPO is a JPEG with a preview behind it, which decoders do not look at.
    animated = image.format != "MPO" and getattr(image, "is_animated", False)
    if animated or (is_rotated(image) and not rules.rotated):
        return False
    if rules.gray and is_deep(image):
        return image.format == "PNG" and PNG_END in content and not rules.levels
    if rules.gray and image.mode not in ("L", "LA"):
        return False
    if image.format in ("JPEG", "MPO"):
        usual = (BASELINE, EXTENDED, PROGRESSIVE)
        return image.mode in ("L", "RGB") and _frame_marker(content) in usual
    if image.format == "PNG":
        # The bit depth stands in the header, which must come first; PIL pardons a damaged end.
        return content[24] == 8 and PNG_END in content
    return image.format == "WEBP" and not _has_exif_out_of_step(content)


def _has_exif_out_of_step(webp: bytes) -> bool:
    """Return whether EXIF stands behind a chunk of odd length.

    Such a chunk is padded to an even one, which the parser before DALI's decoder does not know: on
    its way to the EXIF, which it wants for the rotation, it loses step and fails.
    """
    at, odd = 12, False
    while at + 8 <= len(webp):
        name, size = webp[at : at + 4], int.from_bytes(webp[at + 4 : at + 8], "little")
        if name == b"EXIF":
            return odd
        odd = odd or size % 2 == 1
        at += 8 + size + size % 2
    return False


def is_rotated(image: Image.Image) -> bool:
    """Return whether EXIF or XMP says to rotate or mirror an image."""
    if image.format == "JPEG" and not {"exif", "xmp"} & image.info.keys():
        return False  # spares the parser, which takes a fifth of the time of a small image
    try:
        return image.getexif().get(ORIENTATION) in range(2, 9)
    except Exception:  # damaged EXIF: nobody else can rotate by it either
        return False


def _frame_marker(content: bytes) -> int:
    """Return the marker byte that says how a JPEG is coded, 0 if the way there is not regular.

    PIL pardons stray bytes between the segments; the parser before DALI's decoder does not.
    """
    frame, at = 0, 2
    while content[at : at + 1] == b"\xff" and at + 4 <= len(content):
        marker = content[at + 1]
        if marker == SCAN:
            return frame
        if marker in LONE_MARKERS:
            return 0
        if marker in FRAME_MARKERS:
            frame = marker
        fill = marker == 0xFF
        at += 1 if fill else 2 + int.from_bytes(content[at + 2 : at + 4])
    return 0


def _reencoded(content: bytes, rules: Rules) -> tuple[bytes, Span | None]:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        plain, span = _upright(image, content, rules)
        jpeg = image.format in ("JPEG", "MPO")
        return _jpeg(plain, 95, "4:4:4") if jpeg else _png(plain), span


def _resized(
    image: Image.Image, original: bytes, short_side: int, rules: Rules, measure: bool
) -> Checked:
    # Twice the size is left for the filter, as PIL's own thumbnails do.
    scale = short_side / min(image.size)
    image.draft(None, (round(2 * scale * image.width), round(2 * scale * image.height)))
    plain, span = _upright(image, original, rules)
    if rules.square:
        side = min(plain.size)
        left, top = (plain.width - side) // 2, (plain.height - side) // 2
        plain = plain.crop((left, top, left + side, top + side))
    scale = short_side / min(plain.size)
    size = (
        max(short_side, round(scale * plain.width)),
        max(short_side, round(scale * plain.height)),
    )
    bilinear = Image.Resampling.BILINEAR  # as training resizes: antialiased
    if is_deep(plain):  # on floats, since PIL resizes no 16 bits; and JPEG holds none
        small = Image.fromarray(np.asarray(plain).astype(np.float32)).resize(size, bilinear)
        small = Image.fromarray(np.rint(np.asarray(small)).astype(np.uint16))
    else:
        small = plain.resize(size, bilinear)
    return Checked(
        content=_png(small) if is_deep(small) else _jpeg(small, rules.quality, "4:2:0"),
        extension="png" if is_deep(small) else "jpg",
        height=small.height,
        width=small.width,
        progressive=False,
        statistics=_statistics(small, rules.gray) if measure else None,
        span=span,
        bits=16 if is_deep(small) else 8,
    )


def _upright(image: Image.Image, content: bytes, rules: Rules) -> tuple[Image.Image, Span | None]:
    """Return the image as a set has it, turned as its EXIF tag says, and its span."""
    turned = is_rotated(image)
    plain, span = to_depth(image, content, rules.levels, rules.gray)
    plain.load()
    if turned:
        plain.getexif()[ORIENTATION] = image.getexif()[ORIENTATION]
        plain = ImageOps.exif_transpose(plain)
    plain.info = {}  # else PIL writes the profile and comments of the old pixels
    return plain, span


def _jpeg(image: Image.Image, quality: int, subsampling: str) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality, subsampling=subsampling)
    return buffer.getvalue()


def _png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


def _described(
    image: Image.Image, content: bytes, size: tuple[int, int], rules: Rules, measure: bool
) -> Checked:
    deep = is_deep(image)
    extension = EXTENSIONS[str(image.format)]
    return Checked(
        content=content,
        extension=extension,
        height=size[1],
        width=size[0],
        progressive=extension == "jpg" and _frame_marker(content) == PROGRESSIVE,
        statistics=_statistics(image, rules.gray) if measure else None,
        span=get_span(np.asarray(image), "16-bit gray", SIXTEEN_BITS) if deep else None,
        bits=16 if deep else 8,
    )


def _statistics(image: Image.Image, gray: bool) -> Statistics:
    if gray:
        levels = gray_levels(image).astype(np.int64)
        return Statistics(levels.size, (int(levels.sum()),), (int((levels * levels).sum()),))
    counts = np.array(as_mode(image, "RGB").histogram(), dtype=np.int64).reshape(3, 256)
    sums, squares = (counts @ POWERS).T.tolist()
    return Statistics(image.width * image.height, tuple(sums), tuple(squares))
