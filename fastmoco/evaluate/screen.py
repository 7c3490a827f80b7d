"""Exact nearest neighbours at the price of bfloat16: a coarse look rules out, fp32 decides.

The product of all queries with the whole bank is the cost of kNN; processors with bfloat16
instructions do it in half the time of fp32. Its error is bounded, so whatever the coarse look puts
more than twice that bound below the k-th best cannot be among the k nearest. The few that are left
get their fp32 similarity, and the k best of them are the answer, as without the screen.
"""

import threading
import warnings

import numpy as np
import torch

Nearest = tuple[torch.Tensor, torch.Tensor]
"""(n, k) fp32 similarities and (n, k) int64 rows of the bank, in no order."""

_GROUP = 32  # columns of which only the best counts where the k-th best is sought
_ADDING = 2.0**-14  # bounds what fp32 loses when it adds up a product of some hundred terms
_MANY = 3  # times k groups above the cut: no longer cheaper than fp32 everywhere


def pays(bank: torch.Tensor, k: int) -> bool:
    """Return whether a screen of an (N, dim) bank is quicker than fp32 here."""
    swift = bank.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return bool(swift) and len(bank) >= 4 * k * _GROUP


class Screen:
    """A bank in bfloat16 beside its fp32 rows.

    Args:
        bank: (N, dim) fp32 rows of length 1.
    """

    def __init__(self, bank: torch.Tensor) -> None:
        self._bank = bank
        self._coarse = bank.bfloat16()
        self._error = _rounding(bank, self._coarse).max()
        self._kept = threading.local()

    def nearest(self, queries: torch.Tensor, k: int) -> Nearest | None:
        """Return the k nearest of the bank; None: too many are near to tell them apart cheaply.

        Threads may ask side by side.

        Args:
            queries: (n, dim) fp32 rows of length 1.
            k: at most N / 32.
        """
        coarse = queries.bfloat16()
        similarity, near = self._buffers(len(queries))
        torch.mm(coarse, self._coarse.T, out=similarity)
        groups = _groups(_bits(similarity))
        cut = self._cut(groups, _rounding(queries, coarse), k)
        if cut.amin() <= 0 or np.count_nonzero(groups >= _bits(cut)) > _MANY * k * len(queries):
            return None
        np.greater_equal(_bits(similarity), _bits(cut), out=near)
        return self._exact(queries, torch.from_numpy(np.flatnonzero(near)), k)

    def _buffers(self, n: int) -> tuple[torch.Tensor, np.ndarray]:
        """Return room for (n, N) similarities and what is near, kept: fresh pages cost dear."""
        if len(getattr(self._kept, "near", ())) < n:
            size = n, len(self._bank)
            self._kept.similarity = torch.empty(size, dtype=torch.bfloat16)
            self._kept.near = np.empty(size, np.bool_)
        return self._kept.similarity[:n], self._kept.near[:n]

    def _cut(self, groups: np.ndarray, error: torch.Tensor, k: int) -> torch.Tensor:
        """Return the (n, 1) coarse similarity that none of the k nearest is below.

        The k-th largest of maxima of different columns: at least k columns reach it.
        """
        kth = np.partition(groups, -k, axis=1)[:, -k]
        reached = torch.from_numpy(kth.copy()).view(torch.bfloat16)
        below = torch.nextafter(reached, torch.tensor(-torch.inf, dtype=reached.dtype))
        bound = error * (1 + self._error) + self._error + _ADDING
        # What was rounded to `reached` was no less than half way to the number below it, and what
        # is no less than the cut is, rounded, no less than the rounded cut.
        least = (reached.float() + below.float()) / 2 - 2 * bound
        return least.bfloat16()[:, None]

    def _exact(self, queries: torch.Tensor, places: torch.Tensor, k: int) -> Nearest:
        """Return the k nearest of the candidates, ascending `places` in the (n, N) similarities."""
        n, columns = len(queries), len(self._bank)
        starts = torch.searchsorted(places, torch.arange(n + 1) * columns)
        counts, index = starts.diff(), places % columns
        held = torch.arange(int(counts.max())) < counts[:, None]
        products = _products(queries, self._bank, starts, index)
        similarity = torch.full(held.shape, -torch.inf).masked_scatter_(held, products)
        candidates = torch.zeros(held.shape, dtype=torch.int64).masked_scatter_(held, index)
        nearest = similarity.topk(k, dim=1, sorted=False)
        return nearest.values, candidates.gather(1, nearest.indices)


def _bits(similarity: torch.Tensor) -> np.ndarray:
    """Return bfloat16 numbers as the integers of their bits, which numpy compares by vectors.

    Positive ones order as their bits do, and negative ones are below them; among themselves
    negative ones do not, so a cut must be positive.
    """
    bits: np.ndarray = similarity.view(torch.int16).numpy()
    return bits


def _groups(similarity: np.ndarray) -> np.ndarray:
    """Return the (n, N // 32) best of each 32 columns of (n, N)."""
    n, columns = similarity.shape
    groups = similarity[:, : columns - columns % _GROUP].reshape(n, _GROUP, -1)
    best: np.ndarray = groups.max(axis=1)
    return best


def _rounding(exact: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Return (n,) lengths of what rounding took from each row."""
    lengths: torch.Tensor = torch.linalg.vector_norm(exact - coarse.float(), dim=1)
    return lengths


def _products(
    queries: torch.Tensor, bank: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return the fp32 similarity of each candidate, without a copy of its row of the bank.

    Args:
        queries: (n, dim).
        bank: (N, dim).
        starts: (n + 1,) of each query's candidates, and their end.
        columns: rows of the bank, those of the first query first.
    """
    nothing, size = torch.zeros(len(columns)), (len(queries), len(bank))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")  # torch calls it a beta
        wanted = torch.sparse_csr_tensor(starts, columns, nothing, size, check_invariants=False)
        products: torch.Tensor = torch.sparse.sampled_addmm(wanted, queries, bank.T, beta=0.0)
        found: torch.Tensor = products.values()
    return found
