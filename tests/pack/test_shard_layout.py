"""How a source is ordered, divided and cut into shards, and which of its images are left out."""

import json
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import UsageError
from fastmoco.pack import shard_layout as schedule_module
from fastmoco.pack.image import Rules
from fastmoco.pack.inputs import Inputs, Pixels
from fastmoco.pack.options import PackOptions, parse_splits
from fastmoco.pack.packer import pack
from fastmoco.pack.shard_layout import Schedule, divided
from fastmoco.pack.sources import open_sources
from fastmoco.pack.sources.base import Names, Source

Make = Callable[..., Path]


class Sized(Inputs):
    """Inputs of which only the sizes matter."""

    def __init__(self, sizes: np.ndarray) -> None:
        self.sizes = sizes.astype(np.int64)

    def __getitem__(self, row: int) -> Pixels:
        return Pixels(np.zeros((1, 1), dtype=np.uint8))

    def state(self) -> bytes:
        return b""


def make_source(sizes: np.ndarray, labels: np.ndarray | None = None) -> Source:
    labels = np.full(len(sizes), -1) if labels is None else labels
    names = Names(f"{number}" for number in range(len(sizes)))
    return Source(names, labels.astype(np.int32), [], Sized(sizes), [])


@pytest.mark.parametrize(("count", "limit"), [(1, 10**6), (700, 10**6), (700, 3 * 10**6), (5, 9)])
def test_shards_are_nearly_equal_and_within_the_bound(count: int, limit: int) -> None:
    sizes = np.random.default_rng(0).integers(1000, 30_000, count)
    schedule = Schedule(make_source(sizes), 0, limit, Rules())
    bounds = schedule.bounds
    assert bounds[0] == 0 and bounds[-1] == count and bounds == sorted(set(bounds))
    tar = [sum(512 + -(-int(s) // 512) * 512 for s in sizes[schedule.order[a:b]])
           for a, b in pairwise(bounds)]  # fmt: skip
    assert max(tar) - min(tar) <= 2 * 31_000
    if limit > 10**5:
        assert max(tar) + 10240 + 1024 <= limit
        assert len(tar) <= 1 + sum(tar) / (limit - 50_000)


@pytest.mark.parametrize("block", [1, 7, 350])
def test_cuts_do_not_depend_on_how_many_costs_are_held(
    block: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_source(np.random.default_rng(1).integers(0, 30_000, 700))
    whole = Schedule(source, 0, 400_000, Rules())
    monkeypatch.setattr(schedule_module, "BLOCK", block)
    assert Schedule(source, 0, 400_000, Rules()).bounds == whole.bounds
    ends = np.cumsum(whole._tar_costs(0, 700))  # a cut lies behind the image that crosses it
    wanted = ends[-1] * np.arange(1, whole.shards) / whole.shards
    assert whole.bounds[1:-1] == (np.searchsorted(ends, wanted) + 1).tolist()
    assert whole.shards > 20


def test_every_image_is_in_one_run(tmp_path: Path) -> None:
    schedule = Schedule(make_source(np.full(5000, 9000)), 3, 4 * 10**6, Rules())
    runs = [run for shard in range(schedule.shards) for run in schedule.runs(shard, tmp_path)]
    positions = [p for run in runs for p in range(run.first, run.first + len(run.inputs))]
    assert positions == list(range(5000))
    assert [run.shard for run in runs] == sorted(run.shard for run in runs)
    assert max(len(run.inputs) for run in runs) <= 256


@pytest.mark.parametrize(("size", "count", "measured"), [(900, 5000, 5000), (90_000, 5000, 556)])
def test_small_images_are_all_measured_and_large_ones_by_stride(
    size: int, count: int, measured: int, tmp_path: Path
) -> None:
    schedule = Schedule(make_source(np.full(count, size)), 0, 10**9, Rules())
    flags = [flag for run in schedule.runs(0, tmp_path) for flag in run.measured]
    assert sum(flags) == measured


def test_divided_by_class() -> None:
    labels = np.repeat([0, 1, 2, -1], [100, 50, 10, 40])
    source = make_source(np.ones(200), labels)
    parts = divided(source, {"train": 0.8, "val": 0.1, "test": 0.1}, seed=1)
    names = [name for part in parts.values() for name in part.names]
    assert sorted(names) == sorted(source.names)
    counts = {split: Counter(part.labels.tolist()) for split, part in parts.items()}
    assert counts["train"] == {0: 80, 1: 40, 2: 8, -1: 32}
    assert counts["val"] == counts["test"] == {0: 10, 1: 5, 2: 1, -1: 4}
    again, other = (divided(source, {"a": 0.5, "b": 0.5}, seed=seed) for seed in (1, 2))
    assert list(again["a"].names) != list(other["a"].names)
    assert list(again["a"].names) == list(divided(source, {"a": 0.5, "b": 0.5}, 1)["a"].names)
    # Each class is shuffled: its part is not its first names.
    assert list(parts["train"].names)[:80] != list(source.names)[:80]


@pytest.mark.parametrize("text", ["train", "a=1,a=0", "a=0.5,b=0.4", "a=2,b=-1", "../x=1", "a=x"])
def test_splits_that_make_no_sense(text: str) -> None:
    with pytest.raises(UsageError, match="NAME=SHARE"):
        parse_splits(text)


def test_splits_of_a_set(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", per_class=10)
    splits = parse_splits("train=0.7, val=0.3")
    manifests = pack(source, tmp_path / "sets", PackOptions(splits=splits))
    assert {split: m.class_counts for split, m in manifests.items()} == {
        "train": [7, 7],
        "val": [3, 3],
    }
    sets = [ShardSet(tmp_path / "sets" / split) for split in manifests]
    names = [s.get_name(row) for s in sets for row in range(len(s))]
    assert len(set(names)) == 20
    with pytest.raises(UsageError, match="splits of its own"):
        folder = tmp_path / "both"
        make_images(folder / "train")
        make_images(folder / "val")
        pack(folder, tmp_path / "again", PackOptions(splits=splits))


def test_duplicates_are_left_out_across_splits(make_images: Make, tmp_path: Path) -> None:
    root = tmp_path / "in"
    make_images(root / "train", per_class=5)
    make_images(root / "val", ("cat", "dog"), per_class=6)  # five of the six are those of train
    manifests = pack(root, tmp_path / "sets", PackOptions(dedupe=True))
    assert [m.samples for m in manifests.values()] == [10, 2]
    lines = (tmp_path / "sets/val/rejects.jsonl").read_text().splitlines()
    first = json.loads(lines[0])
    assert len(lines) == 10 and first["name"] == "val/cat/0000.jpg"
    assert first["reason"] == "has the same bytes as 'train/cat/0000.jpg'"
    everything = pack(root, tmp_path / "all", PackOptions())
    assert [m.samples for m in everything.values()] == [10, 12]


@pytest.mark.parametrize("kind", ["zip", "tar"])
def test_an_archive_gives_the_set_of_its_folder(
    make_images: Make, tmp_path: Path, kind: str
) -> None:
    source = make_images(tmp_path / "in", per_class=9)
    paths = sorted(source.rglob("*.jpg"), reverse=True)
    archive = tmp_path / f"in.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as stream:
            for path in paths:
                stream.write(path, path.relative_to(source))
    else:
        with tarfile.open(archive, "w") as tar:
            for path in paths:
                tar.add(path, path.relative_to(source))
    pack(source, tmp_path / "one", PackOptions())
    pack(archive, tmp_path / "two", PackOptions(workers=2))
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes(), path.name


def test_a_shard_has_the_bytes_of_webdatasets_writer(small_set: ShardSet, tmp_path: Path) -> None:
    from webdataset.writer import TarWriter

    with (tmp_path / "theirs.tar").open("wb") as stream:
        writer = TarWriter(stream, encoder=False, mtime=0, user="", group="")
        for row in range(len(small_set)):
            image = small_set.root.parent / "source" / small_set.get_name(row)
            label = str(small_set.labels()[row]).encode()
            writer.write({"__key__": f"{row:08d}", "jpg": image.read_bytes(), "cls": label})
        writer.close()
    ours = small_set.root / small_set.manifest.shards[0].name
    assert ours.read_bytes() == (tmp_path / "theirs.tar").read_bytes()


def test_names_take_little_memory_and_are_a_sequence() -> None:
    names = Names(["a", "", "ü", "\udcff"])
    assert list(names) == ["a", "", "ü", "\udcff"] == names[:] and len(names) == 4
    assert names.bytes == b"a\xc3\xbc\xff"


def test_labels_follow_a_set_to_be_like(make_images: Make, tmp_path: Path) -> None:
    make_images(tmp_path / "in", ("ant", "bee"))
    sources = open_sources(tmp_path / "in", like=["bee", "ant"])
    assert sources[""].classes == ["bee", "ant"]
    assert sources[""].labels.tolist() == [1] * 4 + [0] * 4
