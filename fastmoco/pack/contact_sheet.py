"""A sheet of samples, to look at what a set holds."""

import io
import math
import os
import warnings
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from fastmoco.core.files import SOFTWARE
from fastmoco.core.gray import as_shown, gray_levels
from fastmoco.core.terminal import printable
from fastmoco.dataset.shard_set import ShardSet

_CELL, _GAP, _LINE = 128, 8, 16  # pixels of the sheet: an image's side, a gap, a line of text
_INK, _PAPER, _LOST = "#222222", "#ffffff", "#dddddd"


def draw_sheet(shard_set: ShardSet, rows: Sequence[int], captions: Sequence[str]) -> bytes:
    """Return a PNG of samples as a grid, row by row; one that cannot be read is gray.

    Args:
        shard_set: the set.
        rows: one sample or more.
        captions: what is written below each.
    """
    columns = math.ceil(math.sqrt(len(rows)))
    pitch = _CELL + _GAP, _CELL + _LINE + _GAP
    lines = math.ceil(len(rows) / columns)
    sheet = Image.new("RGB", (columns * pitch[0] + _GAP, lines * pitch[1] + _GAP), _PAPER)
    for number, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        corner = number % columns * pitch[0] + _GAP, number // columns * pitch[1] + _GAP
        _draw(sheet, corner, _thumbnail(shard_set, row), printable(caption))
    buffer = io.BytesIO()
    mark = PngInfo()
    mark.add_text("Software", SOFTWARE)
    sheet.save(buffer, "PNG", pnginfo=mark)
    return buffer.getvalue()


def _draw(sheet: Image.Image, corner: tuple[int, int], picture: Image.Image, caption: str) -> None:
    left, top = corner
    sheet.paste(picture, (left + (_CELL - picture.width) // 2, top + (_CELL - picture.height) // 2))
    pen, font = ImageDraw.Draw(sheet), ImageFont.load_default(size=12)
    while pen.textlength(caption, font) > _CELL:
        caption = caption.removesuffix("…")[:-1] + "…"
    pen.text((left, top + _CELL + 1), caption, _INK, font)


def _thumbnail(shard_set: ShardSet, row: int) -> Image.Image:
    """Return a sample no larger than a cell; small ones by whole factors, gray if unreadable."""
    entry = shard_set.samples[row]
    path = shard_set.root / shard_set.manifest.shards[int(entry["shard"])].name
    try:
        with path.open("rb") as stream, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PIL warns of harmless oddities
            content = os.pread(stream.fileno(), int(entry["size"]), int(entry["offset"]))
            with Image.open(io.BytesIO(content), formats=("JPEG", "PNG", "WEBP")) as image:
                if shard_set.manifest.channels == 1:
                    of = shard_set.manifest.mean[0], shard_set.manifest.std[0]
                    levels = as_shown(gray_levels(image) / 65535, *of)
                    return _fitted(Image.fromarray(levels))
                image.draft("RGB", (_CELL, _CELL))
                return _fitted(image.convert("RGB"))
    except MemoryError:
        raise
    except Exception:  # decoders raise anything on damaged bytes, and the sheet shows them too
        return Image.new("RGB", (_CELL, _CELL), _LOST)


def _fitted(image: Image.Image) -> Image.Image:
    factor = _CELL // max(image.size)
    if factor > 1:
        return image.resize((image.width * factor, image.height * factor), Image.Resampling.NEAREST)
    image.thumbnail((_CELL, _CELL))
    return image
