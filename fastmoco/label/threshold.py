"""How sure a classifier must be: thresholds on its confidence, and how often it is right there."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.rng import Ids
from fastmoco.errors import DataError
from fastmoco.label.head import Scores

LEAST = 30  # samples that a precision is told of
_DRAWN = 100  # points of a curve
_95_PERCENT = 1.959964  # of a normal distribution lie within so many deviations
Mask = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class Judged:
    """Labelled samples with a prediction that their labels had no part in.

    Attributes:
        confidence: (m,) of the prediction.
        right: (m,) whether it is the label.
        folds: (m,) the fold that each was held out with.
        total: how many were judged, those that several classifiers differ on included.
    """

    confidence: Scores
    right: Mask
    folds: Ids
    total: int


def agree(predicted: Sequence[Ids], confidence: Sequence[Scores]) -> tuple[Mask, Scores]:
    """Return where all classifiers say the same class, (n,), and the least of their confidences."""
    same: Mask = np.all([other == predicted[0] for other in predicted], axis=0)
    least: Scores = np.min(confidence, axis=0)
    return same, least


def choose_threshold(confidence: Scores, right: Mask, precision: float) -> float | None:
    """Return the smallest confidence above which a share of predictions is right.

    Args:
        confidence: (m,) of predictions.
        right: (m,) whether each is right.
        precision: the share, of those at the threshold and above, which must be 30 or more.

    Returns:
        One of the confidences; None: at none is the share reached.
    """
    thresholds, counts, hits = _above(confidence, right)
    reached = np.flatnonzero((counts >= LEAST) & (hits / counts >= precision))
    return float(thresholds[reached[-1]]) if len(reached) else None


def _above(confidence: Scores, right: Mask) -> tuple[Scores, Ids, Ids]:
    """Return each different confidence, falling, and how many are at or above it and right."""
    order = np.argsort(-confidence, kind="stable")
    falling = confidence[order]
    different = np.append(falling[1:] != falling[:-1], True)[: len(falling)]
    last = np.flatnonzero(different)  # of equal ones
    return falling[last], last + 1, right[order].cumsum()[last]


def require_threshold(judged: Judged, precision: float) -> float:
    """Return the threshold of a precision, see `choose_threshold`.

    Raises:
        DataError: it is not reached; says which one is.
    """
    threshold = choose_threshold(judged.confidence, judged.right, precision)
    if threshold is not None:
        return threshold
    thresholds, counts, hits = _above(judged.confidence, judged.right)
    enough = counts >= LEAST
    if not enough.any():
        raise DataError(
            f"{len(judged.right)} labels were predicted out of fold, {LEAST} are needed to tell a "
            "precision: label more, or choose the confidence by --threshold."
        )
    best = np.flatnonzero(enough)[np.argmax(hits[enough] / counts[enough])]
    raise DataError(
        f"A precision of {precision:g} is not reached: {hits[best] / counts[best]:.3f} above "
        f"{thresholds[best]:.3f} ({counts[best]} labels). Pass a lower --precision, or label more."
    )


def estimate_precision(judged: Judged, precision: float | None, threshold: float) -> dict[str, Any]:
    """Return how often predictions above the threshold are right.

    A threshold that was chosen by a precision flatters the samples that it was chosen on: of each
    fold only those above the threshold of the other folds are counted.

    Args:
        judged: the samples.
        precision: that the threshold was chosen by; None: by hand.
        threshold: of the confidence.

    Returns:
        `labels` counted, `right` ones, `precision` and the bounds `low` and `high` of its 95 %
        interval; without counted labels these three are None.
    """
    kept = np.zeros(len(judged.right), dtype=bool)
    for fold in np.unique(judged.folds):
        out, own = judged.folds == fold, threshold
        if precision is not None:
            chosen = choose_threshold(judged.confidence[~out], judged.right[~out], precision)
            own = math.inf if chosen is None else chosen
        kept[out] = judged.confidence[out] >= own
    labels, right = int(kept.sum()), int(judged.right[kept].sum())
    low, high = wilson(right, labels) if labels else (None, None)
    share = right / labels if labels else None
    return {"labels": labels, "right": right, "precision": share, "low": low, "high": high}


def wilson(right: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of a share (Wilson 1927)."""
    z, share = _95_PERCENT, right / count
    middle = (share + z * z / (2 * count)) / (1 + z * z / count)
    half = z * math.sqrt(share * (1 - share) / count + (z / count) ** 2 / 4) / (1 + z * z / count)
    return max(0.0, middle - half), min(1.0, middle + half)


def trace_precision(judged: Judged) -> list[dict[str, float]]:
    """Return at most 100 points of precision against coverage, the surest first.

    Coverage is the share of all judged samples that are at the threshold or above.
    """
    thresholds, counts, hits = _above(judged.confidence, judged.right)
    count = min(len(counts), _DRAWN)
    some = np.linspace(0, len(counts) - 1, count).round().astype(np.int64)
    return [
        {
            "threshold": float(thresholds[place]),
            "coverage": float(counts[place] / judged.total),
            "precision": float(hits[place] / counts[place]),
        }
        for place in some.tolist()
    ]


def take_surest(confidence: Scores, predicted: Ids, per_class: int) -> Ids:
    """Return the ascending places of the surest of each predicted class; of equal ones the first.

    Args:
        confidence: (n,).
        predicted: (n,) classes.
        per_class: at most so many of each.
    """
    order = np.lexsort((-confidence, predicted))  # stable: of equal ones, the first
    classes = predicted[order]
    rank = np.arange(len(order)) - np.searchsorted(classes, classes)
    return np.sort(order[rank < per_class])
