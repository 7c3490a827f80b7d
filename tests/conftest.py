"""Folders of images and packed sets that the tests share."""

import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from copies import NO_PIXELS
from PIL import Image

from fastmoco import cli
from fastmoco.config.loading import in_sections
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

MakeImages = Callable[..., Path]
RunCommand = Callable[..., tuple[int, str, str]]


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skip what is marked `gpu` where there is none."""
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("needs a CUDA device")


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


@pytest.fixture
def copied(small_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy of `small_set` that a test may write to and damage."""
    return ShardSet(Path(shutil.copytree(small_set.root, tmp_path / "copy", ignore=NO_PIXELS)))


@pytest.fixture
def recipe(small_set, tmp_path) -> Path:
    """A recipe of 12 steps on 24 images, as a file."""
    view = {"jitter": [0.4, 0.4, 0.4, 0.1], "grayscale": 0.2}
    values = {
        "name": "tiny",
        "data": [str(small_set.root)],
        "out": str(tmp_path / "run"),
        "monitor": {
            "bank": str(small_set.root),
            "queries": str(small_set.root),
            "k": 3,
            "every": 2,
        },
        "arch": "resnet10",
        "stem": "small-stride2",
        "dim": 16,
        "image_size": 16,
        "views": [view, view],
        "batch": 8,
        "bn_group": 4,
        "queue": 20,
        "momentum": 0.9,
        "optimizer": {"lr": 0.03},
        "schedule": {"epochs": 4},
        "log_every": 2,
        "checkpoint_every": 2,
        "threads": 1,
        "device": "cpu",
    }
    path = tmp_path / "tiny.yaml"
    path.write_text(yaml.safe_dump(in_sections(values)))
    return path


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> RunCommand:
    """`run("import", ...)` as on the command line: exit code, stdout, stderr."""

    def call(*arguments: object) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastmoco", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
            raise SystemExit(0)
        found = capsys.readouterr()
        return int(end.value.code or 0), found.out, found.err

    return call
