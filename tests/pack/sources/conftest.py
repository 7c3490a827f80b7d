"""What the tests of the sources share: noise that only its seed decides, and reading back."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.pack.inputs import Pixels
from fastmoco.pack.sources.base import Source

LIMIT = 2**27


def noise_of(*shape: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


@pytest.fixture(scope="session")
def noise() -> Callable[..., Any]:
    """`noise(*shape, seed)`, random bytes."""
    return noise_of


@pytest.fixture(scope="session")
def to_pixels() -> Callable[[Source], Any]:
    """`to_pixels(source)`, all its raw images through its inputs, stacked."""

    def read(source: Source) -> Any:
        found = [source.inputs[row] for row in range(len(source))]
        assert all(isinstance(one, Pixels) for one in found)
        assert all(one.array.flags.c_contiguous for one in found)
        assert all(one.array.dtype == np.uint8 for one in found)
        return np.stack([one.array for one in found])

    return read


@pytest.fixture(scope="session")
def get_bytes() -> Callable[[Source], dict[str, bytes]]:
    """`get_bytes(source)`, the encoded bytes of each image by name, through its inputs."""

    def read(source: Source) -> dict[str, bytes]:
        return {name: source.inputs[row].read(LIMIT) for row, name in enumerate(source.names)}

    return read


@pytest.fixture(scope="session")
def touch() -> Callable[..., None]:
    """`touch(root, *names)`: files that hold their own name."""

    def write(root: Path, *names: str) -> None:
        for name in names:
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(name.encode())

    return write


@pytest.fixture(scope="session")
def get_labels() -> Callable[[Source], dict[str, str]]:
    """`get_labels(source)`, the class name of each image by its own, "" for none."""

    def read(source: Source) -> dict[str, str]:
        names: Iterable[str] = source.names
        labels = source.labels.tolist()
        assert source.labels.dtype == np.int32
        pairs = zip(names, labels, strict=True)
        return {name: source.classes[label] if label >= 0 else "" for name, label in pairs}

    return read
