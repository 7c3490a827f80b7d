"""The calibrated head against scikit-learn, and its parts against plain loops."""

import numpy as np
import pytest
import torch

from fastmoco.label.head import (
    STRENGTHS,
    assign_folds,
    calibration_error,
    cross_fit,
    fit_head,
    fit_linear,
    fit_temperature,
    pool_center,
    standardize,
)

CLASSES, WIDTH = 4, 6


@pytest.fixture
def data() -> tuple[torch.Tensor, torch.Tensor]:
    random = torch.Generator().manual_seed(0)
    labels = torch.arange(120) % CLASSES
    centers = torch.randn(CLASSES, WIDTH, generator=random, dtype=torch.float64)
    noise = torch.randn(120, WIDTH, generator=random, dtype=torch.float64)
    return centers[labels] + 1.5 * noise, labels


@pytest.mark.parametrize("strength", STRENGTHS)
def test_it_is_scikit_learns_logistic_regression(data, strength):
    from sklearn.linear_model import LogisticRegression

    rows, labels = data
    theirs = LogisticRegression(C=strength, tol=1e-10, max_iter=10_000).fit(rows, labels)
    weight, bias = fit_linear(rows, labels, CLASSES, strength)
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-3)
    # The biases are not penalized: free up to a constant.
    np.testing.assert_allclose(
        bias - bias.mean(), theirs.intercept_ - theirs.intercept_.mean(), atol=1e-3
    )
    probabilities = (rows @ weight.T + bias).softmax(dim=1)
    np.testing.assert_allclose(probabilities, theirs.predict_proba(rows), atol=1e-4)


def test_weights_are_those_of_scikit_learn_and_of_samples_given_twice(data):
    from sklearn.linear_model import LogisticRegression

    rows, labels = data
    weights = 1 + torch.arange(len(rows)).double() % 3
    relative = (weights / weights.mean()).numpy()
    theirs = LogisticRegression(C=1, tol=1e-10, max_iter=10_000).fit(rows, labels, relative)
    weight, _ = fit_linear(rows, labels, CLASSES, 1.0, weights=weights)
    np.testing.assert_allclose(weight, theirs.coef_, atol=1e-3)
    times = weights.long()
    more = rows.repeat_interleave(times, 0), labels.repeat_interleave(times, 0)
    # The penalty goes with 1 / n: of twice the samples, C is half.
    again, _ = fit_linear(*more, CLASSES, len(rows) / len(more[0]))
    np.testing.assert_allclose(weight, again, atol=1e-4)
    head, heavy = (fit_head(rows, labels, CLASSES, weights=w) for w in (None, weights))
    ones = fit_head(rows, labels, CLASSES, weights=torch.full((len(rows),), 2.0).double())
    np.testing.assert_allclose(head.weight, ones.weight, atol=1e-6)
    assert not torch.allclose(head.weight, heavy.weight, atol=1e-3)


def test_out_of_fold_predictions_are_of_heads_that_had_not_seen_them(data):
    """Fold by fold, with the C and the temperature that were chosen."""
    rows, labels = data
    head, held = cross_fit(rows, labels, CLASSES, seed=3)
    folds = assign_folds(labels.numpy(), 3)
    assert held.folds.tolist() == folds.tolist() and held.labels.tolist() == labels.tolist()
    for fold in range(5):
        out = torch.from_numpy(folds == fold)
        weight, bias = fit_linear(rows[~out], labels[~out], CLASSES, head.strength)
        logits = rows[out] @ weight.T + bias
        places = np.flatnonzero(out)
        assert held.predicted[places].tolist() == logits.argmax(dim=1).tolist()
        for name, t in (("before", 1), ("confidence", head.temperature)):
            p = (logits / t).softmax(dim=1).amax(dim=1)
            np.testing.assert_allclose(getattr(held, name)[places], p, atol=1e-4)


def test_the_temperature_is_the_best_of_a_fine_grid(data):
    rows, labels = data
    logits = 7 * rows[:, :CLASSES]
    grid = np.exp(np.linspace(-np.log(10), np.log(10), 2000))
    losses = [float(torch.nn.functional.cross_entropy(logits / t, labels)) for t in grid]
    assert fit_temperature(logits, labels) == pytest.approx(grid[np.argmin(losses)], rel=3e-3)


def test_the_calibration_error_bin_by_bin(data):
    rows, labels = data
    p = rows[:, :CLASSES].softmax(dim=1)
    confidence, predicted = p.max(dim=1)
    total = 0.0
    for low in range(15):
        inside = (confidence > low / 15) & (confidence <= (low + 1) / 15)
        if inside.any():
            right = (predicted == labels)[inside].double().mean()
            total += float(inside.sum()) * abs(float(right - confidence[inside].mean()))
    right = (predicted == labels).double()
    assert calibration_error(confidence, right) == pytest.approx(total / len(labels))


def test_folds_are_dealt_class_by_class():
    labels = np.array([0] * 7 + [1] * 3 + [2])
    folds = assign_folds(labels, seed=4)
    assert folds[-1] == -1, "the only label of a class is always learned from"
    assert folds.max() == 2, "as many as the smallest class has"
    for label in (0, 1):
        counts = np.bincount(folds[labels == label], minlength=3)
        assert counts.max() - counts.min() <= 1
    assert folds.tolist() != assign_folds(labels, seed=5).tolist()


def test_what_is_chosen_is_told_and_calibrated(data):
    rows, labels = data
    head = fit_head(rows, labels, CLASSES)
    assert head.strength in STRENGTHS and 0.1 <= head.temperature <= 10 and head.samples == 120
    assert 40 < head.accuracy < 100 and head.error <= head.error_before + 0.02
    again = fit_head(rows, labels, CLASSES)
    assert torch.equal(again.weight, head.weight) and again.temperature == head.temperature
    few = fit_head(rows[:8], labels[:8], CLASSES)
    assert (few.strength, few.temperature, few.accuracy) == (1.0, 1.0, None)


def test_rows_have_one_length_about_the_center(data):
    features = 3 + data[0]
    center = pool_center(features)
    rows = standardize(features, center)
    np.testing.assert_allclose(rows.norm(dim=1), 4)
    scaled = standardize(1000 * features.float(), pool_center(1000 * features))
    np.testing.assert_allclose(rows, scaled, atol=1e-4)
