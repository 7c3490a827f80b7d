"""Choosing a learning rate by labels held out of training: the test set chooses nothing."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

from fastmoco.core.rng import Ids, assign_folds, first_of_each
from fastmoco.dataset.labels import Labelled, Weights
from fastmoco.errors import DivergedError, UsageError

Choose = Literal["holdout", "test"]
_ENOUGH = 10  # labels of every class, so that a tenth of each can be held out


@dataclass(frozen=True)
class HeldOut:
    """Which of n labelled samples are held out, and when.

    Attributes:
        how: "holdout", a tenth of each class once; or "folds", all in turn, where a class has fewer
            than 10 labels.
        folds: (n,) int64, the training that leaves a sample out; -1: none does, as where it is the
            only one of its class.
    """

    how: str
    folds: Ids

    @classmethod
    def of(cls, train: Labelled, seed: int) -> "HeldOut":
        """Hold out samples of every class.

        Raises:
            UsageError: each class has one label alone.
        """
        if np.unique(train.labels, return_counts=True)[1].min() >= _ENOUGH:
            folds = np.full(len(train.ids), -1, dtype=np.int64)
            folds[first_of_each(train.labels, seed, lambda size: size // 10)] = 0
            return cls("holdout", folds)
        folds = assign_folds(train.labels, seed)
        if folds.max() < 0:
            raise UsageError(
                "No class has two labels, so none can be held out to choose a rate by: name one "
                "by --lr, or pass --choose test."
            )
        return cls("folds", folds)

    @property
    def images(self) -> int:
        """Samples that are held out at some time."""
        return int((self.folds >= 0).sum())

    @property
    def count(self) -> int:
        """Trainings that leave some out."""
        return int(self.folds.max()) + 1

    def weights(self, train: Labelled) -> Weights:
        """Return (n, 1 + count) fp32: what each sample counts in training on all, then in each.

        The mean of a column is 1.
        """
        column = train.weights.astype(np.float64)[:, None]
        kept = self.folds[:, None] != np.arange(self.count)
        table = np.concatenate([column, column * kept], axis=1)
        relative: Weights = (table / table.mean(axis=0)).astype(np.float32)
        return relative


def choose_rate(
    rates: Sequence[float], top1: Sequence[float], by: str, images: int
) -> dict[str, Any]:
    """Return the rate of the highest top-1, ties to the lower, with what it was chosen by.

    Args:
        rates: learning rates.
        top1: theirs, percent; NaN: it diverged.
        by: which images: "holdout", "folds" or "test".
        images: their number.

    Raises:
        DivergedError: all did.
    """
    pairs = [
        (rate, top if math.isfinite(top) else None) for rate, top in zip(rates, top1, strict=True)
    ]
    sound = [(-top, rate) for rate, top in pairs if top is not None]
    if not sound:
        named = ", ".join(f"{rate:g}" for rate in rates)
        raise DivergedError(f"Training diverged at every learning rate ({named}): lower --lr.")
    candidates = [{"lr": rate, "top1": top} for rate, top in pairs]
    return {"lr": min(sound)[1], "by": by, "images": images, "candidates": candidates}
