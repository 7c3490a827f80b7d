"""kNN: scikit-learn's classifier with the same weights is the reference."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from sklearn.neighbors import KNeighborsClassifier

from fastmoco.evaluate import knn
from fastmoco.evaluate.knn import Neighbours

CLASSES, DIM = 5, 16


@pytest.fixture(scope="module")
def features() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """A bank of 300 and 120 queries in overlapping clusters; lengths vary, as in a backbone."""
    random = np.random.default_rng(0)
    centers = random.normal(size=(CLASSES, DIM))

    def sample(n: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = random.integers(0, CLASSES, n)
        points = centers[labels] + 1.5 * random.normal(size=(n, DIM))
        points *= random.uniform(0.1, 10, (n, 1))
        return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)

    return *sample(300), *sample(120)


def theirs(bank: torch.Tensor, labels: torch.Tensor, k: int, t: float) -> KNeighborsClassifier:
    # Their metric is 1 - similarity; the constant factor exp(1 / t) cancels in the vote.
    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / t))
    return model.fit(bank.double().numpy(), labels.numpy())


@pytest.mark.parametrize("k", [1, 7, 50])
@pytest.mark.parametrize("t", [0.02, 0.1, 1.0])
def test_votes_are_scikit_learns(features: tuple[torch.Tensor, ...], k: int, t: float) -> None:
    bank, labels, queries, wanted = features
    model = theirs(bank, labels, k, t)
    ours = Neighbours(bank, labels, CLASSES, k, t)
    votes = torch.cat(list(ours.scores(queries)))
    shares = (votes / votes.sum(dim=1, keepdim=True)).numpy()
    expected = model.predict_proba(queries.double().numpy())
    np.testing.assert_allclose(shares, expected, atol=2e-4)
    accuracy = 100 * model.score(queries.double().numpy(), wanted.numpy())
    assert ours.accuracy(queries, wanted) == pytest.approx(accuracy, abs=1e-4)
    assert 40 < accuracy < 95  # neither trivial nor chance


def test_a_k_beyond_the_bank_lets_all_of_it_vote(features: tuple[torch.Tensor, ...]) -> None:
    bank, labels, queries, _ = features
    model = theirs(bank[:30], labels[:30], 30, 0.5)
    ours = torch.cat(list(Neighbours(bank[:30], labels[:30], CLASSES, 200, 0.5).scores(queries)))
    assert np.array_equal(ours.argmax(1).numpy(), model.predict(queries.double().numpy()))


def test_chunks_do_not_matter(
    features: tuple[torch.Tensor, ...],
    monkeypatch: pytest.MonkeyPatch,
    torch_threads: Callable[[int], None],
) -> None:
    """Nor do the threads that share them."""
    bank, labels, queries, _ = features
    neighbours = Neighbours(bank, labels, CLASSES, 20)
    torch_threads(1)
    whole = list(neighbours.scores(queries))
    monkeypatch.setattr(knn, "_CHUNK", 7)
    for threads, count in ((1, 18), (3, 60)):
        torch_threads(threads)
        parts = list(neighbours.scores(queries))
        assert len(whole) == 1 and len(parts) == count
        torch.testing.assert_close(torch.cat(parts), whole[0], rtol=1e-5, atol=1e-5)


def test_the_length_of_a_feature_does_not_matter(features: tuple[torch.Tensor, ...]) -> None:
    bank, labels, queries, _ = features
    plain = torch.cat(list(Neighbours(bank, labels, CLASSES, 20).scores(queries)))
    scaled = torch.cat(list(Neighbours(5 * bank, labels, CLASSES, 20).scores(0.2 * queries)))
    torch.testing.assert_close(scaled, plain, rtol=1e-4, atol=1e-4)


def test_a_class_without_a_vote_is_not_among_the_first_five() -> None:
    bank = torch.eye(6)
    found = Neighbours(bank, torch.arange(6), classes=6, k=2).predict(bank, torch.arange(6).roll(3))
    assert found.top(1) == 0 and found.top(5) < 40  # two of six voted for; five of six by order
    assert Neighbours(bank, torch.arange(6), 6, k=2).predict(bank, torch.arange(6)).top(5) == 100
