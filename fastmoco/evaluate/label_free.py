"""What features say without labels: how far they spread, and how close two views of an image come.

Each number belongs to one network, one set of images and one number of them: those of other widths
or other counts are never compared. None of them knows what is in the images, so none replaces a
probe; together they show whether training moves, and when it has collapsed.
"""

import math
from dataclasses import dataclass

import torch

from fastmoco.core.distributed import World

_EPSILON = 1e-7  # added to every share, as in the papers
_WITHIN = 1e-4  # added to the variance of views in LiDAR, as published
_FIRST, _LAST = 11, 100  # ranks that the decay is fitted to, as published
_NOISE = 1e-13  # a share of the variance that fp32 features have from rounding alone


@dataclass(frozen=True)
class Moments:
    """First and second moments of (n, d) features, in fp64.

    Attributes:
        count: n.
        mean: (d,).
        second: (d, d) mean of z z', not centered.
    """

    count: int
    mean: torch.Tensor
    second: torch.Tensor

    @classmethod
    def of(cls, features: torch.Tensor, world: World = World()) -> "Moments":
        """Return those of the rows of all ranks, of which each has its share."""
        rows = features.double()
        count = sum(world.gather_object(len(rows)))
        scale = world.size / count  # from a mean over the ranks to one over the rows
        mean, second = world.mean_(rows.sum(dim=0)), world.mean_(rows.T @ rows)
        return cls(count, scale * mean, scale * second)


def rankme(moments: Moments) -> float:
    """Return how many directions the features fill, 1 to min(n, d); they are not centered.

    exp(-sum p log p), p = s / sum s + 1e-7, of the singular values s of the (n, d) features
    (Garrido et al. 2023, RankMe, eq. 1 and 2).

    It can say that features collapsed into few directions, and compare runs of one network that
    differ in their settings. It cannot say that the directions mean anything: noise has full rank.
    """
    spectrum = _eigenvalues(moments.second).sqrt()[: moments.count]
    return _effective_rank(spectrum)


def alpha_req(moments: Moments) -> float | None:
    """Return the decay alpha of the covariance's spectrum, eigenvalue i being about i^-alpha.

    Least squares of log eigenvalue on log rank, ranks 11 to min(100, d / 2) (Agrawal et al. 2022,
    alpha-ReQ); None: too few images or directions for two ranks.

    Near 1 is where good features were found; well above, few directions hold everything; well
    below, most of it is noise. It is no score: neither higher nor lower is better as such.
    """
    covariance = moments.second - moments.mean[:, None] * moments.mean
    last = min(_LAST, len(covariance) // 2, moments.count - 1)
    fitted = _eigenvalues(covariance)[_FIRST - 1 : last]
    if len(fitted) < 2 or fitted[-1] <= _NOISE * moments.second.trace():
        return None
    x = torch.arange(_FIRST, last + 1, dtype=torch.float64, device=fitted.device).log()
    x, y = x - x.mean(), fitted.log()
    return -float((x @ y) / (x @ x))


def lidar(views: torch.Tensor) -> float:
    """Return how many directions tell images apart beyond what their views differ by, 1 to d.

    The effective rank of S_w^-1/2 S_b S_w^-1/2, S_b being the covariance of the images' means and
    S_w that of their views about them, plus 1e-4 I (Thilak et al. 2023, LiDAR, eq. 1 to 4).

    It can tell directions of content from directions in which views of one image scatter, which
    RankMe counts alike. It cannot say whether that content is of use.

    Args:
        views: (n, V, d) features of V views of each image.
    """
    rows = views.double()
    means = rows.mean(dim=1)
    apart, scattered = means - means.mean(dim=0), (rows - means[:, None]).flatten(0, 1)
    within = scattered.T @ scattered / len(scattered)
    within.diagonal().add_(_WITHIN)
    # L^-1 S_b L^-T, where L L' is S_w, has the same eigenvalues.
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(within), apart.T, upper=False)
    return _effective_rank(_eigenvalues(whitened @ whitened.T))


def alignment(first: torch.Tensor, second: torch.Tensor) -> float:
    """Return the mean squared distance of two views of an image, 0 to 4; lower is closer.

    E |f(x) - f(y)|^2 (Wang and Isola 2020, eq. 7, with exponent 2), f of unit length.

    It can say that views are taken for the same image. It cannot tell learning from collapse,
    where everything is the same: read it with `uniformity`.

    Args:
        first, second: (n, d) unit features of the views.
    """
    return float((first.double() - second.double()).square().sum(dim=1).mean())


def uniformity(features: torch.Tensor) -> float:
    """Return how evenly features fill the sphere, 0 (one point) down to about -4; lower is better.

    log E exp(-2 |f(x) - f(y)|^2) over all pairs (Wang and Isola 2020, eq. 9, with t 2).

    It can say that images are told apart. It cannot say by what: an untrained or overtrained
    network may tell all of them apart by noise.

    Args:
        features: (n, d) of unit length, two rows or more.
    """
    distances = torch.nn.functional.pdist(features.double())
    return float(distances.square().mul(-2).exp().mean().log())


def _eigenvalues(matrix: torch.Tensor) -> torch.Tensor:
    """Return the eigenvalues of a symmetric matrix, the largest first, rounding below 0 removed."""
    values: torch.Tensor = torch.linalg.eigvalsh(matrix)
    return values.flip(0).clamp_min(0)


def _effective_rank(spectrum: torch.Tensor) -> float:
    """Return exp of the entropy of the shares of a spectrum (Roy and Vetterli 2007)."""
    shares = spectrum / spectrum.sum().clamp_min(1e-300) + _EPSILON
    return math.exp(-float((shares * shares.log()).sum()))
