"""Samples that stand for the others: chosen by their features alone."""

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.core.rng import Ids

_BLOCK = 256  # candidates compared with all others at a time
_FRESH = 32  # candidates whose gain is looked at anew before one is taken


def coreset(rows: torch.Tensor, labelled: torch.Tensor, budget: int) -> Ids:
    """Take the sample farthest from all centers, again and again: greedy k-center.

    Sener and Savarese, "Active Learning for Convolutional Neural Networks: A Core-Set Approach",
    2018.

    Args:
        rows: (n, d) of the candidates.
        labelled: (m, d), the first centers; none: the candidate farthest from the mean is one.
        budget: how many to take, at most n.

    Returns:
        (budget,) places, in the order taken; of equal ones the lower.
    """
    squares = rows.square().sum(dim=1)

    def distances(center: torch.Tensor) -> torch.Tensor:
        return (squares - 2 * rows @ center + center @ center).clamp(min=0)

    taken: list[int] = []
    if len(labelled):
        nearest = distances(labelled[0])
        for center in labelled[1:]:
            nearest = torch.minimum(nearest, distances(center))
    else:
        taken.append(int(distances(rows.mean(dim=0)).argmax()))
        nearest = distances(rows[taken[0]])
        nearest[taken] = -1
    while len(taken) < budget:
        place = int(nearest.argmax())
        taken.append(place)
        nearest = torch.minimum(nearest, distances(rows[place]))
        nearest[taken] = -1  # not again, even where all others are equal to a center
    return np.array(taken[:budget], np.int64)


def herding(
    rows: torch.Tensor, labelled: torch.Tensor, budget: int, reference: torch.Tensor | None = None
) -> Ids:
    """Take the sample that covers most of what is not covered yet: generalized coverage.

    Bae et al., "Generalized Coverage for More Robust Low-Budget Active Learning", 2024: with the
    kernel k(x, y) = exp(-|x - y|^2), and m_i the largest k of sample i to a labelled or taken one,
    the candidate c with the largest sum over i of max(k(x_i, c) - m_i, 0). Gains only shrink, so
    that old ones are bounds and few are computed anew.

    Args:
        rows: (n, d) of the candidates, of unit length.
        labelled: (m, d) what is covered already.
        budget: how many to take, at most n.
        reference: (r, d) samples to be covered; None: the candidates.

    Returns:
        (budget,) places, in the order taken; of equal ones the lower.
    """
    points = rows if reference is None else reference
    covered = torch.zeros(len(points)).to(points)
    for start in range(0, len(labelled), _BLOCK):
        near = _kernel(labelled[start : start + _BLOCK], points).amax(dim=0)
        covered = torch.maximum(covered, near)

    def gains(places: npt.NDArray[np.int64]) -> npt.NDArray[np.float64]:
        blocks = (
            rows[torch.from_numpy(part)]
            for part in np.array_split(places, -(-len(places) // _BLOCK))
        )
        sums = [(_kernel(block, points) - covered).clamp(min=0).sum(dim=1) for block in blocks]
        found: npt.NDArray[np.float64] = torch.cat(sums).double().cpu().numpy()
        return found

    bounds = gains(np.arange(len(rows)))
    taken: list[int] = []
    while len(taken) < budget:
        fresh: set[int] = set()
        while True:
            order = np.lexsort((np.arange(len(bounds)), -bounds))[:_FRESH]
            best = int(order[0])
            if best in fresh:  # its gain is exact, and no bound is above it
                break
            stale = np.array([place for place in order.tolist() if place not in fresh], np.int64)
            bounds[stale] = gains(stale)
            bounds[taken] = -np.inf
            fresh.update(stale.tolist())
        taken.append(best)
        bounds[best] = -np.inf
        covered = torch.maximum(covered, _kernel(rows[best][None], points)[0])
    return np.array(taken, np.int64)


def _kernel(some: torch.Tensor, points: torch.Tensor) -> torch.Tensor:
    """Return (s, r) exp(-|x - y|^2) of unit vectors."""
    return (2 * (some @ points.T) - 2).exp()
