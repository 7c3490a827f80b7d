"""Numbers without labels, each against its definition written naively in float64."""

import itertools
import math

import numpy as np
import pytest
import torch
from threads import on_ranks

from fastmoco.core.distributed import World
from fastmoco.evaluate.label_free import Moments, alignment, alpha_req, lidar, rankme, uniformity


def features(n: int, d: int, decay: float = 0.5) -> torch.Tensor:
    """Return rows with a mean of their own and variances that decay."""
    rows = torch.randn(n, d, generator=torch.Generator().manual_seed(n), dtype=torch.float64)
    return 0.7 + rows * torch.arange(1.0, d + 1).pow(-decay)


def naive_rankme(rows: np.ndarray) -> float:
    singular = np.linalg.svd(rows, compute_uv=False)
    entropy = 0.0
    for value in singular:
        share = value / singular.sum() + 1e-7
        entropy -= share * math.log(share)
    return math.exp(entropy)


def naive_alpha(rows: np.ndarray) -> float:
    eigenvalues = sorted(np.linalg.eigvalsh(np.cov(rows.T, bias=True)), reverse=True)
    last = min(100, rows.shape[1] // 2, len(rows) - 1)
    ranks = range(11, last + 1)
    slope, _ = np.polyfit(
        [math.log(i) for i in ranks], [math.log(eigenvalues[i - 1]) for i in ranks], 1
    )
    return -slope


@pytest.mark.parametrize(("n", "d"), [(300, 64), (40, 64), (900, 300), (65, 64)])
def test_rank_and_decay_are_those_of_the_papers(n: int, d: int) -> None:
    rows = features(n, d)
    moments = Moments.of(rows)
    assert rankme(moments) == pytest.approx(naive_rankme(rows.numpy()), rel=1e-6)
    assert alpha_req(moments) == pytest.approx(naive_alpha(rows.numpy()), rel=1e-9)


@pytest.mark.parametrize("size", [2, 7])
@pytest.mark.parametrize("n", [101, 16])
def test_ranks_do_not_matter(size: int, n: int) -> None:
    """The last rank has fewer rows than the others, or none."""
    rows = features(n, 40)

    def work(world: World) -> tuple[float, float | None]:
        moments = Moments.of(rows[world.share(n)], world)
        return rankme(moments), alpha_req(moments)

    whole = Moments.of(rows)
    for rank, decay in on_ranks(size, work):
        assert rank == pytest.approx(rankme(whole), rel=1e-9)
        assert decay == pytest.approx(alpha_req(whole), rel=1e-9)


def test_the_rank_of_k_equal_directions_is_k() -> None:
    directions = torch.eye(64, dtype=torch.float64)[:5]
    assert rankme(Moments.of(directions.repeat(20, 1))) == pytest.approx(5, abs=1e-3)


@pytest.mark.parametrize("alpha", [0.5, 1.0, 2.0])
def test_a_planted_decay_is_found(alpha: float) -> None:
    orthogonal, _ = torch.linalg.qr(features(500, 200))
    centered = orthogonal - orthogonal.mean(dim=0)
    whitened, _ = torch.linalg.qr(centered)
    rows = whitened * torch.arange(1, 201).double().pow(-alpha / 2)
    assert alpha_req(Moments.of(rows)) == pytest.approx(alpha, abs=1e-6)


@pytest.mark.parametrize(
    "rows",
    [
        features(300, 20),  # d / 2 is below rank 11
        features(12, 64),
        torch.ones(300, 64, dtype=torch.float64),
        torch.zeros(300, 64),
        (1 + 3e-7 * features(300, 64)).float(),  # all that differs is the rounding
    ],
    ids=["narrow", "few", "one point", "zero", "rounding"],
)
def test_where_no_decay_can_be_fitted_there_is_no_number(rows: torch.Tensor) -> None:
    assert alpha_req(Moments.of(rows)) is None
    assert math.isfinite(rankme(Moments.of(rows)))


def test_lidar_is_that_of_the_paper() -> None:
    """By an inverse square root, and sums over images and views."""
    n, v, d = 30, 4, 6
    images = features(n, d)[:, None] + 0.3 * features(n * v, d, decay=1).view(n, v, d)
    rows = images.numpy()
    between, within = np.zeros((d, d)), 1e-4 * np.eye(d)
    grand = rows.mean(axis=(0, 1))
    for image in rows:
        between += np.outer(image.mean(axis=0) - grand, image.mean(axis=0) - grand) / n
        for view in image:
            within += np.outer(view - image.mean(axis=0), view - image.mean(axis=0)) / (n * v)
    values, vectors = np.linalg.eigh(within)
    root = vectors @ np.diag(values**-0.5) @ vectors.T
    shares = np.linalg.eigvalsh(root @ between @ root)
    shares = shares / shares.sum() + 1e-7
    expected = math.exp(-(shares * np.log(shares)).sum())
    assert lidar(images) == pytest.approx(expected, rel=1e-9)
    assert 2 < expected < 5.9
    assert lidar(torch.zeros(n, v, d)) == pytest.approx(1, abs=1e-3)


def test_alignment_and_uniformity_are_those_of_the_paper() -> None:
    first, second = (torch.nn.functional.normalize(features(n, 16), dim=1)[:30] for n in (30, 31))
    apart = [
        sum((a - b) ** 2 for a, b in zip(x, y, strict=True))
        for x, y in zip(first.tolist(), second.tolist(), strict=True)
    ]
    assert alignment(first, second) == pytest.approx(sum(apart) / 30, abs=1e-12)
    kernels = [
        math.exp(-2 * sum((a - b) ** 2 for a, b in zip(x, y, strict=True)))
        for x, y in itertools.combinations(first.tolist(), 2)
    ]
    assert uniformity(first) == pytest.approx(math.log(sum(kernels) / len(kernels)), abs=1e-12)
    assert uniformity(first[:1].expand(30, -1)) == 0
