"""Settings and helpers of the loader's tests."""

from collections.abc import Callable
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
import tars
import torch
from hypothesis import settings
from PIL import Image

from fastmoco.config.recipe import View
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Batch, Loader, evaluation_batches
from fastmoco.load.sampler import Plan
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

# The same examples on every run, however slow the machine.
settings.register_profile("steady", deadline=None, derandomize=True, database=None)
settings.load_profile("steady")

STEPS = 7  # of 4 an epoch
VIEWS = (View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5), View(flip=0.5))
EXECUTORS = pytest.mark.parametrize("executor", ["dali", "fused"])
LOOK = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


def encoded(image: Image.Image, kind: str = "png", **options: object) -> np.ndarray:
    """Return the bytes of an image file."""
    return np.frombuffer(bytearray(tars.encoded(image, kind, **options)), np.uint8)


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


@pytest.fixture(scope="session")
def both(small_set: ShardSet, second_set: ShardSet) -> ConcatShardSets:
    """Ids 0..23 are `small_set`'s, 24..33 are `second_set`'s."""
    return ConcatShardSets([small_set, second_set])


def stream(
    data: ConcatShardSets,
    settings: Settings = Settings(threads=1, prefetch=1),
    start: int = 0,
    stop: int = STEPS,
    rank: int = 0,
    ranks: int = 1,
    seed: int = 3,
    max_bad: int = 0,
) -> list[Batch]:
    plan, place = Plan(len(data), 8, seed), {"rank": rank, "ranks": ranks}
    loader = Loader(data, plan, VIEWS, **LOOK, settings=settings, **place, max_bad=max_bad)
    return list(islice(loader.batches(start), stop - start))


def assert_equal(found: list[Batch], expected: list[Batch]) -> None:
    assert [batch.step for batch in found] == [batch.step for batch in expected]
    for a, b in zip(found, expected, strict=True):
        assert np.array_equal(a.ids, b.ids)
        assert all(torch.equal(x, y) for x, y in zip(a.views, b.views, strict=True))


def joined(shares: tuple[Batch, ...]) -> Batch:
    views = (torch.cat(parts) for parts in zip(*(share.views for share in shares), strict=True))
    return Batch(np.concatenate([share.ids for share in shares]), tuple(views), shares[0].step)


def evaluated(data: ConcatShardSets, ids: slice, batch: int, executor: str = "dali", **look: float):
    look = LOOK | {"share": 1.0} | look
    settings = Settings(executor, threads=2)
    return list(evaluation_batches(data, ids=ids, batch=batch, settings=settings, **look))
