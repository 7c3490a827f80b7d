"""Batches: a function of seed and step alone, and every sample once for evaluation."""

import random
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from nvidia.dali.pipeline import Pipeline
from PIL import Image

from fastmoco import load
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import UsageError
from fastmoco.load import dali_executor as dali
from fastmoco.load.executor import DecodedBatch, Settings
from fastmoco.load.loader import Batch, Loader, evaluation_batches
from fastmoco.load.sampler import Plan
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

from .conftest import EXECUTORS, LOOK, STEPS, VIEWS, assert_equal, evaluated, joined, stream


@pytest.fixture(scope="module", params=["dali", "fused"])
def expected(request: pytest.FixtureRequest, both: ConcatShardSets) -> tuple[str, list[Batch]]:
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
    both: ConcatShardSets, expected: tuple[str, list[Batch]], threads: int, prefetch: int
) -> None:
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=threads, prefetch=prefetch)), batches)


def test_reading_in_any_order_changes_no_bit(
    both: ConcatShardSets, expected: tuple[str, list[Batch]], monkeypatch: pytest.MonkeyPatch
) -> None:
    read, wait = Reader._read, random.Random(0)

    def late(self: Reader, *place: int) -> object:
        time.sleep(wait.random() / 100)
        return read(self, *place)

    monkeypatch.setattr(Reader, "_read", late)
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=1)), batches)
    assert_equal(stream(both, Settings(executor, threads=1), start=3), batches[3:])


@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_ranks_together_draw_what_one_rank_draws(
    both: ConcatShardSets, expected: tuple[str, list[Batch]], ranks: int
) -> None:
    executor, batches = expected
    settings = Settings(executor, threads=1)
    shares = [stream(both, settings, rank=rank, ranks=ranks) for rank in range(ranks)]
    assert_equal([joined(parts) for parts in zip(*shares, strict=True)], batches)


@pytest.mark.parametrize("start", range(1, STEPS))
def test_a_restart_at_any_step_goes_on_as_if_never_stopped(
    both: ConcatShardSets, expected: tuple[str, list[Batch]], start: int
) -> None:
    executor, batches = expected
    assert_equal(stream(both, Settings(executor, threads=2), start=start), batches[start:])


def test_another_seed_gives_other_ids_and_views(
    both: ConcatShardSets, expected: tuple[str, list[Batch]]
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


def test_no_two_epochs_share_their_numbers(both: ConcatShardSets) -> None:
    loader = Loader(both, Plan(34, 8, 3), VIEWS, **LOOK, settings=Settings())
    ids, first = np.arange(8), np.arange(8)
    for view, later in zip(
        loader.numbers(first, ids), loader.numbers(first + 34, ids), strict=True
    ):
        assert (view.crop != later.crop).any(axis=1).all()


def test_executors_yield_the_same_batches_up_to_color(both: ConcatShardSets) -> None:
    one, two = (
        stream(both, Settings(executor, threads=1), stop=3) for executor in ("dali", "fused")
    )
    for a, b in zip(one, two, strict=True):
        assert np.array_equal(a.ids, b.ids)
        levels = [51 * (x - y).abs().mean() for x, y in zip(a.views, b.views, strict=True)]
        assert levels[0] < 12 and levels[1] < 1  # hue differs between them, see test_views


def test_several_sets_are_read_as_one(
    both: ConcatShardSets, small_set: ShardSet, second_set: ShardSet
) -> None:
    ids = np.array([24, 0, 33, 23, 5])
    found = Reader(both).fetch(ids)
    owners = [(second_set, 0), (small_set, 0), (second_set, 9), (small_set, 23), (small_set, 5)]
    for content, (owner, row) in zip(found, owners, strict=True):
        original = owner.root.parent / "source" / owner.get_name(row)
        assert content.tobytes() == original.read_bytes()


@EXECUTORS
@pytest.mark.parametrize("ids", [slice(0, 34), slice(5, 23), slice(33, 34), slice(20, 20)])
@pytest.mark.parametrize("batch", [1, 7, 17, 40])
def test_evaluation_shows_every_sample_once_in_order(
    both: ConcatShardSets, executor: str, ids: slice, batch: int
) -> None:
    if batch == 1 and ids.stop == 34 and ids.start == 0:
        ids = slice(0, 6)
    batches = evaluated(both, ids, batch, executor)
    shown = [int(i) for one in batches for i in one.ids]
    assert shown == list(range(ids.start, ids.stop))
    assert all(one.views[0].shape == (len(one.ids), 3, 16, 16) for one in batches)


@EXECUTORS
@pytest.mark.parametrize(("share", "size"), [(1.0, 24), (0.875, 21)])
def test_evaluation_shows_the_center_of_the_image(
    both: ConcatShardSets, second_set: ShardSet, executor: str, share: float, size: int
) -> None:
    """The second set's PNGs are 24 wide, 36 high: no pixel of the center needs resampling."""
    (batch,) = evaluated(both, slice(24, 34), 10, executor, share=share, size=size)
    margin = (24 - size) // 2
    for row, view in enumerate(batch.views[0]):
        original = Image.open(second_set.root.parent / "source" / second_set.get_name(row))
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

    def told(
        source: object, look: object, batch: int, settings: Settings
    ) -> Iterator[DecodedBatch]:
        raise _Decoder(settings.decode)
        yield

    monkeypatch.setattr(dali, "render", told)
    data = ConcatShardSets([made(name) for name in sets])
    settings = Settings(device=torch.device(device), decode=wanted)
    loader = Loader(data, Plan(8, 8, 3), VIEWS, **LOOK, settings=settings)
    evaluation = evaluation_batches(
        data, ids=slice(0, 8), batch=8, settings=settings, share=1.0, **LOOK
    )
    for batches in (loader.batches(), evaluation):
        with pytest.raises(_Decoder, match=f"^{expected}$"):
            next(batches)


def test_without_dali_the_remedy_is_named(
    both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delitem(sys.modules, "fastmoco.load.dali_executor", raising=False)
    monkeypatch.delattr(load, "dali_executor", raising=False)
    monkeypatch.setitem(sys.modules, "nvidia.dali", None)
    with pytest.raises(UsageError, match=r"'fastmoco\[cuda13\]'.*executor=fused"):
        stream(both)
    assert len(stream(both, Settings("fused"), stop=1)) == 1


def test_a_driver_too_old_for_dali_is_named(
    both: ConcatShardSets, monkeypatch: pytest.MonkeyPatch
) -> None:
    def build(pipeline: Pipeline) -> None:
        raise RuntimeError("CUDA driver version is insufficient for CUDA runtime version")

    monkeypatch.setattr(Pipeline, "build", build)
    with pytest.raises(UsageError, match=r"driver is too old.*'fastmoco\[cuda12\]'"):
        stream(both)
