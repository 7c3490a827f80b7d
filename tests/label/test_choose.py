"""What is chosen by features, as the command and the benchmark choose."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from fastmoco.core.rng import Stream, raw_words
from fastmoco.errors import UsageError
from fastmoco.label.choose import Options, choose
from fastmoco.label.clusters import kmeans
from fastmoco.label.head import Head, fit_head, fit_linear, standardize
from fastmoco.label.pool import PoolFeatures
from fastmoco.label.uncertainty import disagree, judge

CLASSES = 3


@pytest.fixture(scope="module")
def data() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """300 candidates of three groups that overlap, 30 labelled rows and their labels."""
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(330) % CLASSES
    centers = torch.randn(CLASSES, 6, generator=random, dtype=torch.float64)
    rows = centers[labels] + torch.randn(330, 6, generator=random, dtype=torch.float64)
    rows = standardize(rows, torch.zeros(6, dtype=torch.float64))
    return rows[:300], rows[300:], labels[300:]


def test_hybrid_clusters_the_samples_of_the_smallest_margin(data):
    rows, known, labels = data
    options = Options(6, "hybrid", balanced=False, seed=2)
    chosen = choose([PoolFeatures(rows, known, 1)], labels, CLASSES, options, [])
    assert chosen.head is not None and chosen.beliefs is not None
    margins = judge(fit_head(known, labels, CLASSES, 2), rows).margin
    unsure = sorted(range(300), key=lambda i: margins[i])[:60]
    score = torch.tensor([-margins[i] for i in unsure], dtype=torch.float64)
    centers, members = kmeans(rows[unsure], 6, 2, score - score.min() + 1e-3)
    expected: list[int] = []
    for cluster in sorted(range(6), key=lambda c: -int((members == c).sum())):
        free = [i for i in unsure if i not in expected]
        expected.append(min(free, key=lambda i: float((rows[i] - centers[cluster]).norm())))
    assert chosen.places.tolist() == expected
    assert np.array_equal(chosen.beliefs.margin, margins[expected])


@pytest.mark.parametrize(
    ("strategy", "balanced", "warned"),
    [
        ("margin", True, False),
        ("margin", False, True),
        ("entropy", True, True),
        ("coreset", True, True),
        ("disagreement", True, True),
        ("hybrid", True, False),
        ("herding", True, False),
    ],
)
def test_what_loses_with_few_labels_is_told(data, strategy, balanced, warned):
    rows, known, labels = data
    warnings: list[str] = []
    options = Options(5, strategy, balanced=balanced, members=2 * (strategy == "disagreement"))
    choose([PoolFeatures(rows, known, 1)], labels, CLASSES, options, warnings)
    assert any("10 labels a class are few" in warning for warning in warnings) == warned


def test_typiclust_needs_two_clusters_a_class_and_makes_500_at_most(data, monkeypatch):
    rows, known, labels = data
    features = [PoolFeatures(rows, known, 1)]
    with pytest.raises(UsageError, match=r"35 clusters, too few for 18 classes.*herding"):
        choose(features, labels, 18, Options(5, "typiclust"), [])
    monkeypatch.setattr("fastmoco.label.choose.CLUSTERS", 34)
    with pytest.raises(UsageError, match=r"34 clusters, too few for 18 classes"):
        choose(features, labels, 18, Options(50, "typiclust"), [])
    warnings: list[str] = []
    choose(features, labels, 17, Options(5, "typiclust"), warnings)
    assert warnings == ["typiclust makes 34 clusters at most, not 35"]


def test_disagreement_is_the_mean_divergence_from_the_mean(data, monkeypatch):
    monkeypatch.setattr("fastmoco.label.uncertainty.CHUNK", 7)
    rows, known, labels = data
    members = [
        (Head(*fit_linear(known[some], labels[some], CLASSES, 1.0), temperature=0.5), rows)
        for some in (slice(0, 12), slice(9, 21), slice(15, 30))
    ]
    found = disagree(members)
    for i, row in enumerate(rows):
        ps = [torch.softmax((h.weight @ row + h.bias) / 0.5, dim=0).numpy() for h, _ in members]
        mean = sum(ps) / 3
        divergences = [sum(p * np.log(p / mean)) for p in ps]
        assert found[i] == pytest.approx(sum(divergences) / 3, abs=1e-12)


def test_a_committee_is_of_bootstraps_and_of_other_runs(data):
    """The order is that of members fitted one by one; the beliefs are those of the run's head."""
    rows, known, labels = data
    other = PoolFeatures(rows.flip(1)[:, :4].contiguous(), known.flip(1)[:, :4].contiguous(), 1)
    features = [PoolFeatures(rows, known, 1), other]
    weights = 1 + torch.arange(30).double() % 4
    head = fit_head(known, labels, CLASSES, 3, weights)
    theirs = (fit_head(other.known, labels, CLASSES, 3, weights), other.rows)
    words = [raw_words(3, Stream.QUERY, 16 + member, 30) for member in range(2)]
    drawn = [[int(word) % 30 for word in row] for row in words]
    assert all(len(set(draw)) < 30 for draw in drawn), "with replacement"
    bootstraps = [
        (replace(head, weight=weight, bias=bias), rows)
        for weight, bias in (
            fit_linear(known[draw], labels[draw], CLASSES, head.strength, weights=weights[draw])
            for draw in drawn
        )
    ]
    for members, expected in ((2, [*bootstraps, theirs]), (0, [(head, rows), theirs])):
        options = Options(9, "disagreement", balanced=False, seed=3, members=members)
        chosen = choose(features, labels, CLASSES, options, [], weights)
        scores = disagree(expected)
        assert chosen.places.tolist() == sorted(range(300), key=lambda i: (-scores[i], i))[:9]
        assert np.array_equal(chosen.scores, scores[chosen.places])
        assert chosen.head is not None and torch.equal(chosen.head.weight, head.weight)
        of_all = judge(head, rows).confidence
        assert np.array_equal(chosen.beliefs.confidence, of_all[chosen.places])
