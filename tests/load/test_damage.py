"""Damage by name: what cannot be read is told, or replaced, and never shown."""

import subprocess
import sys
from itertools import count

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline

from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError
from fastmoco.load import dali_executor as dali
from fastmoco.load import fused_executor as fused
from fastmoco.load.executor import EncodedBatch, Settings, Source
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan

from .conftest import EXECUTORS, LOOK, STEPS, VIEWS, assert_equal, evaluated, joined, stream


def damage(damaged: ShardSet, row: int, kept: float) -> None:
    """Zero an image's bytes behind the share that is kept."""
    entry = damaged.samples[row]
    shard = damaged.root / damaged.manifest.shards[int(entry["shard"])].name
    content = bytearray(shard.read_bytes())
    start, size = int(entry["offset"]), int(entry["size"])
    first = start + int(size * kept)
    content[first : start + size] = bytes(start + size - first)
    shard.write_bytes(content)


# In a process of its own: a decoder that crashed would take the tests with it.
FAILING = """
import sys
from pathlib import Path
from fastmoco.config.recipe import View
from fastmoco.errors import DataError
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.load.executor import Settings
from fastmoco.dataset.shard_set import ConcatShardSets

executor, root = sys.argv[1:]
loader = Loader(
    ConcatShardSets.open([Path(root)]), Plan(24, 8, 3), [View(blur=0.5)] * 2,
    size=16, mean=(0.5,) * 3, std=(0.2,) * 3, settings=Settings(executor, threads=2, prefetch=2),
)
try:
    for batch in loader.batches():
        print("step", batch.step)
except DataError as error:
    print(error)
    sys.exit(error.exit_code)
"""


@EXECUTORS
@pytest.mark.parametrize("kept", [0.0, 0.1])
def test_a_damaged_image_is_named(copied: ShardSet, executor: str, kept: float) -> None:
    """All bytes are gone, or all behind the head of a file that still says what it was."""
    plan = Plan(24, 8, 3)
    bad = int(plan.order(plan.positions(2))[5])
    damage(copied, bad, kept)
    command = [sys.executable, "-c", FAILING, executor, str(copied.root)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=250)
    assert done.returncode == 3, done.stderr
    *steps, message = [line for line in done.stdout.splitlines() if "ERROR" not in line]
    assert steps == ["step 0", "step 1"]  # what comes before it is not lost
    assert message == (
        f"1 image(s) of a batch cannot be read: sample {bad} ({copied.get_name(bad)}) in "
        f"{copied.root}/shard-000000.tar. The shard was damaged after packing: "
        "copy the set again, or pack it anew. Training goes on without up to N damaged images if "
        "told so by data.max_bad_images=N."
    )


@pytest.fixture
def damaged(copied: ShardSet) -> tuple[ConcatShardSets, set[int]]:
    """A copy of `small_set` of which three samples are damaged, two of them side by side."""
    shown = Plan(24, 8, 3).order(np.arange(24))
    bad = {int(shown[10]), int(shown[11]), int(shown[21])}
    for row in bad:
        damage(copied, row, 0.1)
    return ConcatShardSets([copied]), bad


@EXECUTORS
def test_damaged_samples_are_replaced(
    damaged: tuple[ConcatShardSets, set[int]], small_set: ShardSet, executor: str
) -> None:
    data, bad = damaged
    settings = Settings(executor, threads=1, prefetch=1)
    whole = stream(data, settings, max_bad=3)
    plan = Plan(24, 8, 3)
    intact = stream(ConcatShardSets([small_set]), settings)
    for found, without in zip(whole, intact, strict=True):
        assert found.ids.tolist() == plan.order(plan.positions(found.step), bad).tolist()
        same = found.ids == without.ids
        assert same.sum() >= 5
        for a, b in zip(found.views, without.views, strict=True):
            assert torch.equal(a[same], b[same]), "the others are drawn as ever"


@EXECUTORS
@pytest.mark.parametrize("change", ["two threads, prefetch 3", "restart", "two ranks"])
def test_replacing_is_exact_too(
    damaged: tuple[ConcatShardSets, set[int]], executor: str, change: str
) -> None:
    data, _ = damaged
    one = Settings(executor, threads=1, prefetch=1)
    expected = stream(data, one, max_bad=3)
    if change == "restart":
        for start in range(1, STEPS):
            assert_equal(stream(data, one, start=start, max_bad=3), expected[start:])
    elif change == "two ranks":
        shares = [stream(data, one, rank=rank, ranks=2, max_bad=3) for rank in (0, 1)]
        assert_equal([joined(parts) for parts in zip(*shares, strict=True)], expected)
    else:
        assert_equal(stream(data, Settings(executor, threads=2, prefetch=3), max_bad=3), expected)


@EXECUTORS
def test_a_failure_without_damage_is_raised_as_it_is(
    both: ConcatShardSets, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first batch fails for want of memory, as DALI and decoders behind PIL tell it."""
    calls = count()

    def fails_once(*arguments: object) -> object:
        if next(calls) == 0:
            raise RuntimeError("std::bad_alloc")
        return original(*arguments)

    owner, name = (Pipeline, "run") if executor == "dali" else (fused, "decode")
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, fails_once)
    settings = Settings(executor, threads=1)
    loader = Loader(both, Plan(34, 8, 3), VIEWS, **LOOK, settings=settings, max_bad=34)
    with pytest.raises(RuntimeError, match=r"^std::bad_alloc$"):
        next(loader.batches())
    assert loader.bad == set()


@EXECUTORS
def test_no_executor_sees_a_damaged_image(
    copied: ShardSet, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """DALI may crash on one; nor is one shown that can still be decoded."""
    damage(copied, 5, 0.1)
    entry = copied.samples[9]
    with (copied.root / copied.manifest.shards[int(entry["shard"])].name).open("r+b") as shard:
        shard.seek(int(entry["offset"]) + 14)  # the density in its JFIF header
        shard.write(b"\1\2")
    module = dali if executor == "dali" else fused
    shown: list[int] = []
    render = module.render

    def watched(source: Source, look: object, batch: int, settings: Settings) -> object:
        def told(number: int) -> EncodedBatch | None:
            work = source(number)
            shown.extend(work.ids.tolist() if work else ())
            return work

        return render(told, look, batch, settings)

    monkeypatch.setattr(module, "render", watched)
    loader = Loader(
        *(ConcatShardSets([copied]), Plan(24, 24, 3), VIEWS),
        **LOOK,
        settings=Settings(executor, threads=1),
        max_bad=2,
    )
    next(loader.batches())
    assert loader.bad == {5, 9}
    assert not {5, 9} & set(shown)


@EXECUTORS
def test_more_damage_than_allowed_is_named(
    damaged: tuple[ConcatShardSets, set[int]], executor: str
) -> None:
    with pytest.raises(DataError, match=r"^1 image\(s\) of a batch cannot be read: sample \d+"):
        stream(damaged[0], Settings(executor, threads=1, prefetch=1), max_bad=2)


def test_a_missing_shard_is_named(copied: ShardSet) -> None:
    data = ConcatShardSets([copied])
    (copied.root / "shard-000000.tar").unlink()
    named = r"8 image.s. of a batch cannot be read: sample \d+ \(\w+/\d+.jpg\) in .*000000.tar; "
    with pytest.raises(DataError, match=named):
        stream(data)
    with pytest.raises(DataError, match=r"^2 .* cannot be read: sample 3 .*; sample 4 "):
        evaluated(data, slice(3, 5), 2)


@EXECUTORS
def test_a_shard_cut_short_under_a_running_loader_is_named(copied: ShardSet, executor: str) -> None:
    data = ConcatShardSets([copied])
    batches = Loader(
        data, Plan(24, 8, 3), VIEWS, **LOOK, settings=Settings(executor, prefetch=1)
    ).batches()
    next(batches)
    shard = copied.root / "shard-000000.tar"
    with shard.open("r+b") as stream_of_bytes:
        stream_of_bytes.truncate(1000)
    with pytest.raises(DataError, match=r"cannot be read: sample \d+ \(\w+/\d+.jpg\) in .*00.tar"):
        for _ in range(6):
            next(batches)
