"""Samples that stand for the others: chosen by their features alone."""

from collections import deque
from collections.abc import Iterator

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.core.rng import Ids
from fastmoco.label.clusters import (
    find_nearest,
    get_distances,
    get_squares,
    kmeans,
    take_nearest,
)

CLUSTERS = 500
"""At most, of typiclust."""
_BLOCK = 256  # candidates compared with all others at a time
_FRESH = 32  # candidates whose gain is looked at anew before one is taken
_SMALL, _NEAR = 5, 20  # typiclust: clusters that come last; neighbors that make a sample typical
_SPARE = 32  # further neighbors, for those that are taken meanwhile


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
    squares = get_squares(rows)
    taken: list[int] = []
    if len(labelled):
        nearest, _ = find_nearest(rows, labelled)
    else:
        taken.append(int(get_distances(rows, squares, rows.mean(dim=0)).argmax()))
        nearest = get_distances(rows, squares, rows[taken[0]])
        nearest[taken] = -1
    while len(taken) < budget:
        place = int(nearest.argmax())
        taken.append(place)
        nearest = torch.minimum(nearest, get_distances(rows, squares, rows[place]))
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


def spread(rows: torch.Tensor, budget: int, seed: int, weights: torch.Tensor | None = None) -> Ids:
    """Take the sample nearest to the center of each of so many clusters, the largest first.

    With weights: Zhdanov, "Diverse Mini-Batch Active Learning", 2019.

    Args:
        rows: (n, d) of the candidates.
        budget: how many to take, at most n.
        seed: of the first centers.
        weights: (n,) above 0, of each sample in its cluster.

    Returns:
        (budget,) places, in the order of the clusters' sizes.
    """
    centers, members = kmeans(rows, budget, seed, weights)
    sizes = np.bincount(members.cpu().numpy(), minlength=budget)
    return take_nearest(rows, centers, np.argsort(-sizes, kind="stable"))


def typiclust(rows: torch.Tensor, labelled: torch.Tensor, budget: int, seed: int) -> Ids:
    """Take the most typical sample of clusters with few labels, cluster by cluster in turn.

    Hacohen et al., "Active Learning on a Budget: Opposite Strategies Suit High and Low Budgets",
    2022, with plain distances.

    Args:
        rows: (n, d) of the candidates.
        labelled: (m, d), clustered with them.
        budget: how many to take, at most n.
        seed: of the clusters.

    Returns:
        (budget,) places, in the order taken.
    """
    count = min(len(labelled) + budget, CLUSTERS)
    _, found = kmeans(torch.cat([labelled, rows]), count, seed)
    members, known = found.cpu().numpy(), len(labelled)
    return take_typical(rows, members[known:], members[:known], budget)


def take_typical(rows: torch.Tensor, members: Ids, labelled: Ids, budget: int) -> Ids:
    """Take in turn the most typical sample left of each cluster: the rule of `typiclust`.

    Clusters with fewer labels come first, of these the larger ones; those of five samples and
    fewer, which the paper drops, when the others are used up.

    Args:
        rows: (n, d) of the candidates.
        members: (n,) their clusters.
        labelled: (m,) clusters of what is labelled.
        budget: how many to take, at most n.
    """
    count = int(max(members.max(), labelled.max(initial=0))) + 1
    labels = np.bincount(labelled, minlength=count)
    sizes = np.bincount(members, minlength=count) + labels
    order = np.lexsort((-sizes, labels))
    taken: list[int] = []
    for group in (order[sizes[order] > _SMALL], order[sizes[order] <= _SMALL]):
        turns = deque(_by_typicality(rows, np.flatnonzero(members == cluster)) for cluster in group)
        while turns and len(taken) < budget:
            turn = turns.popleft()
            if (place := next(turn, None)) is not None:
                taken.append(place)
                turns.append(turn)
    return np.array(taken, np.int64)


def _by_typicality(rows: torch.Tensor, places: Ids) -> Iterator[int]:
    """Yield places of one cluster, each the one whose nearest are nearest among those left."""
    while len(places):
        gaps, near = _find_neighbors(rows[torch.from_numpy(places).to(rows.device)])
        free = np.ones(len(places), dtype=bool)
        for left in range(len(places), max(0, len(places) - _SPARE), -1):
            count = min(_NEAR, left // 2)
            first = free[near]
            first &= np.cumsum(first, axis=1) <= count
            means = np.where(first, gaps, 0).sum(axis=1) / max(1, count)
            best = int(np.where(free, means, np.inf).argmin())
            free[best] = False
            yield int(places[best])
        places = places[free]


def _find_neighbors(rows: torch.Tensor) -> tuple[npt.NDArray[np.float64], Ids]:
    """Return distances and places of the nearest other rows, ascending, as far as they may count.

    Of so many, `_NEAR` are left when `_SPARE` rows have been taken.
    """
    count, squares, parts = min(len(rows) - 1, _NEAR + _SPARE), get_squares(rows), []
    for start in range(0, len(rows), _BLOCK):
        block = rows[start : start + _BLOCK]
        products = squares[start : start + _BLOCK, None] + squares - 2 * block @ rows.T
        own = torch.arange(len(block), device=rows.device)
        products[own, start + own] = torch.inf
        parts.append(products.clamp(min=0).sqrt().topk(count, dim=1, largest=False))
    gaps, near = (torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True))
    return gaps.astype(np.float64), near
