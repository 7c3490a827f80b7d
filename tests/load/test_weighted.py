"""Samples shown as often as their weights say, on any number of ranks, from any step."""

from fractions import Fraction
from itertools import accumulate
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from recipes import recipe_from

from fastmoco.config.data import Weights
from fastmoco.core.rng import Permutation, Stream
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.load import order as orders
from fastmoco.load.order import Shuffled, Weighted
from fastmoco.load.sampler import Plan, make_plan
from fastmoco.load.weights import read_weights


def whole(order: Weighted | Shuffled, epoch: int) -> np.ndarray:
    return order(epoch, np.arange(len(order)))


def naive_epoch(weights: list[int], seed: int, epoch: int) -> list[int]:
    """Walk through the intervals in exact fractions, then shuffle."""
    word = int(np.random.Philox(key=np.array([seed, 5 * 2**33 + epoch], np.uint64)).random_raw())
    u = Fraction(word // 2**42, 2**22)
    ends = [Fraction(end * len(weights), sum(weights)) for end in accumulate(weights)]
    slots = []
    for place in range(len(weights)):
        sample = 0
        while not place + u < ends[sample]:
            sample += 1
        slots.append(sample)
    shuffle = Permutation(len(weights), seed, Stream.ORDER, epoch)
    return [slots[int(place)] for place in shuffle(np.arange(len(weights)))]


@given(
    st.lists(st.integers(0, 40), min_size=1, max_size=60).filter(any),
    st.integers(0, 2**63 - 1),
    st.integers(0, 10**6),
)
def test_an_epoch_is_that_of_the_rule_in_fractions(
    weights: list[int], seed: int, epoch: int
) -> None:
    order = Weighted(np.array(weights, float), seed)
    assert whole(order, epoch).tolist() == naive_epoch(weights, seed, epoch)


def test_each_sample_comes_floor_or_ceil_of_its_share() -> None:
    weights = np.random.default_rng(0).lognormal(size=1000)
    expected = 1000 * weights / weights.sum()
    counts = np.array(
        [np.bincount(whole(Weighted(weights, 3), e), minlength=1000) for e in range(400)]
    )
    assert (counts.sum(axis=1) == 1000).all()
    assert (np.abs(counts - expected) < 1 + 1e-9).all()
    share = expected % 1  # of the epochs that show it once more
    error = np.sqrt(share * (1 - share) / 400)
    assert (np.abs(counts.mean(axis=0) - expected) < 4.5 * error + 1e-9).all()
    assert len({tuple(row) for row in counts}) > 200, "another uniform number each epoch"


@pytest.mark.parametrize("weight", [1.0, 0.3])
def test_equal_weights_are_no_weights(weight: float) -> None:
    for size in (1, 2, 49, 1003):
        order = Weighted(np.full(size, weight), 8)
        for epoch in range(5):
            assert np.array_equal(whole(order, epoch), whole(Shuffled(size, 8), epoch))


def test_the_last_place_of_a_large_set_is_one_of_its_samples(monkeypatch) -> None:
    """There, j + u is close to the next whole number for the largest u."""
    monkeypatch.setattr(orders, "raw_words", lambda *_: np.array([2**64 - 1], np.uint64))
    size = 5_000_000
    last = np.flatnonzero(whole(Shuffled(size, 1), 0) >= size - 3)
    order = Weighted(np.ones(size), 1)
    assert np.array_equal(order(0, last), Shuffled(size, 1)(0, last))
    none_at_the_end = Weighted(np.r_[np.full(size - 1, 0.1), 0], 1)
    assert none_at_the_end(0, last).max() == size - 2


def test_the_weighted_order_is_frozen() -> None:
    """A changed order would break the resume of every run that is under way."""
    order = Weighted(np.array([0, 3, 1, 4, 0, 8, 2, 0], float), 6)
    assert whole(order, 0).tolist() == [5, 1, 1, 3, 5, 5, 5, 3]
    assert whole(order, 7).tolist() == [5, 1, 3, 5, 5, 3, 6, 1]


@pytest.mark.parametrize("ranks", [1, 2, 4])
def test_ranks_share_one_global_batch(ranks: int) -> None:
    weights = np.random.default_rng(1).random(103)
    plan = Plan(103, 8, 9, Weighted(weights, 9))
    for step in (0, 11, 12, 997):
        slices = [plan.order(plan.positions(step, rank, ranks)) for rank in range(ranks)]
        assert np.array_equal(np.concatenate(slices), plan.order(plan.positions(step)))
    mixed = np.array([700, 3, 102, 103, 0])
    assert plan.order(mixed).tolist() == [int(plan.order(mixed[i : i + 1])[0]) for i in range(5)]


def numbers_file(folder: Path, numbers: np.ndarray) -> Path:
    np.save(folder / "numbers.npy", numbers)
    return folder / "numbers.npy"


def recipe_of(**data: object):
    values = {"name": "x", "out": "x", "views": [{}, {}], "optimizer": {"lr": 1}, "batch": 2}
    sections = {"objective": {"bn": "whole"}, "schedule": {"epochs": 1}}
    return recipe_from(values | sections | {"data": {"sets": ["x"], **data}})


def test_weights_by_power_and_bound(small_set: ShardSet, tmp_path: Path) -> None:
    numbers = np.random.default_rng(0).lognormal(sigma=2, size=24)
    data, file = ConcatShardSets([small_set]), numbers_file(tmp_path, numbers)
    for power, bound in ((1.0, 4.0), (2.0, 10.0), (1000.0, 3.0)):
        found = read_weights(Weights(file=file, power=power, bound=bound), data)
        mean = sum(numbers) / 24
        # In logarithms, since a power of 1000 overflows.
        wanted = [power * np.log(h / mean) for h in numbers]
        wanted = [np.exp(min(max(w, -np.log(bound)), np.log(bound))) for w in wanted]
        assert np.allclose(found, wanted, rtol=1e-9)
        assert {found.min(), found.max()} == {1 / bound, bound}
    equal = numbers_file(tmp_path, np.full(24, 0.3))
    assert (read_weights(Weights(file=equal), data) == 1).all()


def test_a_recipe_weighs_its_samples(small_set: ShardSet, tmp_path: Path) -> None:
    data = ConcatShardSets([small_set])
    numbers = np.r_[np.zeros(12), np.full(12, 7.0)]
    recipe = recipe_of(weights=str(numbers_file(tmp_path, numbers)))
    assert recipe.data.weights == Weights(file=tmp_path / "numbers.npy")
    shown = make_plan(recipe, data).order(np.arange(240))
    weights = np.r_[np.full(12, 1 / 4), np.full(12, 2.0)]
    assert np.allclose(np.bincount(shown) / 10, 24 * weights / weights.sum(), atol=0.5)


def test_weights_of_a_subset_are_those_of_its_samples(small_set: ShardSet, tmp_path: Path) -> None:
    data, ids = ConcatShardSets([small_set]), [2, 3, 5, 20]
    (tmp_path / "ids.txt").write_text("\n".join(map(str, ids)))
    numbers = np.full(24, 1000.0)
    numbers[ids] = 1, 1, 1, 5
    section = {"file": str(numbers_file(tmp_path, numbers)), "bound": 10}
    recipe = recipe_of(weights=section, subset={"ids": str(tmp_path / "ids.txt")}, repeat=2)
    plan = make_plan(recipe, data)
    assert plan.samples == 8
    counts = np.bincount(plan.order(np.arange(800)), minlength=24)
    assert counts[ids].sum() == 800 and np.allclose(counts[ids] / 100, [1, 1, 1, 5], atol=0.2)


def test_other_weights_have_another_digest() -> None:
    ones, more = np.ones(100_000), np.ones(100_000)
    more[-1] += 1e-9
    digests = [Plan(100_000, 8, 0, Weighted(w, 0), None, w).digest() for w in (ones, more)]
    assert len({*digests, Plan(100_000, 8, 0).digest()}) == 3


@pytest.mark.parametrize(
    ("numbers", "told"),
    [
        (np.r_[np.ones(23), -0.1], "the number of sample 23 is negative"),
        (np.zeros(24), "all numbers are 0"),
        (np.ones(23), r"has the shape \(23,\), the data 24 samples"),
        (np.r_[1, np.inf, np.ones(22)], "the number of sample 1 is not finite"),
    ],
)
def test_weights_that_make_no_sense(small_set, tmp_path, numbers, told) -> None:
    recipe = recipe_of(weights=str(numbers_file(tmp_path, numbers)))
    with pytest.raises(DataError, match=told):
        make_plan(recipe, ConcatShardSets([small_set]))


def test_weights_have_no_windows() -> None:
    with pytest.raises(UsageError, match="leave out window or weights"):
        recipe_of(weights="x.csv", window=2)
