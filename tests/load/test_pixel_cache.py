"""Decoded pixels are drawn as the images are, and are never half there."""

import errno
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.load import pixel_cache as module
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Loader, evaluation_batches
from fastmoco.load.pixel_cache import open_cache
from fastmoco.load.sampler import Plan
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

from .conftest import LOOK, VIEWS, assert_equal, stream

DECODED = Settings("fused", threads=2)
CACHED = replace(DECODED, pixels="auto")


@pytest.fixture
def two_sets(make_images, tmp_path) -> ConcatShardSets:
    """Sets of one size each: JPEGs of 24 x 36 and PNGs of 30 x 20."""
    for name, size, kind in (("one", (24, 36), "jpg"), ("two", (30, 20), "png")):
        source = make_images(tmp_path / "source" / name, ("a", "b"), 7, size, kind)
        pack(source, tmp_path / name, PackOptions())
    return ConcatShardSets.open([tmp_path / "one", tmp_path / "two"])


def files(data: ConcatShardSets) -> list[str]:
    return sorted(path.name for one in data.sets for path in one.root.glob("*pixels*.npy"))


def test_what_is_drawn_is_the_same_to_the_bit(two_sets, capsys):
    expected = stream(two_sets, DECODED)
    assert files(two_sets) == []
    assert_equal(stream(two_sets, CACHED), expected)
    said = capsys.readouterr().err
    assert said.count("decoding 14 images once, into ") == 2
    assert files(two_sets) == sorted(f"pixels-{i[:16]}.npy" for i in two_sets.set_ids)
    assert_equal(stream(two_sets, CACHED, start=3), expected[3:])
    assert "decoding" not in capsys.readouterr().err
    views = [
        list(evaluation_batches(two_sets, ids=slice(0, 28), batch=5, share=1.0, settings=s, **LOOK))
        for s in (DECODED, CACHED)
    ]
    assert_equal(*views)


def test_a_loader_that_draws_nothing_decodes_no_set(two_sets):
    """As of a dry run."""
    Loader(two_sets, Plan(28, 8, 3), VIEWS, **LOOK, settings=CACHED)
    assert files(two_sets) == []


def test_a_look_at_a_few_images_decodes_no_set(two_sets):
    ids = np.arange(9)
    list(evaluation_batches(two_sets, ids=ids, batch=5, share=1.0, settings=CACHED, **LOOK))
    assert files(two_sets) == []


def test_a_set_packed_anew_has_new_pixels(two_sets, make_images, tmp_path):
    one = tmp_path / "one"
    old = two_sets.sets[0].manifest.set_id
    open_cache(ConcatShardSets.open([one]), CACHED)
    before = (one / f"pixels-{old[:16]}.npy").read_bytes()
    source = make_images(tmp_path / "other", ("c", "d"), 6, (24, 36), "jpg")
    pack(source, tmp_path / "new", PackOptions())
    for path in (tmp_path / "new").iterdir():
        path.replace(one / path.name)
    data = ConcatShardSets.open([one])
    assert_equal(stream(data, CACHED), stream(data, DECODED))
    (name,) = files(data)
    assert name == f"pixels-{data.set_ids[0][:16]}.npy" and old[:16] not in name
    assert (one / name).read_bytes() != before


KILLED = """
import os, signal, sys
from pathlib import Path
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load import pixel_cache
from fastmoco.load.executor import Settings

decode, done = pixel_cache.decode, []
def dying(encoded, channels):
    done.append(1)
    if len(done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)
    return decode(encoded, channels)
pixel_cache.decode = dying
pixel_cache.open_cache(ConcatShardSets.open([Path(sys.argv[1])]), Settings("fused", pixels="auto"))
"""


def test_a_process_killed_while_it_writes_leaves_nothing_to_use(two_sets, tmp_path):
    root = two_sets.sets[0].root
    done = subprocess.run([sys.executable, "-c", KILLED, str(root)], capture_output=True)
    assert done.returncode == -signal.SIGKILL
    assert not list(root.glob("pixels-*.npy"))
    data = ConcatShardSets.open([root])
    assert_equal(stream(data, CACHED), stream(data, DECODED))
    assert len(list(root.glob("*pixels-*.npy"))) == 1, "what was begun is gone"


def test_a_file_that_was_cut_short_is_made_anew(two_sets):
    data = ConcatShardSets(two_sets.sets[:1])
    open_cache(data, CACHED)
    path = data.sets[0].root / files(data)[0]
    whole = path.read_bytes()
    path.write_bytes(whole[:-1])
    open_cache(data, CACHED)
    assert path.read_bytes() == whole


def test_a_full_disk_is_told_and_costs_only_time(two_sets, monkeypatch, capsys):
    def full(descriptor: int, offset: int, length: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "posix_fallocate", full)
    expected = stream(two_sets, DECODED)
    assert_equal(stream(two_sets, CACHED), expected)
    root = two_sets.sets[0].root
    assert capsys.readouterr().err.splitlines()[-1] == (
        f"decoding images as they come: {root} cannot hold them (No space left on device); "
        "runtime.cache=DIR names another folder"
    )
    assert [path.name for path in root.glob("*pixels*.npy")] == []


def test_another_folder_serves_where_that_of_the_set_cannot(two_sets, monkeypatch, tmp_path):
    reserve = module._reserve

    def read_only(path: Path, size: int) -> None:
        if path.parent in [one.root for one in two_sets.sets]:
            raise OSError(errno.EROFS, os.strerror(errno.EROFS))
        reserve(path, size)

    monkeypatch.setattr(module, "_reserve", read_only)
    settings = replace(CACHED, cache=tmp_path / "elsewhere")
    assert_equal(stream(two_sets, settings), stream(two_sets, DECODED))
    assert len(list((tmp_path / "elsewhere").glob("pixels-*.npy"))) == 2
    assert files(two_sets) == []


def test_sets_that_do_not_qualify_decline(two_sets, make_images, tmp_path, monkeypatch, capsys):
    for name, size in (("a", (24, 36)), ("b", (36, 24))):
        make_images(tmp_path / "mixed", (name,), 5, size, "jpg")
    pack(tmp_path / "mixed", tmp_path / "set", PackOptions())
    mixed = ConcatShardSets.open([tmp_path / "set"])
    capsys.readouterr()
    assert open_cache(mixed, CACHED) is None and capsys.readouterr().err == ""
    assert open_cache(mixed, replace(CACHED, pixels="cached")) is None
    assert "differ in size" in capsys.readouterr().err
    monkeypatch.setattr(module, "_LARGEST", 24 * 36 - 1)
    assert open_cache(two_sets, CACHED) is None
    assert open_cache(two_sets, replace(CACHED, executor="dali")) is None
    assert files(two_sets) == []
    assert open_cache(two_sets, replace(CACHED, pixels="cached")) is not None


def test_a_set_with_a_damaged_image_is_decoded_as_it_comes(copied_square, capsys):
    entry = copied_square.samples[5]
    shard = copied_square.root / copied_square.manifest.shards[int(entry["shard"])].name
    with shard.open("r+b") as stream_:
        stream_.seek(int(entry["offset"]) + 30)
        stream_.write(b"\0\0\0")
    assert open_cache(ConcatShardSets([copied_square]), CACHED) is None
    assert f"1 cannot be decoded, {copied_square.describe(5)} first" in capsys.readouterr().err
    assert not list(copied_square.root.glob("*pixels*.npy"))


@pytest.fixture
def copied_square(two_sets) -> ShardSet:
    return two_sets.sets[0]
