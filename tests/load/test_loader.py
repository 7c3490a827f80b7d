"""Batches: a function of seed and step alone, every sample once for evaluation, damage by name."""

import random
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from itertools import count, islice
from pathlib import Path
from threading import Semaphore

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastmoco import load
from fastmoco.config import View
from fastmoco.errors import DataError, UsageError
from fastmoco.load import dali, portable
from fastmoco.load.loader import Batch, Loader, evaluation_batches
from fastmoco.load.plan import Plan
from fastmoco.load.reader import Reader
from fastmoco.load.work import Rendered, Settings, Source, Work
from fastmoco.pack.options import PackOptions
from fastmoco.pack.writer import pack
from fastmoco.shardset import Collection, ShardSet

STEPS = 7  # of 4 an epoch
VIEWS = (View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5), View(flip=0.5))
EXECUTORS = pytest.mark.parametrize("executor", ["dali", "torchvision"])
LOOK = {"size": 16, "mean": (0.5, 0.5, 0.5), "std": (0.2, 0.2, 0.2)}


@pytest.fixture(scope="session")
def both(small_set: ShardSet, second_set: ShardSet) -> Collection:
    """Ids 0..23 are `small_set`'s, 24..33 are `second_set`'s."""
    return Collection([small_set, second_set])


@pytest.fixture
def copied(small_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy of `small_set` that a test may damage."""
    return ShardSet(Path(shutil.copytree(small_set.root, tmp_path / "copy")))


def stream(
    data: Collection,
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


@pytest.fixture(scope="module", params=["dali", "torchvision"])
def expected(request: pytest.FixtureRequest, both: Collection) -> tuple[str, list[Batch]]:
    """The executor and its batches on one thread and one rank, from the start."""
    return request.param, stream(both, Settings(request.param, threads=1, prefetch=1))


def test_steps_ids_and_views_vary(expected: tuple[str, list[Batch]]) -> None:
    batches = expected[1]
    assert [batch.step for batch in batches] == list(range(STEPS))
    assert {batch.views[0].shape for batch in batches} == {(8, 3, 16, 16)}
    assert len(np.unique(np.concatenate([batch.ids for batch in batches[:4]]))) == 32
    assert max(batch.ids.max() for batch in batches) >= 24  # both sets take part
    assert not torch.equal(batches[0].views[0], batches[0].views[1])


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("prefetch", [1, 2, 3, 4])
def test_threads_and_prefetch_change_no_bit(
    both: Collection, expected: tuple[str, list[Batch]], threads: int, prefetch: int
) -> None:
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=threads, prefetch=prefetch)), batches)


def test_reading_in_any_order_changes_no_bit(
    both: Collection, expected: tuple[str, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, wait = Reader._read, random.Random(0)

    def late(self: Reader, *place: int) -> object:
        time.sleep(wait.random() / 100)
        return read(self, *place)

    monkeypatch.setattr(Reader, "_read", late)
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=1)), batches)
    assert_equal(stream(both, Settings(executor, threads=1), start=3), batches[3:])


def reading(both: Collection, monkeypatch: pytest.MonkeyPatch) -> tuple[Loader, Semaphore]:
    """Return a loader that does not draw ahead, and a count of the batches it has read."""
    read, work = Semaphore(0), Loader.work

    def counted(*arguments: object) -> Work:
        made = work(*arguments)
        read.release()
        return made

    monkeypatch.setattr(Loader, "work", counted)
    settings = Settings("torchvision", threads=1)
    return Loader(both, Plan(34, 8, 3), VIEWS, **LOOK, settings=settings, max_bad=9), read


def test_the_next_batches_are_read_before_they_are_asked_for(
    both: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    loader, read = reading(both, monkeypatch)
    batches = loader.batches()
    assert next(batches).step == 0
    assert all(read.acquire(timeout=60) for _ in range(4))  # steps 0 to 3
    assert not read.acquire(timeout=0.2), "no more than three ahead"
    assert next(batches).step == 1
    assert read.acquire(timeout=60)


def test_images_of_a_batch_are_read_at_the_same_time(
    both: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    read, all_there = Reader._read, threading.Barrier(8, timeout=60)

    def together(self: Reader, *place: int) -> object:
        all_there.wait()
        return read(self, *place)

    monkeypatch.setattr(Reader, "_read", together)
    assert len(evaluated(both, slice(0, 8), 8, "torchvision")) == 1


def test_what_was_read_before_it_was_known_as_damaged_is_not_shown(
    both: Collection, monkeypatch: pytest.MonkeyPatch
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
    data = Collection([copied])
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
from fastmoco.config import View
from fastmoco.load.loader import Loader
from fastmoco.load.plan import Plan
from fastmoco.load.reader import Reader
from fastmoco.load.work import Settings
from fastmoco.shardset import Collection

loader = Loader(
    Collection.open([Path(sys.argv[1])]), Plan(24, 24, 3), [View()] * 2,
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


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_together_draw_what_one_rank_draws(
    both: Collection, expected: tuple[str, list[Batch]], ranks: int
) -> None:
    executor, batches = expected
    settings = Settings(executor, threads=1)
    shares = [stream(both, settings, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert_equal([joined(parts) for parts in zip(*shares, strict=True)], batches)


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_restart_at_any_step_goes_on_as_if_never_stopped(
    both: Collection, expected: tuple[str, list[Batch]], start: int
) -> None:
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=2), start=start), batches[start:])


def test_another_seed_gives_other_ids_and_views(
    both: Collection, expected: tuple[str, list[Batch]]
) -> None:
    other = stream(both, Settings(expected[0], threads=1), stop=1, seed=4)[0]
    assert not np.array_equal(other.ids, expected[1][0].ids)


def test_an_image_is_drawn_anew_each_epoch(expected: tuple[str, list[Batch]]) -> None:
    seen: dict[int, torch.Tensor] = {}
    again = 0
    for batch in expected[1]:
        for sample, view in zip(batch.ids.tolist(), batch.views[0], strict=True):
            again += sample in seen
            assert sample not in seen or not torch.equal(seen[sample], view)
            seen[sample] = view
    assert again > 5


def test_no_two_epochs_share_their_numbers(both: Collection) -> None:
    loader = Loader(both, Plan(34, 8, 3), VIEWS, **LOOK, settings=Settings())
    ids, first = np.arange(8), np.arange(8)
    for view, later in zip(
        loader.numbers(first, ids), loader.numbers(first + 34, ids), strict=True
    ):
        assert (view.crop != later.crop).any(axis=1).all()


def test_executors_yield_the_same_batches_up_to_colour(both: Collection) -> None:
    one, two = (
        stream(both, Settings(executor, threads=1), stop=3) for executor in ("dali", "torchvision")
    )
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.ids, b.ids)
        levels = [51 * (x - y).abs().mean() for x, y in zip(a.views, b.views, strict=True)]
        assert levels[0] < 12 and levels[1] < 1  # hue differs between them, see test_views


def test_several_sets_are_read_as_one(
    both: Collection, small_set: ShardSet, second_set: ShardSet
) -> None:
    ids = np.array([24, 0, 33, 23, 5])
    found = Reader(both).fetch(ids)
    owners = [(second_set, 0), (small_set, 0), (second_set, 9), (small_set, 23), (small_set, 5)]
    for content, (owner, row) in zip(found, owners, strict=True):
        original = owner.root.parent / "source" / owner.name_of(row)
        assert content.tobytes() == original.read_bytes()


def evaluated(data: Collection, ids: slice, batch: int, executor: str = "dali", **look: float):
    look = LOOK | {"share": 1.0} | look
    settings = Settings(executor, threads=2)
    return list(evaluation_batches(data, ids=ids, batch=batch, settings=settings, **look))


@EXECUTORS
@pytest.mark.parametrize("ids", [slice(0, 34), slice(5, 23), slice(33, 34), slice(20, 20)])
@pytest.mark.parametrize("batch", [1, 7, 17, 40])
def test_evaluation_shows_every_sample_once_in_order(
    both: Collection, executor: str, ids: slice, batch: int
) -> None:
    if batch == 1 and ids.stop == 34 and ids.start == 0:
        ids = slice(0, 6)
    batches = evaluated(both, ids, batch, executor)
    shown = [int(i) for one in batches for i in one.ids]
    assert shown == list(range(ids.start, ids.stop))
    assert all(one.views[0].shape == (len(one.ids), 3, 16, 16) for one in batches)


@EXECUTORS
@pytest.mark.parametrize(("share", "size"), [(1.0, 24), (0.875, 21)])
def test_evaluation_shows_the_centre_of_the_image(
    both: Collection, second_set: ShardSet, executor: str, share: float, size: int
) -> None:
    """The second set's PNGs are 24 wide, 36 high: no pixel of the centre needs resampling."""
    (batch,) = evaluated(both, slice(24, 34), 10, executor, share=share, size=size)
    margin = (24 - size) // 2
    for row, view in enumerate(batch.views[0]):
        original = Image.open(second_set.root.parent / "source" / second_set.name_of(row))
        pixels = np.asarray(original)[(36 - size) // 2 :, margin:][:size, :size]
        expected = (torch.from_numpy(pixels.copy()).permute(2, 0, 1) / 255 - 0.5) / 0.2
        torch.testing.assert_close(view, expected, rtol=0, atol=1e-4)


class _Decoder(Exception):
    """Tells where images were to be decoded."""


@pytest.mark.parametrize(
    ("sets", "wanted", "device", "expected"),
    [
        (["large"], "auto", "cuda", "mixed"),
        (["small"], "auto", "cuda", "cpu"),
        (["small"], "mixed", "cuda", "mixed"),
        (["large"], "cpu", "cuda", "cpu"),
        (["png"], "auto", "cuda", "cpu"),
        (["large", "png"], "auto", "cuda", "cpu"),
        (["large"], "auto", "cpu", "auto"),
    ],
)
def test_a_gpu_decodes_large_jpegs(
    sets: list[str],
    wanted: str,
    device: str,
    expected: str,
    small_set: ShardSet,
    make_images: Callable[..., Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def made(name: str) -> ShardSet:
        if name == "small":
            return small_set
        extension = "jpg" if name == "large" else "png"
        images = make_images(tmp_path / f"{name} images", size=(160, 110), extension=extension)
        pack(images, tmp_path / name, PackOptions())
        return ShardSet(tmp_path / name)

    def told(source: object, look: object, batch: int, settings: Settings) -> Iterator[Rendered]:
        raise _Decoder(settings.decode)
        yield

    monkeypatch.setattr(dali, "render", told)
    data = Collection([made(name) for name in sets])
    settings = Settings(device=torch.device(device), decode=wanted)
    loader = Loader(data, Plan(8, 8, 3), VIEWS, **LOOK, settings=settings)
    evaluation = evaluation_batches(
        data, ids=slice(0, 8), batch=8, settings=settings, share=1.0, **LOOK
    )
    for batches in (loader.batches(), evaluation):
        with pytest.raises(_Decoder, match=f"^{expected}$"):
            next(batches)


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
from fastmoco.config import View
from fastmoco.errors import DataError
from fastmoco.load.loader import Loader
from fastmoco.load.plan import Plan
from fastmoco.load.work import Settings
from fastmoco.shardset import Collection

executor, root = sys.argv[1:]
loader = Loader(
    Collection.open([Path(root)]), Plan(24, 8, 3), [View(blur=0.5)] * 2,
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
        f"1 image(s) of a batch cannot be read: sample {bad} ({copied.name_of(bad)}) in "
        f"{copied.root}/shard-000000.tar. The shard was damaged after packing: "
        "copy the set again, or pack it anew. Training goes on without up to N damaged images if "
        "told so by max_bad_images=N."
    )


@pytest.fixture
def damaged(copied: ShardSet) -> tuple[Collection, set[int]]:
    """A copy of `small_set` of which three samples are damaged, two of them side by side."""
    shown = Plan(24, 8, 3).order(np.arange(24))
    bad = {int(shown[10]), int(shown[11]), int(shown[21])}
    for row in bad:
        damage(copied, row, 0.1)
    return Collection([copied]), bad


@EXECUTORS
def test_damaged_samples_are_replaced(
    damaged: tuple[Collection, set[int]], small_set: ShardSet, executor: str
) -> None:
    data, bad = damaged
    settings = Settings(executor, threads=1, prefetch=1)
    whole = stream(data, settings, max_bad=3)
    plan = Plan(24, 8, 3)
    intact = stream(Collection([small_set]), settings)
    for found, without in zip(whole, intact, strict=True):
        assert found.ids.tolist() == plan.order(plan.positions(found.step), bad).tolist()
        same = found.ids == without.ids
        assert same.sum() >= 5
        for a, b in zip(found.views, without.views, strict=True):
            assert torch.equal(a[same], b[same]), "the others are drawn as ever"


@EXECUTORS
@pytest.mark.parametrize("change", ["two threads, prefetch 3", "restart", "two ranks"])
def test_replacing_is_exact_too(
    damaged: tuple[Collection, set[int]], executor: str, change: str
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
    both: Collection, executor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Here the first batch fails for want of memory, as DALI and decoders behind PIL tell it."""
    calls = count()

    def fails_once(*arguments: object) -> object:
        if next(calls) == 0:
            raise RuntimeError("std::bad_alloc")
        return original(*arguments)

    owner, name = (Pipeline, "run") if executor == "dali" else (portable, "_decode")
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
    module = dali if executor == "dali" else portable
    shown: list[int] = []
    render = module.render

    def watched(source: Source, look: object, batch: int, settings: Settings) -> object:
        def told(number: int) -> Work | None:
            work = source(number)
            shown.extend(work.ids.tolist() if work else ())
            return work

        return render(told, look, batch, settings)

    monkeypatch.setattr(module, "render", watched)
    loader = Loader(
        *(Collection([copied]), Plan(24, 24, 3), VIEWS),
        **LOOK,
        settings=Settings(executor, threads=1),
        max_bad=2,
    )
    next(loader.batches())
    assert loader.bad == {5, 9}
    assert not {5, 9} & set(shown)


@EXECUTORS
def test_more_damage_than_allowed_is_named(
    damaged: tuple[Collection, set[int]], executor: str
) -> None:
    with pytest.raises(DataError, match=r"^1 image\(s\) of a batch cannot be read: sample \d+"):
        stream(damaged[0], Settings(executor, threads=1, prefetch=1), max_bad=2)


def test_a_missing_shard_is_named(copied: ShardSet) -> None:
    data = Collection([copied])
    (copied.root / "shard-000000.tar").unlink()
    named = r"8 image.s. of a batch cannot be read: sample \d+ \(\w+/\d+.jpg\) in .*000000.tar; "
    with pytest.raises(DataError, match=named):
        stream(data)
    with pytest.raises(DataError, match=r"^2 .* cannot be read: sample 3 .*; sample 4 "):
        evaluated(data, slice(3, 5), 2)


@EXECUTORS
def test_a_shard_cut_short_under_a_running_loader_is_named(copied: ShardSet, executor: str) -> None:
    data = Collection([copied])
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


def test_without_dali_the_remedy_is_named(
    both: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fastmoco.load.dali", raising=False)
    monkeypatch.delattr(load, "dali", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UsageError, match=r"'fastmoco\[cuda13\]'.*executor=torchvision"):
        stream(both)
    assert len(stream(both, Settings("torchvision"), stop=1)) == 1


def test_a_driver_too_old_for_dali_is_named(
    both: Collection, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(pipeline: Pipeline) -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(Pipeline, "build", build)
    with pytest.raises(UsageError, match=r"driver is too old.*'fastmoco\[cuda12\]'"):
        stream(both)
