"""Rates chosen by labels held out: against separate trainings, and blind to the test set."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DivergedError, UsageError
from fastmoco.evaluate.choosing import HeldOut, choose_rate
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.probe import (
    Heads,
    ProbeConfig,
    cached_epochs,
    held_out_top1,
    judge,
    train_heads,
)
from fastmoco.runs.run_folder import RunFolder

RATES = (0.01, 0.1, 0.5)


def labelled(
    small_set: ShardSet, labels: list[int], weights: list[float] | None = None
) -> Labelled:
    count = len(labels)
    return replace(
        Labelled.of(small_set),
        ids=np.arange(count),
        labels=np.array(labels),
        weights=np.array(weights or [1.0] * count, np.float32),
    )


def test_a_tenth_of_each_class_where_there_are_ten(small_set: ShardSet) -> None:
    train = labelled(small_set, [0] * 10 + [1] * 29 + [2] * 30)
    held = HeldOut.of(train, seed=1)
    assert held.how == "holdout" and held.count == 1
    assert np.bincount(train.labels[held.folds == 0]).tolist() == [1, 2, 3]
    assert (held.folds[held.folds != 0] == -1).all()
    assert held.folds.tolist() != HeldOut.of(train, seed=2).folds.tolist()


def test_folds_where_a_class_has_fewer(small_set: ShardSet) -> None:
    """As many as the smallest class of several fills; the only one of its class is always seen."""
    train = labelled(small_set, [0] * 12 + [1] * 3 + [2])
    held = HeldOut.of(train, seed=1)
    assert held.how == "folds" and held.count == 3 and held.folds[15] == -1
    for label, each in ((0, [4, 4, 4]), (1, [1, 1, 1])):
        assert np.bincount(held.folds[train.labels == label]).tolist() == each
    with pytest.raises(UsageError, match=r"No class has two labels.*--choose test"):
        HeldOut.of(labelled(small_set, [0, 1, 2]), seed=1)


def test_the_highest_wins_and_of_equal_ones_the_lower_rate() -> None:
    assert choose_rate((3.0, 0.1, 1.0), [50, 75, 75], "folds", 4)["lr"] == 0.1
    assert choose_rate((3.0, 0.1), [50, float("nan")], "folds", 4) == {
        "lr": 3.0,
        "by": "folds",
        "images": 4,
        "candidates": [{"lr": 3.0, "top1": 50}, {"lr": 0.1, "top1": None}],
    }
    with pytest.raises(DivergedError, match=r"diverged at every learning rate \(3\)"):
        choose_rate((3.0,), [float("nan")], "folds", 4)


@pytest.mark.parametrize("weighted", [False, True])
def test_each_fold_is_a_training_without_it(small_set: ShardSet, weighted: bool) -> None:
    """Full batches in fp64: the heads of a fold are those of a set that lacks its samples."""
    generator = torch.Generator().manual_seed(0)
    count, dim, classes = 23, 6, 3
    features = torch.randn(count, dim, generator=generator, dtype=torch.float64)
    labels = torch.arange(count) % classes
    weights = [1.0 + i % 4 for i in range(count)] if weighted else None
    train = labelled(small_set, labels.tolist(), weights)
    held = HeldOut.of(train, seed=3)
    assert held.count == 5

    def heads_of(samples: tuple[torch.Tensor, ...], groups: int) -> Heads:
        protocol = ProbeConfig(epochs=10, batch=count)
        heads = Heads(dim, classes, RATES * groups).double()
        train_heads(heads, cached_epochs(samples, protocol), 1, protocol)
        return heads

    table = held.weights(train).astype(np.float64)
    together = heads_of((features, labels, torch.from_numpy(table / table.mean(axis=0))), 6)
    right = np.zeros(len(RATES))
    for fold in range(-1, 5):  # -1: on all
        kept = torch.from_numpy(held.folds != fold) if fold >= 0 else torch.ones(count, dtype=bool)
        own = torch.from_numpy(train.weights).double()[kept]
        alone = heads_of((features[kept], labels[kept], own / own.mean()), 1)
        group = together.group(1 + fold, len(RATES))
        assert group.rates == RATES
        torch.testing.assert_close(group.weight, alone.weight, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(group.bias, alone.bias, rtol=1e-6, atol=1e-6)
        if fold >= 0:
            found = judge(alone, features[~kept], labels[~kept])
            right += [(one.predicted == labels[~kept]).sum().item() for one in found]
    folds = torch.from_numpy(held.folds)
    top1 = held_out_top1(together, len(RATES), (features, labels), folds)
    assert top1 == pytest.approx((100 * right / count).tolist())


@pytest.fixture
def evaluation(
    make_run: Callable[..., RunFolder], small_set: ShardSet, unseen_set: ShardSet
) -> Evaluation:
    return Evaluation.open(make_run(executor="fused").root, small_set.root, unseen_set.root)


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_the_test_set_chooses_nothing(evaluation: Evaluation, features: str) -> None:
    """Other labels of the test images change what is best there, and no other choice."""
    protocol = ProbeConfig(epochs=4, lrs=(1e-6, 0.1, 1.0), batch=10, features=features)
    shuffled = replace(evaluation.test, labels=evaluation.test.labels[::-1].copy())
    first = evaluation.probe(protocol)
    second = replace(evaluation, test=shuffled).probe(protocol)
    assert first["chosen"] == second["chosen"] and first["chosen"]["by"] == "folds"
    assert first["chosen"]["images"] == 24 and first["chosen"]["lr"] > 1e-6
    assert first["best"] != second["best"]
    for row in (first, second):
        assert row["best"]["top1"] == max(one["top1"] for one in row["learning_rates"])
        (chosen,) = (one for one in row["learning_rates"] if one["lr"] == row["chosen"]["lr"])
        assert row["top1"] == chosen["top1"]


def test_by_the_test_set_if_asked_and_nothing_to_choose_of_one(evaluation: Evaluation) -> None:
    protocol = ProbeConfig(epochs=2, lrs=(0.01, 1.0), batch=10, features="cached", choose="test")
    row = evaluation.probe(protocol)
    assert "chosen" not in row and row["top1"] == row["best"]["top1"]
    assert "chosen" not in evaluation.probe(replace(protocol, lrs=(0.1,), choose="holdout"))
