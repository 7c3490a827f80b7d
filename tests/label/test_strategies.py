"""Orders of asking, each against its rule written naively."""

import numpy as np
import pytest
import torch

from fastmoco.label.diversity import coreset, herding
from fastmoco.label.head import Head
from fastmoco.label.uncertainty import Beliefs, balance, judge, rank_scores


def unit(seed: int, n: int, d: int = 3) -> torch.Tensor:
    random = torch.Generator().manual_seed(seed)
    rows = torch.randn(n, d, generator=random, dtype=torch.float64)
    return torch.nn.functional.normalize(rows, dim=1)


def test_beliefs_by_hand():
    rows = 4 * unit(0, 50)
    head = Head(unit(1, 5), torch.linspace(-1, 1, 5, dtype=torch.float64), temperature=0.5)
    found = judge(head, rows)
    for i, row in enumerate(rows):
        p = torch.softmax((head.weight @ row + head.bias) / 0.5, dim=0).numpy()
        first, second = np.sort(p)[::-1][:2]
        assert found.predicted[i] == p.argmax()
        numbers = found.confidence[i], found.margin[i], found.entropy[i]
        expected = first, first - second, -(p * np.log(p)).sum() / np.log(5)
        assert numbers == pytest.approx(expected, abs=1e-12)


def test_intersection_is_three_lists_that_grow_together():
    for seed in range(200):
        random = np.random.default_rng(seed)
        n = 12
        # Few values: many ties.
        columns = (random.integers(0, 4, n) / 4 for _ in range(3))
        beliefs = Beliefs(np.zeros(n, np.int64), *columns)
        found = rank_scores(beliefs.scores("intersection")).tolist()
        lists = [
            rank_scores(beliefs.scores(name)).tolist() for name in ("least", "margin", "entropy")
        ]
        taken: list[int] = []
        for r in range(1, n + 1):
            common = set.intersection(*(set(order[:r]) for order in lists))
            taken += sorted(common - set(taken))
        assert found == taken


def test_of_equal_scores_the_first_comes_first():
    assert rank_scores(np.array([1.0, 3.0, 1.0, 3.0])).tolist() == [1, 3, 0, 2]


def test_balance_passes_over_a_full_class_until_the_end():
    order, predicted = np.arange(8), np.array([0, 0, 0, 0, 1, 0, 1, 2])
    assert balance(order, predicted, 6, 3).tolist() == [0, 1, 4, 6, 7, 2]
    assert balance(order, np.zeros(8, np.int64), 5, 3).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("labelled", [0, 3])
def test_coreset_takes_the_farthest_each_time(labelled):
    rows, known = unit(2, 12), unit(3, labelled)
    centers, expected = list(known), []
    for _ in range(12):
        free = [i for i in range(12) if i not in expected]
        if centers:
            gaps = [min(float((rows[i] - c).norm()) for c in centers) for i in free]
        else:
            gaps = [float((rows[i] - rows.mean(dim=0)).norm()) for i in free]
        expected.append(free[int(np.argmax(gaps))])
        centers.append(rows[expected[-1]])
    assert coreset(rows, known, 12).tolist() == expected


@pytest.mark.parametrize(("labelled", "reference"), [(0, None), (4, None), (2, 25)])
def test_herding_covers_the_most_each_time(labelled, reference, monkeypatch):
    monkeypatch.setattr("fastmoco.label.diversity._FRESH", 3)
    monkeypatch.setattr("fastmoco.label.diversity._BLOCK", 7)
    rows, known = unit(4, 40), unit(5, labelled)
    points = rows if reference is None else unit(6, reference)

    def kernel(x: torch.Tensor, y: torch.Tensor) -> float:
        return float(torch.exp(-(x - y).square().sum()))

    covered = [max((kernel(p, k) for k in known), default=0.0) for p in points]
    found = herding(rows, known, 40, None if reference is None else points).tolist()
    assert sorted(found) == list(range(40))
    for number, place in enumerate(found):
        gains = [
            sum(max(kernel(p, row) - m, 0) for p, m in zip(points, covered, strict=True))
            for row in rows
        ]
        free = [gains[i] for i in range(40) if i not in found[:number]]
        assert gains[place] >= max(free) - 1e-9  # of two that cover each other, rounding decides
        covered = [max(m, kernel(p, rows[place])) for p, m in zip(points, covered, strict=True)]


def test_equal_samples_are_all_taken_in_order():
    rows = unit(7, 1).expand(5, 3)
    assert coreset(rows, rows[:1], 5).tolist() == [0, 1, 2, 3, 4]
    assert herding(rows, rows[:1], 5).tolist() == [0, 1, 2, 3, 4]
