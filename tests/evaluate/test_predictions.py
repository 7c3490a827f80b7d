"""Accuracies and confusion: scikit-learn's on the same scores."""

import numpy as np
import pytest
import torch
from sklearn.metrics import confusion_matrix, recall_score, top_k_accuracy_score
from threads import on_ranks

from fastmoco.core.distributed import World
from fastmoco.evaluate.predictions import Predictions

CLASSES = 8


@pytest.fixture
def scored() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    labels = torch.randint(CLASSES - 1, (300,), generator=generator)  # none of the last class
    noise = 1.5 * torch.randn(300, CLASSES, generator=generator)
    return torch.nn.functional.one_hot(labels, CLASSES) + noise, labels


def test_numbers_are_scikit_learns(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = scored
    found = Predictions.of_logits(scores, labels)
    guessed, everything = scores.argmax(dim=1), range(CLASSES)
    assert np.array_equal(found.confusion(), confusion_matrix(labels, guessed, labels=everything))
    for k in (1, 3, 5):
        theirs = top_k_accuracy_score(labels, scores, k=k, labels=everything)
        assert found.top(k) == pytest.approx(100 * theirs)
    recall = recall_score(labels, guessed, labels=everything, average=None, zero_division=np.nan)
    assert found.per_class()[:-1] == pytest.approx((100 * recall[:-1]).tolist())
    assert found.per_class()[-1] is None  # not 0: it was never asked
    shares = scores.double().softmax(dim=1).numpy()
    np.testing.assert_allclose(found.confidence, shares.max(axis=1), rtol=1e-5)
    assert found.top(1) < found.top(5) < 100


def test_of_equal_scores_the_lower_class_comes_first() -> None:
    found = Predictions.of(torch.zeros(4, 4), torch.arange(4), torch.ones(4))
    assert found.predicted.tolist() == [0, 0, 0, 0] and found.place.tolist() == [0, 1, 2, 3]


def test_nan_is_not_right() -> None:
    found = Predictions.of_logits(torch.full((2, 3), torch.nan), torch.tensor([1, 2]))
    assert found.top(1) == 0


def test_parts_make_the_whole(scored: tuple[torch.Tensor, torch.Tensor]) -> None:
    scores, labels = scored
    parts = zip(torch.split(scores, 70), torch.split(labels, 70), strict=True)
    joined = Predictions.cat([Predictions.of_logits(*part) for part in parts])
    assert joined.summary() == Predictions.of_logits(scores, labels).summary()


@pytest.mark.parametrize("size", [1, 2, 7])
def test_ranks_gather_their_shares(scored: tuple[torch.Tensor, torch.Tensor], size: int) -> None:
    """300 divide unevenly by 7."""
    scores, labels = scored

    def work(ranks: World) -> Predictions:
        own = ranks.share(300)
        return Predictions.of_logits(scores[own], labels[own]).gathered(ranks)

    expected = Predictions.of_logits(scores, labels)
    for whole in on_ranks(size, work):
        assert torch.equal(whole.labels, labels)
        assert torch.equal(whole.predicted, expected.predicted)
        assert whole.summary() == expected.summary()
