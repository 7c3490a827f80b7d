"""What is chosen by features, as the command and the benchmark choose."""

import numpy as np
import pytest
import torch

from fastmoco.errors import UsageError
from fastmoco.label.clusters import kmeans
from fastmoco.label.head import fit_head, standardize
from fastmoco.label.query import Options, choose
from fastmoco.label.uncertainty import judge

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
    places, head, of_chosen = choose(
        "hybrid", rows, known, labels, CLASSES, Options(6, balanced=False, seed=2), []
    )
    assert head is not None and of_chosen is not None
    margins = judge(fit_head(known, labels, CLASSES, 2), rows).margin
    unsure = sorted(range(300), key=lambda i: margins[i])[:60]
    score = torch.tensor([-margins[i] for i in unsure], dtype=torch.float64)
    centers, members = kmeans(rows[unsure], 6, 2, score - score.min() + 1e-3)
    expected: list[int] = []
    for cluster in sorted(range(6), key=lambda c: -int((members == c).sum())):
        free = [i for i in unsure if i not in expected]
        expected.append(min(free, key=lambda i: float((rows[i] - centers[cluster]).norm())))
    assert places.tolist() == expected
    assert np.array_equal(of_chosen.margin, margins[places])


@pytest.mark.parametrize(
    ("strategy", "balanced", "warned"),
    [
        ("margin", True, False),
        ("margin", False, True),
        ("entropy", True, True),
        ("coreset", True, True),
        ("hybrid", True, False),
        ("herding", True, False),
    ],
)
def test_what_loses_with_few_labels_is_told(data, strategy, balanced, warned):
    rows, known, labels = data
    warnings: list[str] = []
    choose(strategy, rows, known, labels, CLASSES, Options(5, balanced=balanced), warnings)
    assert any("10 labels a class are few" in warning for warning in warnings) == warned


def test_typiclust_needs_two_clusters_a_class_and_makes_500_at_most(data, monkeypatch):
    rows, known, labels = data
    with pytest.raises(UsageError, match=r"35 clusters, too few for 18 classes.*herding"):
        choose("typiclust", rows, known, labels, 18, Options(5), [])
    monkeypatch.setattr("fastmoco.label.query.CLUSTERS", 34)
    with pytest.raises(UsageError, match=r"34 clusters, too few for 18 classes"):
        choose("typiclust", rows, known, labels, 18, Options(50), [])
    warnings: list[str] = []
    choose("typiclust", rows, known, labels, 17, Options(5), warnings)
    assert warnings == ["typiclust makes 34 clusters at most, not 35"]
