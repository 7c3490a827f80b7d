"""Signs of collapse in what a run measured of itself, in words."""

from collections.abc import Mapping
from typing import Any

_ONE_DIRECTION = 1.5  # RankMe; a healthy head fills ten and more
_ONE_POINT = -1e-3  # uniformity; 0 where all features are the same
_SAME_VIEWS = 1e-3  # alignment; a positive similarity of 0.9995


def find_collapse(row: Mapping[str, Any]) -> list[str]:
    """Return what speaks for a collapse in an epoch's row of the metrics, and its likely cause.

    Nothing is said of an untrained network: deep ones begin with all features close together.
    """
    if not row["step"]:
        return []
    found = []
    backbone, head = (row.get(name, float("inf")) for name in ("rankme", "rankme_head"))
    alike = row.get("uniformity", -float("inf")) > _ONE_POINT
    if backbone < _ONE_DIRECTION:
        found.append(
            f"The backbone has collapsed: its features fill {backbone:.2f} directions (RankMe). "
            "Likely a learning rate that is too high: lower optimizer.lr, or lengthen the warm-up."
        )
    elif head < _ONE_DIRECTION or alike:
        found.append(
            f"The head has collapsed, the backbone (RankMe {backbone:.1f}) has not: to the head "
            "all images are " + ("one point" if alike else "one direction") + ". Likely a head "
            "whose weights died: lower optimizer.lr or optimizer.weight_decay."
        )
    if row.get("alignment", float("inf")) < _SAME_VIEWS and not alike:
        found.append(
            "Two views of an image are the same to the network (positive similarity "
            f"{1 - row['alignment'] / 2:.4f}): the views differ too little to learn from. Likely "
            "no random crop: set views.0.crop and views.1.crop to random, or lower their scale."
        )
    return found
