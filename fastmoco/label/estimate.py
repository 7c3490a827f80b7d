"""How long a choice takes on a CPU, from counts alone: people are told before hours begin."""

from fastmoco.label.clusters import ROUNDS
from fastmoco.label.diversity import CLUSTERS

LONG = 20
"""Minutes from which on it is told."""
# On the slow side, as of cores that are shared.
_BLOCKS = 1e10  # multiply-adds a second and thread of products in blocks, in fp32
_PASSES = 2e9  # numbers a second of one row after the other with all: memory bounds it
_FIT = 7e-9  # seconds a label, number and class of a head's fit on two threads, in fp64
_FITS = 26  # of a head: five folds with five C, and the last


def estimate_minutes(
    strategy: str,
    rows: int,
    width: int,
    budget: int,
    labels: int,
    classes: int,
    threads: int,
    heads: int = 0,
    members: int = 0,
) -> float:
    """Return about how many minutes a strategy takes, or more.

    Args:
        strategy: that is to choose.
        rows: of the candidates.
        width: of the features.
        budget: samples that are asked for.
        labels, classes: that a head is fitted on.
        threads: of the CPU.
        heads: that are fitted, C and all, and judge.
        members: of a committee, on bootstraps.
    """
    clustered = {"kmeans": (rows, budget), "hybrid": (min(rows, 10 * budget), budget)}
    clustered["typiclust"] = labels + rows, min(labels + budget, CLUSTERS)
    blocks, passes = 2.0 * (heads + members) * rows * classes, 0.0  # in fp64
    if strategy in clustered:
        samples, count = clustered[strategy]
        blocks += (ROUNDS + 2) * samples * count
        passes = count * max(16_384, 3 * count)
    if strategy == "typiclust":
        blocks += 4 * rows * rows / count  # neighbors, in clusters of unequal size
    elif strategy == "coreset":
        blocks, passes = blocks + labels * rows, budget * rows
    elif strategy == "herding":
        looked_at, reference = min(rows, max(65_536, 4 * budget)), min(rows, 32_768)
        blocks += (looked_at + labels + 200 * budget) * reference  # 200 gains anew for each
    seconds = width * (blocks / _BLOCKS / threads + passes / _PASSES)
    fits = _FITS * heads + members
    return (seconds + fits * _FIT * labels * width * classes * 2 / threads) / 60
