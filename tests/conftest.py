"""Folders of images and packed sets that the tests share."""

from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.pack.options import PackOptions
from fastmoco.pack.writer import pack
from fastmoco.shardset import ShardSet

MakeImages = Callable[..., Path]


def picture(seed: int, size: tuple[int, int] = (40, 32)) -> Image.Image:
    """Return a smooth RGB picture that only its seed decides; size is (width, height)."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC)


def write_images(
    root: Path,
    classes: Sequence[str] = ("cat", "dog"),
    per_class: int = 4,
    size: tuple[int, int] = (40, 32),
    extension: str = "jpg",
) -> Path:
    """Write `root/<class>/<number>.<extension>`, each another; no classes: flat."""
    for number, name in enumerate(classes or ("",)):
        (root / name).mkdir(parents=True, exist_ok=True)
        for index in range(per_class):
            image = picture(1000 * number + index, size)
            image.save(root / name / f"{index:04d}.{extension}")
    return root


@pytest.fixture(scope="session")
def make_images() -> MakeImages:
    """`make_images(root, classes=("cat", "dog"), per_class=4, size=(width, height), extension)`."""
    return write_images


@pytest.fixture(scope="session")
def make_picture() -> Callable[..., Image.Image]:
    """`make_picture(seed, size=(width, height))`, a smooth RGB picture."""
    return picture


@pytest.fixture(scope="session")
def small_set(tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """A labelled set of 3 classes with 8 JPEGs of 40 x 32 each. Read it, never write to it."""
    root = tmp_path_factory.mktemp("small")
    source = write_images(root / "source", ("ape", "bee", "cow"), per_class=8)
    pack(source, root / "set", PackOptions())
    return ShardSet(root / "set")
