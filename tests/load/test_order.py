"""Other ways through the samples: windows of shards, subsets, repeats."""

from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastmoco.errors import DataError
from fastmoco.load.order import Chosen, Order, Repeated, Shuffled, Windowed
from fastmoco.load.plan import Plan
from fastmoco.load.subset import read_ids, stratified

SHARDS = (7, 3, 11, 5, 1, 9, 4)


def whole(order: Order, epoch: int) -> np.ndarray:
    return order(epoch, np.arange(len(order)))


@given(
    st.lists(st.integers(1, 40), min_size=1, max_size=12),
    st.integers(1, 14),
    st.integers(0, 2**63 - 1),
    st.integers(0, 9),
)
def test_windows_show_each_sample_once(
    shards: list[int], window: int, seed: int, epoch: int
) -> None:
    order = Windowed(tuple(shards), window, seed)
    shown = whole(order, epoch)
    assert np.array_equal(np.sort(shown), np.arange(sum(shards)))
    one_by_one = [int(order(epoch, np.array([i]))[0]) for i in range(min(20, len(order)))]
    assert one_by_one == shown[: len(one_by_one)].tolist()


def test_a_window_holds_whole_shards_and_mixes_them() -> None:
    order, shard_of = Windowed(SHARDS, 3, 5), np.repeat(np.arange(len(SHARDS)), SHARDS)
    seen = set()
    for epoch in range(5):
        shards = shard_of[whole(order, epoch)]
        at, windows = 0, []
        while at < len(shards):
            members = list(dict.fromkeys(shards[at:]))[:3]
            size = sum(SHARDS[shard] for shard in members)
            # The first samples of a window need not show all its shards: take those of its size.
            members = sorted(set(shards[at : at + size].tolist()))
            windows.append(tuple(members))
            at += sum(SHARDS[shard] for shard in members)
        assert sorted(shard for window in windows for shard in window) == list(range(7))
        assert [len(window) for window in windows] == [3, 3, 1]
        seen.add(tuple(windows))
    assert len(seen) == 5, "another order of the shards each epoch"
    both = whole(Windowed((50, 50), 2, 0), 0) // 50
    assert 30 < (both[:-1] != both[1:]).sum() < 70, "shuffled, not one after the other"


def test_one_window_over_all_shards_is_a_full_shuffle() -> None:
    orders = np.array([whole(Windowed(SHARDS, 7, seed), 0) for seed in range(400)])
    # Every id is as likely at every place: mean N/2, error of a uniform draw.
    error = len(orders[0]) / np.sqrt(12 * 400)
    assert (abs(orders.mean(axis=0) - 19.5) < 4.5 * error).all()


def test_chosen_samples_are_all_that_is_shown() -> None:
    ids = np.array([3, 8, 9, 40])
    plan = Plan(4, 2, 7, Chosen(ids, 7))
    shown = plan.order(np.arange(12)).reshape(3, 4)
    assert all(sorted(epoch) == ids.tolist() for epoch in shown.tolist())
    assert len({tuple(epoch) for epoch in shown.tolist()}) > 1


def test_a_repeated_order_counts_on_through_the_epochs() -> None:
    once = Shuffled(11, 3)
    thrice = Repeated(once, 3)
    assert len(thrice) == 33
    rounds = [whole(once, epoch).tolist() for epoch in range(6)]
    assert whole(thrice, 0).tolist() == list(chain(*rounds[:3]))
    assert whole(thrice, 1).tolist() == list(chain(*rounds[3:]))


def test_a_share_of_every_class() -> None:
    labels = np.repeat([-1, 0, 1, 2], [30, 100, 40, 3]).astype(np.int32)
    ids = stratified(labels, 0.1, seed=0)
    assert np.unique(labels[ids], return_counts=True)[1].tolist() == [3, 10, 4, 1]
    assert ids.tolist() == sorted(set(ids.tolist()))
    assert ids.tolist() != stratified(labels, 0.1, seed=1).tolist()
    assert set(ids.tolist()) < set(stratified(labels, 0.5, seed=0).tolist())
    assert len(stratified(labels, 1.0, seed=0)) == len(labels)
    # No place within a class is preferred.
    counts = np.zeros(100)
    for seed in range(300):
        counts[stratified(np.zeros(100, np.int32), 0.1, seed)] += 1
    assert abs(counts - 30).max() < 5 * np.sqrt(30)


def test_ids_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("5\n0\n3\n")
    np.save(tmp_path / "ids.npy", np.array([5, 0, 3], dtype=np.uint16))
    for name in ("ids.txt", "ids.npy"):
        assert read_ids(tmp_path / name, 6).tolist() == [0, 3, 5]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("1\n2\n1\n", "the id 1 twice"),
        ("1\n6\n", r"the id 6; those of the data are 0\.\.5"),
        ("-1\n", "the id -1"),
        ("", "no ids"),
        ("one", "cannot be read"),
        ("1.5", "cannot be read"),
    ],
)
def test_ids_that_make_no_sense(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "ids.txt").write_text(text)
    with pytest.raises(DataError, match=message):
        read_ids(tmp_path / "ids.txt", 6)
