"""A small run folder, made by hand, and a test set to go with `small_set`."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import recipe_from

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.recipe import Recipe
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.models.encoder import Encoder
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.runs.run_folder import RunFolder

STEP = 12


@pytest.fixture(scope="session")
def unseen_set(
    make_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> ShardSet:
    """Another set of `small_set`'s three classes, 5 PNGs of 32 x 48 each."""
    root = tmp_path_factory.mktemp("test")
    source = make_images(root / "source", ("ape", "bee", "cow"), 5, (32, 48), "png")
    pack(source, root / "set", PackOptions(seed=5))
    return ShardSet(root / "set")


def recipe_of(root: Path, **changes: Any) -> Recipe:
    values = {
        "name": "tiny",
        "data": ["/nowhere"],
        "out": str(root),
        "arch": "resnet10",
        "stem": "small-stride2",
        "dim": 8,
        "image_size": 16,
        "views": [{}, {}],
        "batch": 8,
        "bn_group": 4,
        "optimizer": {"lr": 0.1},
        "schedule": {"epochs": 1},
        "precision": "fp32",
        "device": "cpu",
        "threads": 1,
    }
    return recipe_from(values | changes)


@pytest.fixture(scope="session")
def trained() -> Encoder:
    """An encoder whose statistics have moved: evaluation and training mode differ."""
    torch.manual_seed(0)
    encoder = Encoder(EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8))
    with torch.no_grad():
        for _ in range(3):
            encoder(2 + torch.randn(8, 3, 16, 16))
    return encoder.eval()


@pytest.fixture
def make_run(tmp_path: Path, trained: Encoder) -> Callable[..., RunFolder]:
    """`make_run(weights=None, **recipe)`: a run folder with one checkpoint, of `trained`."""

    def make(weights: dict[str, torch.Tensor] | None = None, **changes: Any) -> RunFolder:
        run = RunFolder(tmp_path / "run")
        run.root.mkdir()
        run.describe(recipe_of(run.root, **changes), {})
        run.checkpoints.mkdir()
        run.save({"encoder_q": weights or trained.state_dict()}, STEP, {}, keep=2)
        return run

    return make


def _stripes(root: Path, per_class: int, seed: int) -> Path:
    """Write images of noise over stripes: three directions, which neither crop nor flip changes."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:24, :24]
    for name, along in (("down", across), ("flat", down), ("none", 0 * down)):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            wave = 90 * np.sin(1.6 * along + random.uniform(0, 6)) if along.any() else 0 * down
            levels = 128 + wave[..., None] + random.normal(0, 25, (24, 24, 3))
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{seed}-{number:03d}.png")
    return root


@pytest.fixture(scope="session")
def stripe_sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stripes")
    for name, per_class, seed in (("train", 40, 1), ("test", 20, 2)):
        pack(_stripes(root / "source" / name, per_class, seed), root / name, PackOptions())
    return root / "train", root / "test"


@pytest.fixture
def stripes(make_run: Callable[..., RunFolder], stripe_sets: tuple[Path, Path]) -> Evaluation:
    """A run, and stripes to tell apart: 40 images a class to learn from, 20 to be tested on."""
    return Evaluation.open(make_run(executor="fused").root, *stripe_sets)
