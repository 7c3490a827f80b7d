"""Sets whose classes are colors, and runs whose random networks see them."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from recipes import recipe_from

from fastmoco.config.encoder import EncoderSpec
from fastmoco.models.encoder import Encoder
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.runs.run_folder import RunFolder

COLORS = {"blue": (40, 60, 220), "green": (40, 200, 60), "red": (220, 50, 40)}


def paint(root: Path, per_class: int, make_picture: Callable[..., Image.Image], seed: int) -> None:
    """Write pictures that lean to the color of their class, some hardly."""
    random = np.random.default_rng(seed)
    for name, color in COLORS.items():
        (root / name).mkdir(parents=True)
        for index in range(per_class):
            picture = make_picture(int(random.integers(2**31)), (24, 24))
            tint = Image.new("RGB", picture.size, color)
            share = random.uniform(0.05, 0.8)
            Image.blend(picture, tint, share).save(root / name / f"{index:04d}.png")


def write_run(root: Path, sets: Path, seed: int, step: int = 5, **changes: object) -> RunFolder:
    """Write a run of a random network, with the monitor sets `train` and `test`."""
    torch.manual_seed(seed)
    spec = EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8, image_size=16)
    run = RunFolder(root)
    run.checkpoints.mkdir(parents=True)
    values = {
        "name": "tiny",
        "data": [str(sets / "pool")],
        "out": str(root),
        "monitor": {"bank": str(sets / "train"), "queries": str(sets / "test")},
        **{"arch": "resnet10", "stem": "small-stride2", "dim": 8, "image_size": 16},
        **{"views": [{}, {}], "batch": 8, "bn_group": 4, "queue": 64, "optimizer": {"lr": 0.1}},
        **{"schedule": {"epochs": 2}, "precision": "fp32", "device": "cpu", "threads": 1},
        **changes,
    }
    run.describe(recipe_from(values), {})
    run.save({"encoder_q": Encoder(spec).state_dict()}, step, {}, keep=2)
    return run


@pytest.fixture(scope="session")
def make_colored_run() -> Callable[..., RunFolder]:
    """`make_colored_run(root, sets, seed, step=5, **changes)`, see `write_run`."""
    return write_run


@pytest.fixture(scope="session")
def colored_sets(tmp_path_factory: pytest.TempPathFactory, make_picture) -> Path:
    """A folder with the sets `train`, `test` and `pool`, and the runs `run` and `other`.

    Read them, never write to them.
    """
    root = tmp_path_factory.mktemp("colored")
    for seed, (split, per_class) in enumerate({"train": 20, "test": 4, "pool": 30}.items()):
        paint(root / "in" / split, per_class, make_picture, seed)
        pack(root / "in" / split, root / split, PackOptions())
    for seed, name in enumerate(("run", "other")):
        write_run(root / name, root, seed)
    return root


@pytest.fixture
def own(colored: Path) -> Callable[[str], Path]:
    """`own("pool")`: put a copy that may be changed in the place of a link."""

    def call(name: str) -> Path:
        link = colored / name
        source = link.resolve()
        link.unlink()
        return Path(shutil.copytree(source, link))

    return call


@pytest.fixture
def colored(colored_sets: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder to work in, with links to the sets and runs."""
    for name in ("train", "test", "pool", "run", "other"):
        (tmp_path / name).symlink_to(colored_sets / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path
