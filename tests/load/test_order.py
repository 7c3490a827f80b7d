"""Other ways through the samples: windows of shards, subsets, repeats."""

import shutil
from itertools import chain
from pathlib import Path

import numpy as np
import pytest
from copies import NO_PIXELS
from hypothesis import given
from hypothesis import strategies as st
from recipes import recipe_from

from fastmoco.config.recipe import Recipe
from fastmoco.core.rng import stratified
from fastmoco.dataset.shard_set import LABEL_DTYPE, ConcatShardSets, ShardSet, write_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.load.order import Order, Repeated, Shuffled, SubsetOrder, Windowed
from fastmoco.load.sampler import Plan, _shards, make_plan
from fastmoco.load.subset import read_ids

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
    plan = Plan(4, 2, 7, SubsetOrder(ids, Shuffled(4, 7)))
    shown = plan.order(np.arange(12)).reshape(3, 4)
    assert all(sorted(epoch) == ids.tolist() for epoch in shown.tolist())
    assert len({tuple(epoch) for epoch in shown.tolist()}) > 1


@pytest.fixture(scope="module")
def data(small_set: ShardSet, second_set: ShardSet) -> ConcatShardSets:
    """Two sets: 24 labelled samples of 3 classes, then 10 without a label."""
    return ConcatShardSets([small_set, second_set])


def recipe_of(**keys: object) -> Recipe:
    """Return a recipe with these keys, as a user's YAML would give them."""
    values = {"name": "x", "data": ["x"], "out": "x", "views": [{}, {}], "optimizer": {"lr": 1}}
    sizes = {"batch": 2, "bn": "whole", "schedule": {"epochs": 1}}
    return recipe_from(values | sizes | keys)


def epoch_of(plan: Plan, epoch: int = 0) -> list[int]:
    first = epoch * plan.samples
    return plan.order(np.arange(first, first + plan.samples)).tolist()


def test_a_recipe_names_its_ids(data: ConcatShardSets, tmp_path: Path) -> None:
    (tmp_path / "ids.txt").write_text("33\n5\n24\n7\n")
    plan = make_plan(recipe_of(subset={"ids": str(tmp_path / "ids.txt")}), data)
    assert plan.samples == 4 and plan.steps_per_epoch == 2
    assert sorted(epoch_of(plan)) == [5, 7, 24, 33]


def test_a_recipe_takes_a_share_of_every_class_of_every_set(data: ConcatShardSets) -> None:
    labels = np.concatenate([one.labels() for one in data.sets])
    ids = np.array(epoch_of(make_plan(recipe_of(subset={"fraction": 0.5}), data)))
    assert np.unique(labels[ids], return_counts=True)[1].tolist() == [5, 4, 4, 4]
    assert (ids >= 24).sum() == 5
    other = epoch_of(make_plan(recipe_of(subset={"fraction": 0.5, "seed": 1}), data))
    assert sorted(other) != sorted(ids.tolist())
    same = epoch_of(make_plan(recipe_of(subset={"fraction": 0.5}, seed=9), data))
    assert sorted(same) == sorted(ids.tolist()), "the run's seed changes the order alone"


def test_a_recipe_takes_the_classes_from_a_side_table(small_set: ShardSet, tmp_path: Path) -> None:
    copied = ShardSet(Path(shutil.copytree(small_set.root, tmp_path / "set", ignore=NO_PIXELS)))
    rows = np.zeros(20, LABEL_DTYPE)
    rows["id"], rows["label"] = np.arange(20), np.arange(20) // 10
    write_labels(copied, "late", rows, ["x", "y"], "test")
    subset = {"fraction": 0.2, "labels": "late"}
    ids = epoch_of(make_plan(recipe_of(subset=subset), ConcatShardSets([copied])))
    labels = copied.labels("late")[ids]
    assert np.unique(labels, return_counts=True)[1].tolist() == [1, 2, 2]  # -1: the 4 without


def test_a_recipe_repeats_and_windows(data: ConcatShardSets) -> None:
    once = make_plan(recipe_of(), data)
    thrice = make_plan(recipe_of(repeat=3), data)
    assert thrice.samples == 102 and thrice.steps_per_epoch == 51
    assert epoch_of(thrice) == epoch_of(once, 0) + epoch_of(once, 1) + epoch_of(once, 2)
    ids = np.array(epoch_of(make_plan(recipe_of(window=1), data)))
    changes = np.diff((ids >= 24).astype(int)).nonzero()[0]
    assert sorted(ids.tolist()) == list(range(34))
    assert len(changes) == 1, "one shard after the other"


def test_a_window_over_a_subset_reads_shards_as_a_whole(small_set: ShardSet) -> None:
    data = ConcatShardSets([small_set] * 4)  # 4 shards of 24
    ids = np.r_[2, 3, 20:24, 25, 90:96]
    recipe = recipe_of(window=1)
    order = SubsetOrder(ids, Windowed(_shards(data, ids), recipe.data.window, 0))
    shards = np.array(epoch_of(Plan(len(order), 2, 0, order))) // 24
    assert _shards(data, ids) == (6, 1, 6)
    assert len(np.diff(shards).nonzero()[0]) == 2


@pytest.mark.parametrize("subset", [{}, {"ids": "x", "fraction": 0.1}, {"fraction": 0}])
def test_a_subset_that_makes_no_sense(subset: dict[str, object]) -> None:
    with pytest.raises(UsageError, match="subset"):
        recipe_of(subset=subset)


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
