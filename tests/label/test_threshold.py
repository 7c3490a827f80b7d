"""Thresholds and estimates, each against its definition as loops."""

import math

import numpy as np
import pytest

from fastmoco.errors import DataError
from fastmoco.label.threshold import (
    LEAST,
    Judged,
    agree,
    choose_threshold,
    estimate_precision,
    require_threshold,
    take_surest,
    trace_precision,
    wilson,
)


def draw(seed: int, count: int, ties: bool = False) -> Judged:
    """Predictions that are right as often as they say."""
    random = np.random.default_rng(seed)
    confidence = random.uniform(0.2, 1, count)
    if ties:
        confidence = confidence.round(1)
    right = random.uniform(size=count) < confidence
    return Judged(confidence, right, random.integers(0, 5, count), count)


def naive_threshold(confidence, right, precision):
    for threshold in sorted(set(confidence.tolist())):
        above = [hit for c, hit in zip(confidence, right, strict=True) if c >= threshold]
        if len(above) >= LEAST and sum(above) / len(above) >= precision:
            return threshold
    return None


@pytest.mark.parametrize("ties", [False, True])
def test_the_smallest_threshold_that_reaches_the_precision(ties):
    missed = 0
    for seed in range(60):
        one = draw(seed, 80, ties)
        for precision in (0.5, 0.8, 0.9, 1.0):
            expected = naive_threshold(one.confidence, one.right, precision)
            missed += expected is None
            assert choose_threshold(one.confidence, one.right, precision) == expected
            if expected is None:
                with pytest.raises(DataError, match=rf"of {precision:g} is not reached: 0\.\d+ ab"):
                    require_threshold(one, precision)
    assert 20 < missed < 200, "both outcomes are among the examples"


def test_the_best_that_can_be_had_is_told():
    confidence = np.linspace(0.99, 0.60, 40)
    right = np.ones(40, dtype=bool)
    right[[3, 33]] = False
    one = Judged(confidence, right, np.arange(40) % 5, 40)
    # Of the first 33, 32 are right; the 34th is not, and no share of more is as high.
    words = r"^A precision of 0.99 is not reached: 0.970 above 0.670 \(33 labels\)"
    with pytest.raises(DataError, match=words):
        require_threshold(one, 0.99)
    few = Judged(confidence[:29], right[:29], one.folds[:29], 29)
    with pytest.raises(DataError, match="29 labels were predicted out of fold, 30 are needed"):
        require_threshold(few, 0.5)


def test_the_estimate_takes_each_folds_threshold_from_the_others():
    one = draw(7, 400)
    hits: list[bool] = []
    for fold in range(5):
        others = one.folds != fold
        threshold = naive_threshold(one.confidence[others], one.right[others], 0.85)
        for place in np.flatnonzero(one.folds == fold):
            if threshold is not None and one.confidence[place] >= threshold:
                hits.append(bool(one.right[place]))
    found = estimate_precision(one, 0.85, 0.0)
    assert (found["labels"], found["right"]) == (len(hits), sum(hits))
    assert found["precision"] == pytest.approx(sum(hits) / len(hits))
    by_hand = estimate_precision(one, None, 0.9)
    assert by_hand["labels"] == (one.confidence >= 0.9).sum()
    nothing = estimate_precision(one, None, 1.1)
    assert nothing == {"labels": 0, "right": 0, "precision": None, "low": None, "high": None}


def test_a_chosen_threshold_flatters_itself_and_the_estimate_does_not():
    """Predictions that are right half of the time, whatever they say: the rule finds luck alone."""
    chosen, estimated = [], []
    for seed in range(300):
        random = np.random.default_rng(seed)
        one = Judged(
            random.uniform(size=100),
            random.uniform(size=100) < 0.5,
            np.arange(100) % 5,
            100,
        )
        threshold = choose_threshold(one.confidence, one.right, 0.6)
        if threshold is None:
            continue
        chosen.append(one.right[one.confidence >= threshold].mean())
        found = estimate_precision(one, 0.6, threshold)
        estimated.append((found["right"], found["labels"]))
    right, labels = np.sum(estimated, axis=0)
    assert len(chosen) > 50 and np.mean(chosen) > 0.6
    assert right / labels < 0.57, "what is right by chance stays near one half"


def test_wilsons_interval_solves_its_equation():
    """|p - right / n| = z sqrt(p (1 - p) / n) at both ends; the values are of a textbook's kind."""
    from scipy.stats import binomtest

    for right, count in ((0, 30), (29, 30), (30, 30), (250, 400)):
        low, high = wilson(right, count)
        for end in (low, high):
            if 0 < end < 1:
                gap = 1.959964 * math.sqrt(end * (1 - end) / count)
                assert abs(end - right / count) == pytest.approx(gap)
        theirs = binomtest(right, count).proportion_ci(method="wilson")
        assert (low, high) == pytest.approx(tuple(theirs), abs=1e-6)


def test_the_curve_counts_what_is_above():
    one = draw(1, 700, ties=True)
    one = Judged(one.confidence, one.right, one.folds, 1000)  # 300 that two runs differ on
    points = trace_precision(one)
    assert len(points) == len(set(one.confidence.tolist()))
    for point in points:
        above = one.confidence >= point["threshold"]
        assert point["coverage"] == pytest.approx(above.sum() / 1000)
        assert point["precision"] == pytest.approx(one.right[above].mean())
    many = trace_precision(draw(1, 700))
    assert len(many) == 100 and many[-1]["coverage"] == 1
    assert [p["coverage"] for p in many] == sorted(p["coverage"] for p in many)


def test_the_surest_of_each_class():
    for seed in range(100):
        random = np.random.default_rng(seed)
        confidence, predicted = random.integers(0, 4, 30) / 4, random.integers(0, 5, 30)
        expected = []
        for label in range(5):
            members = [i for i in range(30) if predicted[i] == label]
            expected += sorted(members, key=lambda i: (-confidence[i], i))[:3]
        assert take_surest(confidence, predicted, 3).tolist() == sorted(expected)


def test_runs_agree_where_all_say_the_same():
    predicted = [np.array([0, 1, 2, 1]), np.array([0, 1, 1, 1]), np.array([0, 2, 2, 1])]
    confidence = [np.array([0.9, 0.8, 0.7, 0.3]), np.array([0.6, 0.9, 0.9, 0.9]), np.ones(4)]
    same, least = agree(predicted, confidence)
    assert same.tolist() == [True, False, False, True]
    assert least.tolist() == [0.6, 0.8, 0.7, 0.3]
