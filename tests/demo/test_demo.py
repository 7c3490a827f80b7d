"""The demo: patches that share no pixel between the splits, honest baselines, the whole road."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.config.loading import load_recipe
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.demo import demo as module
from fastmoco.demo.demo import (
    PATCH,
    PHOTOGRAPHS,
    Cut,
    Photograph,
    Split,
    cells,
    color_statistics,
    corners,
    demo,
    standardized,
)
from fastmoco.errors import UsageError
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.plots import GAP, LEFT, TOP, get_zoom

SPLITS: tuple[Split, Split] = ("train", "test")
TINY = Cut(PHOTOGRAPHS[:3], train=24, test=8)
FAST = (
    "batch=16",
    "objective.bn_group=8",
    "objective.queue=32",
    "encoder.dim=16",
    "schedule.epochs=1",
    "runtime.log_every=1",
)


def covered(photograph: Photograph, split: Split, count: int) -> np.ndarray:
    """Paint the patches of a split onto a blank photograph."""
    height, width, _ = photograph.pixels().shape
    painted = np.zeros((height, width), bool)
    for top, left in corners(height, width, split, count):
        assert 0 <= top <= height - PATCH
        assert 0 <= left <= width - PATCH
        painted[top : top + PATCH, left : left + PATCH] = True
    return painted


def grown(mask: np.ndarray, by: int) -> np.ndarray:
    """Return the mask and all that lies up to `by` pixels above, below or beside it."""
    result = mask.copy()
    for axis in (0, 1):
        for shift in range(1, by + 1):
            result |= np.roll(mask, shift, axis) | np.roll(mask, -shift, axis)
    return result


@pytest.mark.parametrize("photograph", PHOTOGRAPHS, ids=lambda p: p.name)
def test_no_pixel_is_in_both_splits(photograph: Photograph) -> None:
    train, test = (covered(photograph, split, 400) for split in SPLITS)
    assert train.any()
    assert test.any()
    assert not (grown(train, module.GAP) & test).any()


def test_every_photograph_is_a_large_picture() -> None:
    names = [photograph.name for photograph in PHOTOGRAPHS]
    assert len(set(names)) == len(names) >= 15
    for photograph in PHOTOGRAPHS:
        pixels = photograph.pixels()
        assert pixels.dtype == np.uint8
        assert pixels.std() > 5, photograph.name
        assert all(len(boxes) >= 2 for boxes in cells(*pixels.shape[:2]).values())


def test_corners_are_the_same_for_ever() -> None:
    assert corners(300, 451, "train", 3) == [(28, 44), (23, 241), (108, 137)]
    assert corners(300, 451, "test", 3) == [(16, 119), (22, 356), (127, 42)]
    assert corners(300, 451, "test", 8) == corners(300, 451, "test", 40)[:8]


def test_patches_spread_evenly_over_the_cells() -> None:
    boxes = cells(512, 512)["train"]
    found = corners(512, 512, "train", 10 * len(boxes))
    inside = [
        sum(
            t <= top and top + PATCH <= b and le <= left and left + PATCH <= r
            for top, left in found
        )
        for t, b, le, r in boxes
    ]
    assert inside == [10] * len(boxes)
    assert len(set(found)) > 0.9 * len(found)


def test_color_statistics_are_numpys() -> None:
    images = np.random.default_rng(0).random((5, 3, 7, 9), np.float32)
    found = color_statistics(torch.from_numpy(images)).numpy()
    expected = np.concatenate([images.mean((2, 3)), images.std((2, 3))], axis=1)
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_standardized_by_the_training_set() -> None:
    generator = torch.Generator().manual_seed(0)
    train, test = (5 + 3 * torch.randn(n, 6, generator=generator) for n in (500, 20))
    labels = torch.zeros(1)
    (a, _), (b, _) = standardized((train, labels), (test, labels))
    torch.testing.assert_close(a.mean(dim=0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(a.std(dim=0), torch.ones(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(b, (test - train.mean(dim=0)) / train.std(dim=0))


def test_a_missing_photograph_names_the_remedy() -> None:
    for lost in (Photograph("no_such_package", "a.png"), Photograph("skimage", "data/none.png")):
        with pytest.raises(UsageError, match=r"is not installed: `pip install 'fastmoco\[demo\]'`"):
            lost.pixels()


def test_a_missing_package_names_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = module.find_spec
    for package in ("matplotlib", "skimage", "sklearn"):
        lost = lambda name, gone=package: None if name == gone else found(name)  # noqa: E731
        monkeypatch.setattr(module, "find_spec", lost)
        with pytest.raises(UsageError, match=rf"{package}.* is not installed: `pip install"):
            demo(tmp_path / "demo")
    assert not (tmp_path / "demo").exists()


def test_a_folder_of_something_else_is_refused(tmp_path: Path) -> None:
    (tmp_path / "thesis.tex").touch()
    with pytest.raises(UsageError, match=r"exists and is not a demo: choose another .* --out"):
        demo(tmp_path)
    (tmp_path / "demo.json").write_text("not ours")
    with pytest.raises(UsageError, match=r"cannot be used .*: choose another"):
        demo(tmp_path)
    with pytest.raises(UsageError, match=r"cannot be used .*: choose another"):
        demo(tmp_path / "thesis.tex")
    assert sorted(os.listdir(tmp_path)) == ["demo.json", "thesis.tex"]


def test_the_recipe_runs_on_two_ranks() -> None:
    recipe = load_recipe("demo")
    assert recipe.batch % (2 * recipe.objective.bn_group) == 0
    assert recipe.monitor
    assert recipe.monitor.feature == "backbone", "the table's kNN is of the backbone"


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, tuple[module.Row, ...]]:
    out = tmp_path_factory.mktemp("demo") / "with a space"
    return out, demo(out, 3, FAST, TINY)


@pytest.mark.slow
def test_whole_road(
    done: tuple[Path, tuple[module.Row, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = done
    assert [row.name for row in rows] == ["untrained", "color statistics", "trained"]
    assert all(0 <= value <= 100 for row in rows for value in (row.knn, row.probe))
    assert json.loads((out / "result.json").read_text())[2]["knn"] == rows[2].knn
    assert ShardSet(out / "train").manifest.class_counts == [24, 24, 24]
    assert ShardSet(out / "test").manifest.class_counts == [8, 8, 8]
    # Training and table measure the same thing.
    metrics = [json.loads(line) for line in (out / "run/metrics.jsonl").read_text().splitlines()]
    monitored = [row["knn_top1"] for row in metrics if "knn_top1" in row]
    assert monitored == [pytest.approx(rows[0].knn), pytest.approx(rows[2].knn)]


@pytest.mark.slow
def test_again_gives_the_same_without_training(
    done: tuple[Path, tuple[module.Row, ...]], capsys: pytest.CaptureFixture[str]
) -> None:
    out, rows = done
    before = (out / "train/samples.npy").stat().st_mtime_ns
    assert demo(out, 3, FAST, TINY) == rows
    assert (out / "train/samples.npy").stat().st_mtime_ns == before
    shown = capsys.readouterr().out
    assert "step 1 " not in shown
    assert "color statistics" in shown
    with pytest.raises(UsageError, match=r"holds a demo of another seed or version"):
        demo(out, 4, FAST, TINY)


@pytest.mark.slow
def test_patches_are_cut_where_the_corners_say(
    done: tuple[Path, tuple[module.Row, ...]],
) -> None:
    for split, count in (("train", 24), ("test", 8)):
        for photograph in TINY.photographs:
            pixels = photograph.pixels().astype(int)
            files = sorted((done[0] / "patches" / split / photograph.name).iterdir())
            at = corners(*pixels.shape[:2], split, count)
            assert len(files) == len(at)
            for file, (top, left) in zip(files, at, strict=True):
                patch = np.asarray(Image.open(file)).astype(int)
                assert patch.shape == (PATCH, PATCH, 3)
                original = pixels[top : top + PATCH, left : left + PATCH]
                assert abs(patch - original).mean() < 3, "JPEG of quality 95"


@pytest.mark.slow
def test_views_png_holds_the_views_of_step_0(
    done: tuple[Path, tuple[module.Row, ...]],
) -> None:
    out = done[0]
    recipe = load_recipe(str(out / "run/config.yaml"))
    data = ConcatShardSets.open([out / "train"])
    assert recipe.encoder.mean and recipe.encoder.std
    loader = Loader(
        data,
        Plan(len(data), recipe.batch, recipe.seed),
        recipe.views,
        size=recipe.encoder.image_size,
        mean=recipe.encoder.mean,
        std=recipe.encoder.std,
        settings=Settings("fused"),
    )
    batch = next(loader.batches())
    plot = np.asarray(Image.open(out / "views.png").convert("RGB"))
    zoom = get_zoom(recipe.encoder.image_size)
    pitch = zoom * recipe.encoder.image_size + GAP
    mean, std = np.array(recipe.encoder.mean), np.array(recipe.encoder.std)
    for row, view in enumerate(batch.views, 1):
        for column in range(module.SHOWN):
            top, left = TOP + row * pitch, LEFT + column * pitch
            drawn = plot[top : top + pitch - GAP : zoom, left : left + pitch - GAP : zoom]
            expected = 255 * (view[column].permute(1, 2, 0).numpy() * std + mean)
            assert abs(drawn - expected.clip(0, 255)).max() < 0.51
