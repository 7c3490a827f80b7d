"""Signs of collapse in what a run measured of itself, in words."""

from collections.abc import Mapping
from typing import Any

_SETTLED = 50  # steps until BatchNorm's running statistics are no longer those it began with
_FEW_DIRECTIONS = 2.5  # RankMe; a healthy head fills ten and more
_ONE_POINT = -0.01  # uniformity; a healthy head is below -1
_SAME_VIEWS = 1e-3  # alignment; a positive similarity of 0.9995


def find_collapse(row: Mapping[str, Any]) -> list[str]:
    """Return what speaks for a collapse in an epoch's row of the metrics, and its likely cause.

    Nothing is said of the first steps: untrained deep networks have all features close together.
    """
    if row["step"] < _SETTLED or "rankme" not in row:
        return []
    backbone, head = row["rankme"], row["rankme_head"]
    alignment, uniformity = row.get("alignment", 4), row.get("uniformity", -4)
    if backbone < _FEW_DIRECTIONS:
        return [
            f"The backbone has collapsed: its features fill {backbone:.2f} directions (RankMe). "
            "Likely a learning rate that is too high: lower optimizer.lr, or warm up."
        ]
    if head < _FEW_DIRECTIONS or uniformity > _ONE_POINT:
        return [
            f"The head has collapsed: its features fill {head:.2f} directions (RankMe), at a "
            f"uniformity of {uniformity:.3f} (0: one point). Likely a learning rate that is too "
            "high: lower optimizer.lr; or, of moco, a key encoder that follows too fast: raise "
            "objective.momentum towards 0.999."
        ]
    if alignment < _SAME_VIEWS:
        return [
            "Two views of an image are the same to the network (positive similarity "
            f"{1 - alignment / 2:.4f}), though images differ. Likely views that differ too little: "
            "set views.0.crop=random and views.1.crop=random, or stronger jitter."
        ]
    return []
