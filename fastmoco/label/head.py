"""A calibrated linear classifier on frozen features: the one behind every question."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.core.rng import Ids, Stream, assign_folds, raw_words

STRENGTHS = (0.01, 0.1, 1.0, 10.0, 100.0)
"""Candidates for C, the inverse strength of the penalty."""
CHUNK = 16_384  # rows in fp64, or their probabilities, at a time: 100 MB of 800 numbers
_BOOTSTRAPS = 16  # the stream's numbers below are other choices
_FEW = 20  # below so many out-of-fold samples nothing is chosen
_BINS = 15  # of the calibration error
_GOLDEN = (math.sqrt(5) - 1) / 2
Scores = npt.NDArray[np.float64]


def standardize(features: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Return (n, d) fp64 rows of length 4: unit features about the center, so that one C fits all.

    Args:
        features: (n, d), as the encoder gives them.
        center: (d,) mean of the pool's unit features, see `pool_center`.
    """
    moved = torch.nn.functional.normalize(features.double(), dim=1) - center
    return 4 * torch.nn.functional.normalize(moved, dim=1)


def pool_center(features: torch.Tensor) -> torch.Tensor:
    """Return the (d,) fp64 mean of unit features."""
    total = torch.zeros(features.shape[1], dtype=torch.float64, device=features.device)
    for part in torch.split(features, CHUNK):
        total += torch.nn.functional.normalize(part.double(), dim=1).sum(dim=0)
    return total / len(features)


@dataclass(frozen=True)
class Head:
    """Logits W x + b over a temperature.

    Attributes:
        weight, bias: (c, d) and (c,) fp64.
        strength: C of the penalty |W|^2 / (2 C n).
        temperature: that the logits are divided by (Guo et al. 2017).
        samples: labels it was fitted on.
        accuracy: out of fold, percent; None: too few labels to tell.
        error_before, error: expected calibration error out of fold, without and with temperature.
    """

    weight: torch.Tensor
    bias: torch.Tensor
    strength: float = 1.0
    temperature: float = 1.0
    samples: int = 0
    accuracy: float | None = None
    error_before: float | None = None
    error: float | None = None

    def probabilities(self, rows: torch.Tensor) -> torch.Tensor:
        """Return (n, c) fp64 for (n, d) standardized rows, of any precision."""
        logits = rows.to(self.weight) @ self.weight.T + self.bias
        return (logits / self.temperature).softmax(dim=1)


@dataclass(frozen=True)
class OutOfFold:
    """What heads say of m labelled samples that they were not fitted on.

    Attributes:
        folds: (m,) the fold of each.
        labels: (m,) the given classes.
        predicted: (m,) classes.
        before, confidence: (m,) the predicted class's probability, without and with temperature.
    """

    folds: Ids
    labels: Ids
    predicted: Ids
    before: Scores
    confidence: Scores


def fit_head(
    rows: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    seed: int = 0,
    weights: torch.Tensor | None = None,
) -> Head:
    """Return the head alone, see `cross_fit`."""
    return cross_fit(rows, labels, classes, seed, weights)[0]


def cross_fit(
    rows: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    seed: int = 0,
    weights: torch.Tensor | None = None,
) -> tuple[Head, OutOfFold | None]:
    """Fit a head whose C and temperature are chosen out of fold; no test set plays a part.

    Args:
        rows: (n, d) fp64, standardized.
        labels: (n,) int64.
        classes: their number c.
        seed: of the folds.
        weights: (n,) fp64, what each counts in a fit; None: all the same.

    Returns:
        The head, fitted on all samples, and what was said of those that were held out, in order;
        None: too few were, and nothing is chosen.
    """
    folds = torch.from_numpy(assign_folds(labels.cpu().numpy(), seed)).to(rows.device)
    held = folds >= 0
    if int(held.sum()) < _FEW:
        weight, bias = fit_linear(rows, labels, classes, 1.0, weights=weights)
        return Head(weight, bias, samples=len(rows)), None
    logits = {c: torch.zeros(len(rows), classes).to(rows) for c in STRENGTHS}
    for fold in range(int(folds.max()) + 1):
        out, start = folds == fold, None
        kept = None if weights is None else weights[~out]
        for strength in STRENGTHS:  # ascending: each starts from the one before
            start = fit_linear(rows[~out], labels[~out], classes, strength, start, kept)
            logits[strength][out] = rows[out] @ start[0].T + start[1]
    found = {}
    for strength in STRENGTHS:
        temperature = fit_temperature(logits[strength][held], labels[held])
        loss = _loss(logits[strength][held], labels[held], temperature)
        found[strength] = (loss, strength, temperature)
    _, strength, temperature = min(found.values())
    chosen, right = logits[strength][held], labels[held]
    predicted = chosen.argmax(dim=1)
    before, after = (z.softmax(dim=1).amax(dim=1) for z in (chosen, chosen / temperature))
    weight, bias = fit_linear(rows, labels, classes, strength, weights=weights)
    columns = (folds[held], right, predicted, before, after)
    out_of_fold = OutOfFold(*(column.cpu().numpy() for column in columns))
    hits = (predicted == right).double()
    errors = (calibration_error(confidence, hits) for confidence in (before, after))
    accuracy = 100 * float(hits.mean())
    return Head(weight, bias, strength, temperature, len(rows), accuracy, *errors), out_of_fold


def fit_bootstrap(
    head: Head,
    rows: torch.Tensor,
    labels: torch.Tensor,
    seed: int,
    member: int,
    weights: torch.Tensor | None = None,
) -> Head:
    """Fit a head anew, with its C and temperature, on as many labels drawn with replacement."""
    words = raw_words(seed, Stream.QUERY, _BOOTSTRAPS + member, len(labels))
    drawn = torch.from_numpy((words % np.uint64(len(labels))).astype(np.int64)).to(rows.device)
    counted = None if weights is None else weights[drawn]
    rows, labels, classes = rows[drawn], labels[drawn], len(head.bias)
    weight, bias = fit_linear(rows, labels, classes, head.strength, weights=counted)
    return replace(head, weight=weight, bias=bias)


def fit_linear(
    rows: torch.Tensor,
    labels: torch.Tensor,
    classes: int,
    strength: float,
    start: tuple[torch.Tensor, torch.Tensor] | None = None,
    weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Minimize mean cross-entropy + |W|^2 / (2 C n), as scikit-learn's LogisticRegression(C) does.

    Args:
        rows, labels: (n, d) and (n,), what is fitted.
        classes: their number c.
        strength: C.
        start: weight and bias to begin with; None: zeros.
        weights: (n,) what each counts, divided here by their mean; None: all the same.

    Returns:
        (c, d) weight and (c,) bias.
    """
    weight = torch.zeros(classes, rows.shape[1]).to(rows) if start is None else start[0].clone()
    bias = torch.zeros(classes).to(rows) if start is None else start[1].clone()
    for tensor in (weight, bias):
        tensor.requires_grad_()
    solver = torch.optim.LBFGS(
        [weight, bias],
        max_iter=100,
        tolerance_grad=1e-7,
        tolerance_change=1e-12,
        line_search_fn="strong_wolfe",
    )

    def loss() -> torch.Tensor:
        solver.zero_grad()
        losses = torch.nn.functional.cross_entropy(rows @ weight.T + bias, labels, reduction="none")
        value = (losses if weights is None else losses * weights / weights.mean()).mean()
        value = value + weight.square().sum() / (2 * strength * len(rows))
        value.backward()  # type: ignore[no-untyped-call]
        return value

    solver.step(loss)  # type: ignore[no-untyped-call]
    return weight.detach(), bias.detach()


def fit_temperature(logits: torch.Tensor, labels: torch.Tensor) -> float:
    """Return the temperature in 0.1..10 of the least cross-entropy, by golden section on log T."""
    return math.exp(
        _golden_section(lambda x: _loss(logits, labels, math.exp(x)), -math.log(10), math.log(10))
    )


def _golden_section(function: Callable[[float], float], low: float, high: float) -> float:
    left, right = high - _GOLDEN * (high - low), low + _GOLDEN * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > 1e-4:
        if at_left < at_right:
            high, right, at_right = right, left, at_left
            left = high - _GOLDEN * (high - low)
            at_left = function(left)
        else:
            low, left, at_left = left, right, at_right
            right = low + _GOLDEN * (high - low)
            at_right = function(right)
    return (low + high) / 2


def _loss(logits: torch.Tensor, labels: torch.Tensor, temperature: float) -> float:
    return float(torch.nn.functional.cross_entropy(logits / temperature, labels))


def calibration_error(confidence: torch.Tensor, right: torch.Tensor) -> float:
    """Return the expected calibration error: |accuracy - confidence|, averaged over equal bins."""
    counts, sums, hits = sum_by_confidence(confidence, right)
    return float((hits - sums).abs().sum() / counts.sum())


def sum_by_confidence(
    confidence: torch.Tensor, right: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return, for 15 equal bins of the confidence, samples, sum of confidence, and right ones.

    Args:
        confidence: (n,) of 0..1; a bin holds its upper bound.
        right: (n,) 1 where the prediction is right, else 0, of the same dtype.
    """
    bins = (confidence * _BINS).ceil().clamp(min=1).long() - 1
    columns = (torch.ones_like(confidence), confidence, right)
    counts, sums, hits = (torch.zeros(_BINS).to(c).index_add(0, bins, c) for c in columns)
    return counts, sums, hits
