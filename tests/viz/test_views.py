"""`fastmoco views`: the plot holds the very views that the run begins with."""

import shutil
from pathlib import Path

import numpy as np
import pytest
from copies import NO_PIXELS
from PIL import Image

from fastmoco.config.loading import load_recipe
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.plots import GAP, LEFT, TOP, get_zoom
from fastmoco.viz.views import in_words, preview

COUNT = 3


def test_the_plot_holds_the_first_views_of_the_run(small_set: ShardSet, tmp_path: Path) -> None:
    overrides = [
        f"data.sets=['{small_set.root}']",
        "batch=16",
        "objective.bn_group=8",
        "encoder.image_size=40",
    ]
    recipe = load_recipe("cifar10_r18", [*overrides, "runtime.executor=fused"])
    shown = preview(recipe, tmp_path / "views.png", COUNT, "title")
    assert recipe.encoder.mean and recipe.encoder.std
    loader = Loader(
        ConcatShardSets([small_set]),
        Plan(len(small_set), 16, recipe.seed),
        recipe.views,
        size=40,
        mean=recipe.encoder.mean,
        std=recipe.encoder.std,
        settings=Settings(executor="fused"),
    )
    batch, work = next(loader.batches()), loader.work(0)
    plot = np.asarray(Image.open(tmp_path / "views.png").convert("RGB"))
    zoom = get_zoom(40)
    pitch = zoom * 40 + GAP
    for row, view in enumerate(batch.views, 1):
        for column in range(COUNT):
            top, left = TOP + row * pitch, LEFT + column * pitch
            drawn = plot[top : top + pitch - GAP : zoom, left : left + pitch - GAP : zoom]
            expected = 255 * (
                view[column].permute(1, 2, 0).numpy() * recipe.encoder.std + recipe.encoder.mean
            )
            assert abs(drawn - expected.clip(0, 255)).max() < 0.51
    for column, one in enumerate(shown):
        assert one.described == small_set.describe(int(batch.ids[column]))
        assert one.views == [in_words(numbers, column) for numbers in work.numbers]
    # A 40 x 32 original lies in the middle, on white.
    first = plot[TOP - pitch + pitch : TOP + 40 * zoom : zoom, LEFT : LEFT + 40 * zoom : zoom]
    assert (first[:3] == 255).all() and (first[-3:] == 255).all() and (first[10:30] < 255).any()


def test_a_set_that_cannot_be_read_is_named(small_set: ShardSet, tmp_path: Path) -> None:
    root = Path(shutil.copytree(small_set.root, tmp_path / "set", ignore=NO_PIXELS))
    table = np.load(root / "samples.npy")
    table["offset"] += 10**9  # behind the end of the shard
    np.save(root / "samples.npy", table)
    recipe = load_recipe("cifar10_r18", [f"data.sets=['{root}']", "runtime.executor=fused"])
    with pytest.raises(DataError, match=r"3 image.s. of a batch cannot be read: sample"):
        preview(recipe, tmp_path / "views.png", COUNT, "title")
    assert not (tmp_path / "views.png").exists()


def test_the_numbers_in_words(small_set: ShardSet) -> None:
    recipe = load_recipe("moco_v2_imagenet_r50", [f"data.sets=['{small_set.root}']"])
    recipe = recipe.model_copy(update={"batch": 24})
    numbers = Loader.of(recipe, ConcatShardSets([small_set]), Settings()).work(0).numbers[0]
    for row in range(24):
        words = in_words(numbers, row)
        top, left, height, width = numbers.crop[row]
        assert words.startswith(f"crop {height}x{width} at ({top}, {left})")
        assert ("flipped" in words) == numbers.flip[row]
        assert ("grayscale" in words) == numbers.grayscale[row]
        assert (f"blur {numbers.sigma[row]:.2f} px" in words) == numbers.blur[row]
        assert (f"brightness {numbers.brightness[row]:.2f} " in words) == numbers.jitter[row]
        assert ("hue" in words) == numbers.jitter[row]
