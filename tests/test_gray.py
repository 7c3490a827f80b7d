"""One channel from the images to the report, of classes that the lower byte alone tells apart."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import yaml
from PIL import Image

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.plots import LEFT, TOP, get_zoom

SIDE, COUNT = 32, 3
MIDDLE = 117 * 257  # rounded to 8 bits, all that lies within 128 of it is 117


def stripes(kind: str, seed: int) -> Image.Image:
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:SIDE, :SIDE]
    along = {"across": y, "down": x, "slant": (x + y) / 2**0.5}[kind]
    wave = np.sin(2 * np.pi * (along / rng.uniform(5, 7) + rng.random()))
    noise = rng.normal(0, 8, (SIDE, SIDE)).clip(-30, 30)
    return Image.fromarray(np.rint(MIDDLE + 90 * wave + noise).astype(np.uint16))


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`gray/train`, `gray/test`, and the same in 8 bits in `eight`."""
    root = tmp_path_factory.mktemp("gray")
    for split, count in (("train", 24), ("test", 12)):
        for number, kind in enumerate(("across", "down", "slant")):
            folder = root / "in" / split / kind
            folder.mkdir(parents=True)
            for i in range(count):
                stripes(kind, 1000 * number + 100 * (split == "test") + i).save(folder / f"{i}.png")
    levels = (0.0, 65535.0)
    pack(root / "in", root / "gray", PackOptions(gray=True, levels=levels))
    pack(root / "in", root / "eight", PackOptions(levels=levels))
    return root


@pytest.fixture
def recipe(sets: Path, tmp_path: Path) -> Path:
    view = {"scale": [0.5, 1], "flip": 0, "jitter": [0, 0.4, 0, 0], "blur": 0.3}
    network = {"arch": "resnet10", "stem": "small-stride2", "dim": 16, "image_size": 32}
    values = {
        "name": "gray",
        "out": str(tmp_path / "run"),
        "batch": 24,
        "data": {"sets": [str(sets / "gray/train")]},
        "views": [view, view],
        "encoder": {**network, "channels": 1},
        "objective": {"bn_group": 8, "queue": 48},
        "optimizer": {"lr": 0.03},
        "schedule": {"steps": 4},
        "monitor": {"bank": str(sets / "gray/train"), "queries": str(sets / "gray/test"), "k": 5},
        "runtime": {"precision": "fp32", "threads": 1, "device": "cpu"},
    }
    path = tmp_path / "gray.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


@pytest.mark.slow
def test_sixteen_bits_from_the_images_to_the_report(
    sets: Path, recipe: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    # In 8 bits nothing is left of the classes.
    assert ShardSet(sets / "eight/train").manifest.std == [1.0] * 3
    about = ShardSet(sets / "gray/train").manifest
    assert about.bits == 16 and 0.0009 < about.std[0] < 0.0012
    code, _, err = run("shard", sets / "in", tmp_path / "refused", "--gray")
    assert code == 3 and "--levels 0:65535 keeps them so" in err

    plot, drawn = tmp_path / "views.png", f"--count={COUNT}"
    code, out, err = run("views", sets / "gray/train", "--recipe", recipe, "--out", plot, drawn)
    assert code == 0 and "contrast" in out and "saturation" not in out, err
    zoom = get_zoom(SIDE)
    picture = np.asarray(Image.open(plot).convert("RGB"))[TOP::zoom, LEFT::zoom]
    first = picture[:SIDE, :SIDE].astype(int)
    assert (first == first[..., :1]).all() and np.ptp(first) > 100

    code, out, err = run("pretrain", recipe)
    assert code == 0, err
    for command in (("knn", "--k", 5), ("probe", "--epochs", 30)):
        code, out, err = run(command[0], tmp_path / "run", *command[1:])
        assert code == 0, err
    rows = (tmp_path / "run/evaluations.jsonl").read_text().splitlines()
    knn, probe = map(json.loads, rows)
    assert knn["top1"] > 80 and probe["best"]["top1"] > 80  # chance is 33
    code, out, err = run("report", tmp_path / "run", "--samples", 20, "--out", tmp_path / "page")
    assert code == 0, err
    tile = np.asarray(Image.open(tmp_path / "page/query_0.png").convert("RGB")).astype(int)
    filters = np.asarray(Image.open(tmp_path / "page/filters.png").convert("RGB"))
    assert np.ptp(tile) > 100 and (filters == filters[..., :1]).all()
    others = "--train", sets / "eight/train", "--test", sets / "eight/test"
    code, _, err = run("knn", tmp_path / "run", *others)
    assert code == 2 and "of 3 channels, the encoder takes 1: pack it anew with --gray" in err


def test_what_has_no_meaning_in_gray_is_refused_with_what_to_set(
    sets: Path, run: Callable[..., tuple[int, str, str]], tmp_path: Path
) -> None:
    """From a recipe for colors, each error's own words lead to the next step, and to the end."""
    given: list[str] = []
    plot = ("--recipe", "moco_v2_imagenet_r50", "--out", tmp_path / "views.png", "--count", 1)
    wanted = (
        "train with encoder.channels=1 encoder.mean=null",
        "no color for views.0 saturation, views.0 hue, views.0 grayscale, views.1 saturation,",
        "not for DALI, which draws three: set runtime.executor=fused",
    )
    for words in wanted:
        if "DALI" in words:
            given.append("runtime.executor=dali")
        code, _, err = run("views", sets / "gray/train", *given, *plot)
        assert code == 2 and words in err
        remedy = err.rpartition("train with " if "train with " in err else ": set ")[2]
        given += [word.strip("'.") for word in remedy.split()]
    assert given.index("runtime.executor=dali") < given.index("runtime.executor=fused")
    code, _, err = run("views", sets / "gray/train", *given, *plot)
    assert code == 0, err
    code, _, err = run("views", sets / "gray/train", *given, "encoder.mean=[0.5,0.5,0.5]", *plot)
    assert code == 2 and "mean is of 3 channels, and channels 1: set encoder.mean=null" in err
