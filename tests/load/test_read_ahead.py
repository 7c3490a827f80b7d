"""Batches are read by threads before they are asked for, and no thread is left behind."""

import subprocess
import sys
import threading
from itertools import islice
from threading import Semaphore

import pytest
import torchvision_executor as oracle

from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError
from fastmoco.load.executor import EncodedBatch, Settings
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan

from .conftest import EXECUTORS, LOOK, VIEWS, evaluated, stream


def reading(both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch) -> tuple[Loader, Semaphore]:
    """Return a loader that does not draw ahead, and a count of the batches it has read."""
    read, work = Semaphore(0), Loader.work

    def counted(*arguments: object) -> EncodedBatch:
        made = work(*arguments)
        read.release()
        return made

    monkeypatch.setattr(Loader, "work", counted)
    monkeypatch.setattr("fastmoco.load.loader._executor", lambda name: oracle.render)
    settings = Settings("fused", threads=1)
    return Loader(both, Plan(34, 8, 3), VIEWS, **LOOK, settings=settings, max_bad=9), read


def test_the_next_batches_are_read_before_they_are_asked_for(
    both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, read = reading(both, monkeypatch)
    batches = loader.batches()
    assert next(batches).step == 0
    assert all(read.acquire(timeout=60) for _ in range(4))  # steps 0 to 3
    assert not read.acquire(timeout=0.2), "no more than three ahead"
    assert next(batches).step == 1
    assert read.acquire(timeout=60)


def test_images_of_a_batch_are_read_at_the_same_time(
    both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, all_there = Reader._read, threading.Barrier(8, timeout=60)

    def together(self: Reader, *place: int) -> object:
        all_there.wait()
        return read(self, *place)

    monkeypatch.setattr(Reader, "_read", together)
    assert len(evaluated(both, slice(0, 8), 8, "fused")) == 1


def test_what_was_read_before_it_was_known_as_damaged_is_not_shown(
    both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, read = reading(both, monkeypatch)
    batches, plan = loader.batches(), loader.plan
    next(batches)
    assert all(read.acquire(timeout=60) for _ in range(4))
    bad = {int(plan.order(plan.positions(2))[4])}
    loader.avoid(bad)
    for batch in islice(batches, 3):
        assert batch.ids.tolist() == plan.order(plan.positions(batch.step), bad).tolist()


def readers() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if "PoolExecutor" in thread.name]


@EXECUTORS
def test_no_thread_outlives_its_batches(copied: ShardSet, executor: str) -> None:
    data = ConcatShardSets([copied])
    plan, settings = Plan(24, 8, 3), Settings(executor, threads=1)
    batches = Loader(data, plan, VIEWS, **LOOK, settings=settings).batches()
    next(batches)
    assert readers()
    batches.close()
    assert not readers()
    evaluated(data, slice(0, 24), 5, executor)
    assert not readers()
    (copied.root / "shard-000000.tar").unlink()
    with pytest.raises(DataError):
        stream(data, settings)
    assert not readers()


LEFT = """
import sys, time
from pathlib import Path
from fastmoco.config.recipe import View
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.dataset.reader import Reader
from fastmoco.load.executor import Settings
from fastmoco.dataset.shard_set import ConcatShardSets

loader = Loader(
    ConcatShardSets.open([Path(sys.argv[1])]), Plan(24, 24, 3), [View()] * 2,
    size=16, mean=(0.5,) * 3, std=(0.2,) * 3, settings=Settings(threads=1, prefetch=1),
)
read = Reader._read
Reader._read = lambda *place: time.sleep(0.1) or read(*place)
batches = loader.batches()
next(batches)
sys.exit("left")
"""


def test_a_process_ends_with_batches_under_way(small_set: ShardSet) -> None:
    command = [sys.executable, "-c", LEFT, str(small_set.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert (done.returncode, done.stderr) == (1, "left\n")
