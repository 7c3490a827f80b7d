"""k-means by blocks of products, so that memory stays bounded whatever the pool."""

import numpy as np
import torch

from fastmoco.core.rng import Ids, Permutation, Stream, raw_words

ROUNDS = 20  # of Lloyd's algorithm; later ones change little
_BLOCK = 1 << 25  # products held at a time: 134 MB in fp32
_SAMPLED = 16_384  # rows that first centers are drawn from, or 3 a cluster


def kmeans(
    rows: torch.Tensor, count: int, seed: int, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cluster rows: k-means++ on a sample of them, then Lloyd's algorithm on all.

    Args:
        rows: (n, d).
        count: of clusters.
        seed: of the first centers.
        weights: (n,) above 0; None: all equal.

    Returns:
        (count, d) centers and the (n,) int64 cluster of each row; a cluster may be empty.
    """
    return lloyd(rows, draw_centers(rows, count, seed, weights), weights)


def draw_centers(
    rows: torch.Tensor, count: int, seed: int, weights: torch.Tensor | None = None
) -> torch.Tensor:
    """Draw (count, d) rows, each in proportion to weight x squared distance to those before.

    Arthur and Vassilvitskii, "k-means++: The Advantages of Careful Seeding", 2007.
    """
    size = min(len(rows), max(_SAMPLED, 3 * count))
    places = np.sort(Permutation(len(rows), seed, Stream.QUERY, 3)(np.arange(size)))
    some = torch.from_numpy(places).to(rows.device)
    sample, squares = rows[some], get_squares(rows[some])
    share = torch.ones_like(squares) if weights is None else weights[some].to(squares)
    nearest = torch.ones_like(squares)  # the first is drawn by weight alone
    drawn: list[int] = []
    for word in raw_words(seed, Stream.QUERY, 4, count) >> np.uint64(11):
        # Summed on the host: a GPU's sums depend on the order of its threads.
        mass = np.cumsum((nearest * share).double().cpu().numpy())
        place = np.searchsorted(mass, float(word) * 2.0**-53 * mass[-1], side="right")
        drawn.append(min(int(place), size - 1))  # the last where all rows are centers already
        gaps = get_distances(sample, squares, sample[drawn[-1]])
        nearest = gaps if len(drawn) == 1 else torch.minimum(nearest, gaps)
        nearest[drawn[-1]] = 0  # rounding leaves a little
    return sample[drawn]


def lloyd(
    rows: torch.Tensor, centers: torch.Tensor, weights: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Move centers to the means of the rows nearest to them, until none changes its cluster."""
    _, members = find_nearest(rows, centers)
    for _ in range(ROUNDS):
        centers = _get_means(rows, members, centers, weights)
        before = members
        _, members = find_nearest(rows, centers)
        if torch.equal(before, members):
            break
    return centers, members


def _get_means(
    rows: torch.Tensor, members: torch.Tensor, centers: torch.Tensor, weights: torch.Tensor | None
) -> torch.Tensor:
    """Return the weighted mean of each cluster; an empty one keeps its center."""
    sums = torch.zeros(centers.shape, dtype=torch.float64)
    share = torch.ones(len(rows), dtype=torch.float64) if weights is None else weights.double()
    where, share = members.cpu(), share.cpu()
    totals = torch.zeros(len(centers), dtype=torch.float64).index_add_(0, where, share)
    step = max(1, _BLOCK // rows.shape[1])
    for start in range(0, len(rows), step):
        here = slice(start, start + step)
        # On the host, where the order of the additions is fixed.
        sums.index_add_(0, where[here], rows[here].cpu().double() * share[here, None])
    means = (sums / totals[:, None]).to(centers)
    return torch.where((totals > 0).to(centers.device)[:, None], means, centers)


def find_nearest(rows: torch.Tensor, centers: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the (n,) squared distance of each row to the nearest center, and its int64 place."""
    squares = get_squares(centers)
    parts = torch.split(rows, max(1, _BLOCK // len(centers)))
    # Without the row's own square, which is the same for all centers.
    found = [torch.addmm(squares, part, centers.T, alpha=-2).min(dim=1) for part in parts]
    gaps, places = (torch.cat(column) for column in zip(*found, strict=True))
    return (gaps + get_squares(rows)).clamp(min=0), places


def take_nearest(rows: torch.Tensor, centers: torch.Tensor, order: Ids) -> Ids:
    """Return of each center, in an order, the nearest row that none before it took."""
    nearest, squares = find_nearest(centers, rows)[1].cpu().numpy(), get_squares(rows)
    taken: list[int] = []
    used = torch.zeros(len(rows), dtype=torch.bool, device=rows.device)
    for number in order.tolist():
        place = int(nearest[number])
        if used[place]:
            gaps = get_distances(rows, squares, centers[number])
            place = int(gaps.masked_fill(used, torch.inf).argmin())
        used[place] = True
        taken.append(place)
    return np.array(taken, np.int64)


def get_squares(rows: torch.Tensor) -> torch.Tensor:
    """Return the (n,) squared lengths, without a copy of the rows' size."""
    lengths: torch.Tensor = torch.linalg.vector_norm(rows, dim=1)
    return lengths.square()


def get_distances(rows: torch.Tensor, squares: torch.Tensor, center: torch.Tensor) -> torch.Tensor:
    """Return the (n,) squared distances of rows, whose squared lengths are known, to a center."""
    return (squares - 2 * (rows @ center) + center @ center).clamp(min=0)
