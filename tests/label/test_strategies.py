"""Orders of asking, each against its rule written naively."""

import numpy as np
import pytest
import torch

from fastmoco.label.clusters import ROUNDS, draw_centers, kmeans, lloyd, take_nearest
from fastmoco.label.diversity import coreset, herding, spread, take_typical, typiclust
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
    assert sorted(spread(rows, 5, 0).tolist()) == [0, 1, 2, 3, 4]
    assert sorted(typiclust(rows, rows[:1], 5, 0).tolist()) == [0, 1, 2, 3, 4]


def test_lloyds_algorithm_is_scikit_learns(monkeypatch):
    from sklearn.cluster import KMeans

    monkeypatch.setattr("fastmoco.label.clusters._BLOCK", 50)
    rows, weights = unit(8, 300, 4), torch.rand(300, generator=torch.Generator().manual_seed(9)) + 1
    for given in (None, weights.double()):
        reference = KMeans(7, init=rows[:7].numpy(), n_init=1, max_iter=ROUNDS, tol=0)
        reference.fit(rows.numpy(), sample_weight=given)
        centers, members = lloyd(rows, rows[:7], given)
        assert members.tolist() == reference.labels_.tolist()
        assert centers.numpy() == pytest.approx(reference.cluster_centers_, abs=1e-9)


def test_first_centers_lie_apart(monkeypatch):
    """One in each of 20 far clusters of very unequal size, from a sample of the rows."""
    monkeypatch.setattr("fastmoco.label.clusters._SAMPLED", 1500)
    random = torch.Generator().manual_seed(1)
    sizes = torch.tensor([900] + 19 * [60])
    own = torch.arange(20).repeat_interleave(sizes)
    places = torch.randn(20, 8, generator=random, dtype=torch.float64)
    noise = 1e-6 * torch.randn(len(own), 8, generator=random, dtype=torch.float64)
    rows = places[own] + noise
    centers = draw_centers(rows, 20, seed=3)
    assert (torch.cdist(centers, places).argmin(dim=1).sort().values == torch.arange(20)).all()
    assert torch.equal(centers, draw_centers(rows, 20, seed=3))
    assert not torch.equal(centers, draw_centers(rows, 20, seed=4))


def test_weights_draw_the_first_center():
    rows, weights = unit(8, 40, 4), torch.full((40,), 1e-9)
    weights[17] = 1
    assert torch.equal(draw_centers(rows, 1, 0, weights)[0], rows[17])


def test_an_empty_cluster_keeps_its_center():
    rows = torch.tensor([[0.0, 0], [0, 1]])
    centers, members = lloyd(rows, torch.tensor([[0.0, 0.4], [9.0, 9]]))
    assert members.tolist() == [0, 0] and centers.tolist() == [[0, 0.5], [9, 9]]


def test_each_center_takes_the_nearest_that_is_left():
    rows, centers = unit(10, 60), unit(11, 40)
    order = np.random.default_rng(0).permutation(40)
    expected: list[int] = []
    for number in order:
        free = [i for i in range(60) if i not in expected]
        gaps = [float((rows[i] - centers[number]).norm()) for i in free]
        expected.append(free[int(np.argmin(gaps))])
    assert take_nearest(rows, centers, order).tolist() == expected


@pytest.mark.parametrize("weighted", [False, True])
def test_spread_takes_the_center_of_each_cluster_the_largest_first(weighted):
    rows = unit(12, 300, 5)
    weights = torch.linspace(0.1, 3, 300, dtype=torch.float64) if weighted else None
    _, members = kmeans(rows, 30, 6, weights)
    sizes = [int((members == cluster).sum()) for cluster in range(30)]
    expected: list[int] = []
    for cluster in sorted(range(30), key=lambda cluster: -sizes[cluster]):
        share = torch.ones(300) if weights is None else weights
        inside = [i for i in range(300) if members[i] == cluster]
        center = sum(share[i] * rows[i] for i in inside) / sum(share[i] for i in inside)
        free = [i for i in range(300) if i not in expected]
        expected.append(min(free, key=lambda i: float((rows[i] - center).norm())))
    assert spread(rows, 30, 6, weights).tolist() == expected


def naive_typiclust(
    rows: torch.Tensor, members: list[int], labelled: list[int], budget: int
) -> list[int]:
    """The rule as the paper's code has it, but that small clusters follow at the end."""
    left = {c: [i for i, m in enumerate(members) if m == c] for c in set(members) | set(labelled)}
    sizes = {c: len(left[c]) + labelled.count(c) for c in left}
    order = sorted(left, key=lambda c: (labelled.count(c), -sizes[c], c))
    taken: list[int] = []
    for clusters in ([c for c in order if sizes[c] > 5], [c for c in order if sizes[c] <= 5]):
        while len(taken) < budget and any(left[c] for c in clusters):
            for cluster in clusters:
                free = left[cluster]
                if not free or len(taken) == budget:
                    continue
                count, scores = min(20, len(free) // 2), []
                for i in free:
                    gaps = sorted(float((rows[i] - rows[j]).norm()) for j in free if j != i)
                    scores.append(1 / (sum(gaps[:count]) / max(1, count) + 1e-5))
                taken.append(free.pop(int(np.argmax(scores))))
    return taken


@pytest.mark.parametrize("budget", [40, 300])
def test_typical_samples_are_taken_cluster_by_cluster(budget, monkeypatch):
    monkeypatch.setattr("fastmoco.label.diversity._BLOCK", 17)
    monkeypatch.setattr("fastmoco.label.diversity._SPARE", 4)
    random = np.random.default_rng(2)
    members = random.choice(9, 300, p=[0.4, 0.2, 0.15, 0.1, 0.05, 0.05, 0.02, 0.02, 0.01])
    labelled = random.choice([0, 2, 5, 8], 12)
    rows = unit(13, 300, 4)
    found = take_typical(rows, members, labelled, budget).tolist()
    assert found == naive_typiclust(rows, members.tolist(), labelled.tolist(), budget)


def test_typiclust_clusters_what_is_labelled_too():
    """Two far groups, labels in one: the other is asked for first, and then each in turn."""
    near, far = (0.1 * unit(seed, 12) + shift for seed, shift in ((14, 0), (15, 5)))
    rows, known = torch.cat([near[:10], far]), near[10:]
    found = typiclust(rows, known, 2, seed=0)  # four clusters
    assert found[0] >= 10 and len(set(found.tolist())) == 2
    assert sorted(typiclust(rows, known, 22, seed=0).tolist()) == list(range(22))
