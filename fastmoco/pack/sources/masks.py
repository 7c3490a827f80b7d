"""Telling folders of masks from folders of images: a mask is no class of its own."""

import io
import os
import re
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
from PIL import Image

from fastmoco.pack.image import FORMATS, without_warnings
from fastmoco.pack.inputs import Inputs, Pixels, Unreadable
from fastmoco.pack.sources.base import Names
from fastmoco.pack.sources.tree import Node, tokens

_WORDS = frozenset(
    {
        *(
            "mask",
            "masks",
            "label",
            "labels",
            "annotation",
            "annotations",
            "annot",
            "gt",
            "groundtruth",
        ),
        *("trimap", "trimaps", "seg", "segmentation", "segmentations", "matte", "mattes"),
    }
)
_ENDINGS = re.compile(
    r"[-_. ]?(masks?|labels?|label_?ids|labelIds|gt|seg(mentation)?|annotation|matte|image|img|sat"
    r"|gtFine|gtCoarse|color|instanceIds|leftImg8bit|[LP])$",
)
_BESIDE = re.compile(
    r"(.+)[-_. ](masks?|gt|groundtruth|seg|segmentation|labels?|annotations?|mattes?)",
    re.IGNORECASE,
)
_MOST = 10  # folders beside each other: sets with masks have few, and sets with classes many
_SAMPLE = 4  # images of a folder that are looked at
_FEW = 16  # values that a mask has at most
_LIMIT = 2**26  # bytes


def masked_folders(
    node: Node, stems: Callable[[Node], set[str]], few: Callable[[Node], bool]
) -> tuple[Node, Node] | None:
    """Return the folder of masks and that of their images among the children of a folder.

    They have the same stems; and the name of one says that it holds masks, or its images have few
    values and those of the other have many. Every class may have a `0000.jpg`: stems alone do not
    tell.

    Args:
        node: the folder above.
        stems: gives those of the files in a folder and below; see `get_stems`.
        few: tells whether images have few values; see `few_valued`.
    """
    children = list(node.children.values())
    if not 2 <= len(children) <= _MOST:
        return None
    for mask in children:
        for image in children:
            if mask is image or _says_mask(image):
                continue
            differ = _says_mask(mask) or (few(mask) and not few(image))
            if differ and _stems_agree(stems(mask), stems(image)):
                return mask, image
    return None


def mask_beside(names: Iterable[str]) -> str | None:
    """Return a file that is the mask of one in the same folder, by its name; None if there is none.

    `x_mask.png` beside `x.png`. So it must be for most files of such a name.

    Args:
        names: all files, with slashes; iterated twice.
    """
    masks: dict[str, str] = {}
    for name in names:
        match = _BESIDE.fullmatch(_without_extension(name))
        if match:
            masks[match[1]] = name
    if not masks:
        return None
    images = {stem for name in names if (stem := _without_extension(name)) in masks}
    return masks[min(images)] if len(images) >= 0.9 * len(masks) else None


def _without_extension(name: str) -> str:
    return os.path.splitext(name)[0]


def _stems_agree(masks: set[str], images: set[str]) -> bool:
    return len(masks & images) >= 0.9 * len(masks)


def _says_mask(node: Node) -> bool:
    names = [node.name]
    while (child := node.only_child) is not None:
        node = child
        names.append(node.name)
    words = [word for name in names for word in tokens(name)]
    return not _WORDS.isdisjoint(words) or {"ground", "truth"} <= set(words)


def get_stems(names: Names, rows: npt.NDArray[np.int64]) -> set[str]:
    """Return the names of files without folder, extension and what tells a mask from its image."""
    found = set()
    for row in rows.tolist():
        stem = names[row].rpartition("/")[2].rpartition(".")[0]
        while (short := _ENDINGS.sub("", stem)) not in (stem, ""):
            stem = short
        found.add(stem)
    return found


def few_valued(inputs: Inputs, rows: Sequence[int]) -> bool:
    """Return whether the first of some images are of few values, as masks are."""
    seen = [_is_few(inputs, row) for row in rows[:_SAMPLE]]
    return bool(seen) and all(seen)


def _is_few(inputs: Inputs, row: int) -> bool:
    source = inputs[row]
    if isinstance(source, Pixels):
        return False
    try:
        with (
            without_warnings(),
            Image.open(io.BytesIO(source.read(_LIMIT)), formats=FORMATS) as image,
        ):
            if image.mode == "1" or (image.mode == "P" and image.format == "PNG"):
                return True
            return image.getcolors(_FEW) is not None
    except (Unreadable, Image.DecompressionBombError):
        return False
    except MemoryError:
        raise
    except Exception:  # decoders raise anything on damaged bytes, which the pack will list
        return False
