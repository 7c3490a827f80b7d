"""`benchmarks/compare.py loader`: every arm draws the same kind of views, and as many."""

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
from baselines import loaders as rivals
from compare import app
from comparisons import loader as bench
from harness.arm import Section
from typer.testing import CliRunner

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

WORK = {"size": 24, "batch": 8, "batches": 6}


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_images) -> Path:
    return make_images(tmp_path_factory.mktemp("bench") / "photos", per_class=20, size=(64, 48))


@pytest.fixture(scope="module")
def packed(photos) -> Path:
    pack(photos, photos.parent / "set", PackOptions())
    return photos.parent / "set"


@pytest.fixture(scope="module")
def ours(packed) -> dict:
    return bench.ours(Section(), root=str(packed), **WORK)


def proof(found: dict) -> dict:
    return found["check"]


def distance(one: dict, other: dict) -> float:
    """Return the largest difference between what two arms saw."""
    numbers = [key for key, value in proof(one).items() if isinstance(value, float)]
    assert len(numbers) == 4
    return max(abs(proof(one)[key] - proof(other)[key]) for key in numbers)


@pytest.mark.parametrize("name", ["imagefolder", "webdataset", "dali_operators"])
def test_the_rivals_draw_what_we_draw(name, photos, packed, ours):
    root = packed if name == "webdataset" else photos
    section = Section()
    found = getattr(rivals, name)(section, root=str(root), **WORK, workers=1)
    assert found["images"] == ours["images"] == 48
    assert section.seconds > 0 and found["first_batch_s"] > 0
    for key in ("shape", "dtype", "views"):
        assert proof(found)[key] == proof(ours)[key]
    # 48 images: their mean alone wanders by several levels, colors by chance of jitter.
    assert distance(found, ours) < 25


def test_the_proof_tells_full_views_from_mere_crops(packed):
    long = WORK | {"batches": 30}
    full, again = (bench.ours(Section(), root=str(packed), **long) for _ in range(2))
    plain = bench.ours(Section(), root=str(packed), **long, plain=True)
    assert distance(full, again) < 1e-3, "a pure function of the seed"
    assert distance(full, plain) > bench.TOLERANCE
    assert proof(full)["color_change"] > proof(plain)["color_change"] + bench.TOLERANCE


@pytest.mark.slow
def test_bench_loader_from_the_command_line(photos, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = "--size 24 --batch 8 --batches 2 --workers 1 --pairs 1 --bound --against webdataset"
    done = CliRunner().invoke(app, ["loader", str(photos), *options.split(), "--out", str(out)])
    # So few images may look like other work.
    assert done.exception is None or isinstance(done.exception, DataError), done.output
    assert "in fastmoco, crops alone" not in done.output, "a bound does less on purpose"
    *rows, report = map(json.loads, out.read_text().splitlines())
    arms = ["fastmoco", "fastmoco, crops alone", "webdataset"]
    assert [row["arm"] for row in rows] == arms
    assert all(row["images"] == 16 and row["first_batch_s"] > 0 for row in rows)
    assert report["subject"]["workers"] == 1 and report["subject"]["source"] == "photos"
    assert str(photos) not in out.read_text()
    assert [path.name for path in photos.parent.iterdir() if path.name.startswith(".")] == []


def test_the_fastest_number_of_workers_is_tried(photos, monkeypatch):
    class Found:
        def __init__(self, seconds: float) -> None:
            self.seconds_per_image = seconds

    times = {1: 3.0, 2: 1.0, 3: 2.0}
    monkeypatch.setattr(bench.os, "sched_getaffinity", lambda pid: {0, 1})
    monkeypatch.setattr(
        bench, "measure", lambda name, arm: Found(times[json.loads(arm.command[-1])["workers"]])
    )
    assert bench.best_workers(photos, bench.Settings(rivals=("imagefolder",))) == 2


def test_an_unknown_rival_is_refused(photos):
    with pytest.raises(UsageError, match="no rival 'other'; there are dali, cached, imagefolder"):
        bench.bench_loader(photos, bench.Settings(rivals=("other",)), 1)


@pytest.mark.parametrize("name", ["ffcv", "ffcv-raw"])
def test_a_rival_that_is_not_installed_is_refused(name, photos, monkeypatch):
    monkeypatch.setattr(bench, "find_spec", lambda name: None)
    with pytest.raises(UsageError, match=f"{name} needs `pip install ffcv`.*libturbojpeg0-dev"):
        bench.bench_loader(photos, bench.Settings(rivals=(name,)), 1)


@pytest.mark.slow
@pytest.mark.skipif(find_spec("ffcv") is None, reason="FFCV is not installed")
@pytest.mark.filterwarnings("ignore")  # its own: it imports distutils
@pytest.mark.parametrize("raw", [False, True])
def test_ffcv_draws_what_we_draw(raw, packed, ours, tmp_path):
    from baselines import ffcv_loader as beton
    from ffcv.fields import RGBImageField
    from ffcv.reader import Reader

    path = tmp_path / "images"
    beton.write(packed, path, raw)
    stored = Reader(str(path), {"image": RGBImageField})
    assert stored.num_samples == 40
    assert set(stored.metadata["f0"]["mode"]) == {1 if raw else 0}
    if not raw:  # the same bytes
        kept = ShardSet(packed).samples["size"]
        assert sorted(stored.alloc_table["size"]) == sorted(kept)
    found = rivals.ffcv(Section(), root=str(path), **WORK, workers=1)
    assert found["images"] == 48
    for key in ("shape", "dtype", "views"):
        assert proof(found)[key] == proof(ours)[key]
    assert distance(found, ours) < 25
