"""Settings and helpers of the loader's tests."""

import io
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import settings
from PIL import Image

from fastmoco.pack.options import PackOptions
from fastmoco.pack.writer import pack
from fastmoco.shardset import ShardSet

# The same examples on every run, however slow the machine.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")


def encoded(image: Image.Image, kind: str = "png", **options: object) -> np.ndarray:
    """Return the bytes of an image file."""
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return np.frombuffer(buffer.getvalue(), np.uint8)


@pytest.fixture(scope="session")
def encode() -> Callable[..., np.ndarray]:
    """`encode(image, kind="png", **options)`: the bytes of an image file."""
    return encoded


@pytest.fixture(scope="session")
def second_set(
    make_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> ShardSet:
    """An unlabelled set of 10 PNGs of 24 x 36, unlike those of `small_set`."""
    root = tmp_path_factory.mktemp("second")
    source = make_images(root / "source", (), per_class=10, size=(24, 36), extension="png")
    pack(source, root / "set", PackOptions())
    return ShardSet(root / "set")
