"""Order: a permutation an epoch, random enough, the same on any number of ranks."""

from math import gcd

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from fastmoco.core.rng import Permutation, Stream
from fastmoco.errors import DataError, UsageError
from fastmoco.load.order import Shuffled, SubsetOrder, Windowed
from fastmoco.load.sampler import Plan

N, SEEDS = 1000, 200
BATCHES = 20  # an epoch, for the share of stored neighbors in one batch


def whole(size: int, *key: int) -> np.ndarray:
    return Permutation(size, key[0], Stream.ORDER, key[1])(np.arange(size))


def epoch_of(plan: Plan, epoch: int) -> np.ndarray:
    first = epoch * plan.steps_per_epoch
    steps = range(first, first + plan.steps_per_epoch)
    return np.concatenate([plan.order(plan.positions(step)) for step in steps])


def measures(order: np.ndarray) -> tuple[float, float, float]:
    """Return displacement, serial correlation, share of stored neighbors in one batch."""
    places = np.arange(len(order))
    batch_of = np.empty_like(places)
    batch_of[order] = places * BATCHES // len(order)
    return (
        float(np.abs(order - places).mean()),
        float(np.corrcoef(order[:-1], order[1:])[0, 1]),
        float((batch_of[:-1] == batch_of[1:]).mean()),
    )


def sigmas_from_random(orders: list[np.ndarray]) -> np.ndarray:
    """Return by how many sigma level and spread of each measure miss those of numpy's shuffles."""
    size, seeds = len(orders[0]), range(SEEDS)
    random = np.array([measures(np.random.default_rng(s).permutation(size)) for s in seeds])
    found = np.array([measures(order) for order in orders])
    center = random.mean(axis=0)

    def distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        error = np.sqrt((a.var(axis=0, ddof=1) + b.var(axis=0, ddof=1)) / SEEDS)
        return np.abs(a.mean(axis=0) - b.mean(axis=0)) / error

    level = distance(found, random)
    return np.stack([level, distance((found - center) ** 2, (random - center) ** 2)])


def test_every_small_size_is_permuted() -> None:
    for size in range(1, 301):
        assert np.array_equal(np.sort(whole(size, 3, size)), np.arange(size)), size


@settings(max_examples=60)
@given(st.integers(301, 10**9), st.integers(0, 2**63 - 1), st.integers(0, 10**6))
def test_large_sizes_collide_nowhere(size: int, seed: int, epoch: int) -> None:
    # Each end in full, where a walk that stops too early would show, and a spread between.
    asked = np.unique(np.r_[0:150, size - 150 : size, np.linspace(0, size - 1, 500).astype(int)])
    found = Permutation(size, seed, Stream.ORDER, epoch)(asked)
    assert found.min() >= 0 and found.max() < size
    assert len(np.unique(found)) == len(asked)


def test_a_large_size_is_permuted_in_full() -> None:
    assert np.array_equal(np.sort(whole(70_001, 5, 1)), np.arange(70_001))


@given(st.integers(1, 5000), st.data())
def test_any_index_alone_gives_what_the_whole_gives(size: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert Permutation(size, 1, Stream.ORDER, 2)(np.array(index)) == whole(size, 1, 2)[index]


@pytest.mark.parametrize("size", [1000, 50_000])
def test_orders_are_as_random_as_numpys(size: int) -> None:
    ours = [whole(size, seed, epoch) for seed in range(SEEDS // 2) for epoch in (0, 1)]
    assert sigmas_from_random(ours).max() < 3


@pytest.mark.parametrize("size", [1000, 50_000])
def test_the_check_of_randomness_rejects_an_affine_map(size: int) -> None:
    random = np.random.default_rng(0)
    steps = random.choice([a for a in range(2, size) if gcd(a, size) == 1], SEEDS)
    starts = random.integers(0, size, SEEDS)
    affine = [(np.arange(size) * a + b) % size for a, b in zip(steps, starts, strict=True)]
    assert np.array_equal(np.sort(affine[0]), np.arange(size))
    sigmas = sigmas_from_random(affine)
    assert (sigmas[1, 1:] > 3).all(), "serial correlation and neighbors must both give it away"


def test_all_pairs_of_values_are_equally_likely() -> None:
    """The indices are those that a Feistel network with few rounds confuses most."""
    keys = [(seed, epoch) for seed in range(400) for epoch in range(10)]
    pairs = np.array(
        [Permutation(50, key[0], Stream.ORDER, key[1])(np.array([0, 8])) for key in keys]
    )
    counts = np.bincount(pairs @ np.array([50, 1]), minlength=2500).reshape(50, 50)
    assert not counts.diagonal().any()
    assert stats.chisquare(counts[~np.eye(50, dtype=bool)]).pvalue > 0.01


def test_consecutive_epochs_are_unrelated() -> None:
    pairs = [(whole(N, seed, 0), whole(N, seed, 1)) for seed in range(SEEDS)]
    agree = np.array([(a == b).sum() for a, b in pairs])  # Poisson(1) for unrelated orders
    assert abs(agree.mean() - 1) < 3 / np.sqrt(SEEDS)


@pytest.mark.parametrize("change", [{"seed": 8}, {"epoch": 1}])
def test_seed_and_epoch_change_the_order(change: dict[str, int]) -> None:
    key = {"seed": 7, "epoch": 0}
    changed = key | change
    same = whole(N, key["seed"], key["epoch"]) == whole(N, changed["seed"], changed["epoch"])
    assert same.mean() < 0.02


def test_the_order_is_frozen() -> None:
    """A changed order would break the resume of every run that is under way."""
    assert whole(10, 0, 0).tolist() == [8, 7, 4, 2, 9, 0, 5, 1, 3, 6]
    plan = Plan(10**9, 4, seed=2**40)
    assert plan.order(np.array([0, 1, 10**9, 7 * 10**9 + 123])).tolist() == [
        627464087,
        859236130,
        418712733,
        786681044,
    ]


@given(st.integers(1, 200), st.integers(1, 200), st.integers(0, 2**63 - 1), st.integers(0, 5))
def test_an_epoch_shows_each_sample_once_up_to_the_tail(
    samples: int, batch: int, seed: int, epoch: int
) -> None:
    batch = min(batch, samples)
    shown = epoch_of(Plan(samples, batch, seed), epoch)
    assert len(shown) == samples - samples % batch
    assert len(np.unique(shown)) == len(shown)
    assert shown.min() >= 0 and shown.max() < samples


def test_another_tail_is_dropped_each_epoch() -> None:
    plan = Plan(103, 25, seed=0)
    tails = [frozenset(range(103)) - set(epoch_of(plan, epoch).tolist()) for epoch in range(6)]
    assert {len(tail) for tail in tails} == {3}
    assert len(set(tails)) == 6


def test_no_position_is_used_twice() -> None:
    plan = Plan(103, 25, seed=0)
    positions = np.concatenate([plan.positions(step) for step in range(20)])
    assert len(np.unique(positions)) == len(positions)
    assert positions[4 * 25] == 103  # the first of the second epoch


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_ranks_share_one_global_batch(ranks: int) -> None:
    plan = Plan(1003, 64, seed=9)
    for step in (0, 14, 15, 1234):
        slices = [plan.order(plan.positions(step, rank, ranks)) for rank in range(ranks)]
        assert {len(one) for one in slices} == {64 // ranks}
        assert np.array_equal(np.concatenate(slices), plan.order(plan.positions(step)))


def test_positions_of_several_epochs_may_be_asked_at_once() -> None:
    plan = Plan(30, 10, seed=4)
    mixed = np.array([61, 2, 30, 29, 60, 0])
    assert plan.order(mixed).tolist() == [int(plan.order(mixed[i : i + 1])[0]) for i in range(6)]


def test_the_next_good_sample_of_the_epoch_stands_in_for_a_bad_one() -> None:
    plan = Plan(10, 5, seed=0)
    shown = plan.order(np.arange(20)).tolist()
    bad = {shown[0], shown[1], shown[9]}
    found = plan.order(np.arange(20), bad).tolist()
    assert found[:2] == [shown[2]] * 2 and found[9] == shown[2]  # behind the last comes the first
    assert not bad & set(found)
    assert [a for a, b in zip(shown, found, strict=True) if a not in bad] == [
        b for a, b in zip(shown, found, strict=True) if a not in bad
    ]
    with pytest.raises(DataError, match="No image of the data can be decoded"):
        plan.order(np.arange(5), set(range(10)))


def test_another_order_has_another_digest() -> None:
    chosen = np.arange(0, 400, 2)
    plans = [
        Plan(200, 10, 0),
        Plan(200, 10, 1),
        Plan(201, 10, 0),
        Plan(200, 10, 0, SubsetOrder(chosen, Shuffled(200, 0))),
        Plan(200, 10, 0, SubsetOrder(chosen + 1, Shuffled(200, 0))),
        Plan(200, 10, 0, Windowed((50,) * 4, 2, 0)),
    ]
    assert len({plan.digest() for plan in plans}) == len(plans)
    assert plans[0].digest() == Plan(200, 20, 0).digest()


def test_any_other_chosen_id_has_another_digest() -> None:
    """Also one that an epoch shows after all those that the digest looks at in order."""
    chosen = np.arange(80_000)
    other = chosen.copy()
    other[-1] += 1
    digests = {
        Plan(80_000, 10, seed, SubsetOrder(ids, Shuffled(80_000, seed)), ids).digest()
        for seed in range(5)
        for ids in (chosen, other)
    }
    assert len(digests) == 10


def test_a_batch_larger_than_the_data_is_refused() -> None:
    with pytest.raises(UsageError, match=r"batch 11 is larger than the data \(10 images\): lower"):
        Plan(10, 11, seed=0)
    assert Plan(10, 10, seed=0).steps_per_epoch == 1
