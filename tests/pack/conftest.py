"""Shards of others."""

import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tars import encoded, write_tar

Picture = Callable[..., Image.Image]


@pytest.fixture
def jpeg(make_picture: Picture) -> Callable[..., bytes]:
    """`jpeg(seed)`, another small JPEG for each seed."""
    return lambda seed, **options: encoded(make_picture(seed), **options)


@pytest.fixture
def folder(tmp_path: Path, jpeg: Callable[..., bytes]) -> Path:
    """Two shards as webdataset writes them, with labels and captions."""
    root = tmp_path / "shards"
    for shard in range(2):
        members = []
        for number in range(4):
            key = f"{shard}{number:03d}"
            members += [
                (f"{key}.cls", str(number % 3).encode()),
                (f"{key}.jpg", jpeg(10 * shard + number)),
                (f"{key}.txt", b"a caption"),
            ]
        write_tar(root / f"part-{shard}.tar", members, tarfile.PAX_FORMAT)
    return root
