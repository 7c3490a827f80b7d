"""Deciding what is stored for an image: its own bytes, a clean re-encoding, or a reason why not.

DALI cannot skip a damaged image, so every image is decoded in full here. Bytes are kept where the
training decoder is sure to read them as PIL does: 8-bit Huffman-coded JPEG, sequential or
progressive, with 1 or 3 components; 8-bit PNG; still WebP; each without EXIF rotation. All other
JPEG becomes JPEG of quality 95 without chroma subsampling, all other formats become PNG, upright
and 8-bit (16-bit grey is rounded, of 16-bit colour PIL gives the high byte).
"""

import io
import os
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

MAX_BYTES = 128 * 2**20
MAX_PIXELS = 100_000_000
MAX_SIDE = 2**16 - 1  # the sample table holds sides as uint16

# A closed list: PIL's other plugins are attack surface (EPS starts Ghostscript).
FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "TIFF", "GIF", "PPM")
EXTENSIONS = {"JPEG": "jpg", "MPO": "jpg", "PNG": "png", "WEBP": "webp"}
ORIENTATION = 0x0112
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
BASELINE, EXTENDED, PROGRESSIVE = 0xC0, 0xC1, 0xC2
FRAME_MARKERS = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
SCAN = 0xDA
LONE_MARKERS = frozenset([0x00, 0x01, *range(0xD0, 0xDA)])  # not followed by a length


@dataclass(frozen=True, slots=True)
class Checked:
    """An image that decodes, and what is stored for it.

    Attributes:
        content: the bytes to store.
        extension: `jpg`, `png` or `webp`.
        height: in pixels.
        width: in pixels.
        sums: of the 0..255 values of R, G and B over all pixels: exact, so that no mean
            depends on the order of addition.
        squares: of the squared values.
        progressive: whether it is a progressive JPEG.
    """

    content: bytes
    extension: str
    height: int
    width: int
    sums: tuple[int, ...]
    squares: tuple[int, ...]
    progressive: bool


class _Unfit(Exception):
    """An image that is refused by rule; the message is the reason."""


def check_file(path: Path, min_side: int = 1) -> Checked | str:
    """Return what to store for an image file, or the reason why it cannot be stored.

    Args:
        path: a regular file.
        min_side: the smallest height and width allowed, in pixels.
    """
    try:
        if os.stat(path).st_size > MAX_BYTES:
            return f"is larger than {MAX_BYTES >> 20} MiB"
        return check_image(path.read_bytes(), min_side)
    except OSError as error:
        return f"cannot be read ({error.strerror})"


def check_image(content: bytes, min_side: int = 1) -> Checked | str:
    """Return what to store for an encoded image, or the reason why it cannot be stored."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # PIL warns of harmless oddities; the rules are ours
        try:
            return _check(content, min_side)
        except UnidentifiedImageError:
            return "is not an image of a known format"
        except Image.DecompressionBombError:
            return _TOO_MANY_PIXELS
        except _Unfit as reason:
            return str(reason)
        except MemoryError:  # says something about this machine, not about the image
            raise
        except Exception as error:  # decoders raise anything on damaged bytes
            return f"cannot be decoded ({error})"


_TOO_MANY_PIXELS = f"has more than {MAX_PIXELS // 10**6} million pixels"


def _check(content: bytes, min_side: int) -> Checked:
    with Image.open(io.BytesIO(content), formats=FORMATS) as image:
        _refuse_by_header(image, min_side)
        if image.format == "PNG":
            _verify_checksums(content)
        image.load()
        if not _is_kept(image, content):
            return _check(_reencoded(image), min_side)
        return _described(image, content)


def _refuse_by_header(image: Image.Image, min_side: int) -> None:
    width, height = image.size
    if width * height > MAX_PIXELS:
        raise _Unfit(_TOO_MANY_PIXELS)
    if max(width, height) > MAX_SIDE:
        raise _Unfit(f"has a side of more than {MAX_SIDE} pixels")
    if min(width, height) < min_side:
        raise _Unfit(f"is {width} x {height}, smaller than {min_side} pixels")
    # A camera's MPO is a JPEG with a preview behind it, which decoders do not look at.
    if image.format != "MPO" and getattr(image, "is_animated", False):
        raise _Unfit("has more than one frame")


def _verify_checksums(content: bytes) -> None:
    # PIL stops at the last pixel; libpng, which DALI uses, fails on damage behind it.
    with Image.open(io.BytesIO(content), formats=["PNG"]) as image:
        image.verify()


def _is_kept(image: Image.Image, content: bytes) -> bool:
    if _is_rotated(image):
        return False
    if image.format in ("JPEG", "MPO"):
        usual = (BASELINE, EXTENDED, PROGRESSIVE)
        return image.mode in ("L", "RGB") and _frame_marker(content) in usual
    if image.format == "PNG":
        # The bit depth stands in the header, which must come first; PIL pardons a damaged end.
        return content[24] == 8 and PNG_END in content
    return image.format == "WEBP"


def _is_rotated(image: Image.Image) -> bool:
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


def _reencoded(image: Image.Image) -> bytes:
    upright = ImageOps.exif_transpose(image) if _is_rotated(image) else image
    plain = _eight_bit(upright)
    plain.info = {}  # else PIL writes the profile and comments of the old pixels
    buffer = io.BytesIO()
    if image.format in ("JPEG", "MPO"):
        plain.save(buffer, "JPEG", quality=95, subsampling="4:4:4")
    else:
        plain.save(buffer, "PNG")
    return buffer.getvalue()


def _eight_bit(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16"):
        values = np.asarray(image).astype(np.uint32)
        return Image.fromarray(((values + 128) // 257).astype(np.uint8))
    if image.mode in ("I", "F"):
        raise _Unfit("holds 32-bit values, whose range is not known")
    return image.convert("L" if image.mode in ("1", "L") else "RGB")


def _described(image: Image.Image, content: bytes) -> Checked:
    counts = np.array(image.convert("RGB").histogram(), dtype=np.int64).reshape(3, 256)
    values = np.arange(256, dtype=np.int64)
    extension = EXTENSIONS[str(image.format)]
    return Checked(
        content=content,
        extension=extension,
        height=image.height,
        width=image.width,
        sums=tuple(map(int, counts @ values)),
        squares=tuple(map(int, counts @ values**2)),
        progressive=extension == "jpg" and _frame_marker(content) == PROGRESSIVE,
    )
