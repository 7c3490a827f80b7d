"""Exact nearest neighbours at the price of bfloat16: a coarse look rules out, fp32 decides.

The product of all queries with the whole bank is the cost of kNN; processors with bfloat16
instructions do it in half the time of fp32. Its error is bounded, so whatever the coarse look puts
more than twice that bound below the k-th best cannot be among the k nearest. The few that are left
get their fp32 similarity, and the k best of them are the answer, as without the screen.
"""

import math
import threading
import warnings

import numpy as np
import torch

Nearest = tuple[torch.Tensor, torch.Tensor]
"""(n, k) fp32 similarities and (n, k) int64 rows of the bank, in no order."""

_GROUP = 32  # rows of the bank of which only the best counts where the k-th best is sought
_ADDING = 2.0**-14  # bounds what fp32 loses when it adds up a product of some hundred terms
_MANY = 3  # times k groups above the cut: no longer cheaper than fp32 everywhere


def pays(bank: torch.Tensor, k: int) -> bool:
    """Return whether a screen of an (N, dim) bank is quicker than fp32 here."""
    swift = bank.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return bool(swift) and len(bank) >= (_MANY + 1) * k * _GROUP  # so all are too many


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
            queries: (n, dim) fp32 rows of length 1, no more than 65,535.
            k: at most N / 32.
        """
        coarse = queries.bfloat16()
        similarity, near = self._buffers(len(self._bank), len(queries))
        # The bank times the queries: so the candidates' rows of the bank are read in order, too.
        bits = _bits(torch.mm(self._coarse, coarse.T, out=similarity))
        groups = _groups(bits)
        cut = _bits(self._cut(groups, _rounding(queries, coarse), k))
        if cut.min() <= 0 or np.count_nonzero(groups >= cut) > _MANY * k * len(queries):
            return None
        np.greater_equal(bits, cut, out=near)
        return self._exact(queries, torch.from_numpy(np.flatnonzero(near)), k)

    def _buffers(self, *size: int) -> tuple[torch.Tensor, np.ndarray]:
        """Return room for (N, n) similarities and what is near, kept: fresh pages cost dear."""
        count = math.prod(size)
        if len(getattr(self._kept, "near", ())) < count:
            self._kept.similarity = torch.empty(count, dtype=torch.bfloat16)
            self._kept.near = np.empty(count, np.bool_)
        return self._kept.similarity[:count].view(size), self._kept.near[:count].reshape(size)

    def _cut(self, groups: np.ndarray, error: torch.Tensor, k: int) -> torch.Tensor:
        """Return the (n,) coarse similarity that none of a query's k nearest is below.

        The k-th largest of maxima of different rows: at least k rows reach it.
        """
        kth = np.partition(groups.T, -k, axis=1)[:, -k]
        reached = torch.from_numpy(kth.copy()).view(torch.bfloat16)
        below = torch.nextafter(reached, torch.tensor(-torch.inf, dtype=reached.dtype))
        bound = error * (1 + self._error) + self._error + _ADDING
        # What was rounded to `reached` was no less than half way to the number below it, and what
        # is no less than the cut is, rounded, no less than the rounded cut.
        least = (reached.float() + below.float()) / 2 - 2 * bound
        return least.bfloat16()

    def _exact(self, queries: torch.Tensor, places: torch.Tensor, k: int) -> Nearest:
        """Return the k nearest of the candidates, ascending `places` in the (N, n) similarities."""
        n = len(queries)
        index = places // n
        asker = places - n * index
        products = _products(self._bank, queries, index, asker)
        # numpy sorts small integers by their digits: the only quick way.
        by_query = torch.from_numpy(asker.numpy().astype(np.uint16).argsort(kind="stable"))
        counts = torch.bincount(asker, minlength=n)
        held = torch.arange(int(counts.max())) < counts[:, None]
        similarity, candidates = torch.full(held.shape, -torch.inf), held.long()
        similarity.masked_scatter_(held, products.index_select(0, by_query))
        candidates.masked_scatter_(held, index.index_select(0, by_query))
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
    """Return the (N // 32, n) best of each 32 rows of (N, n)."""
    n, queries = similarity.shape
    best: np.ndarray = similarity[: n - n % _GROUP].reshape(_GROUP, -1, queries).max(axis=0)
    return best


def _rounding(exact: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Return (n,) lengths of what rounding took from each row."""
    lengths: torch.Tensor = torch.linalg.vector_norm(exact - coarse.float(), dim=1)
    return lengths


def _products(
    bank: torch.Tensor, queries: torch.Tensor, index: torch.Tensor, asker: torch.Tensor
) -> torch.Tensor:
    """Return the (c,) fp32 similarities of bank[index] and queries[asker], without a copy of rows.

    Args:
        bank: (N, dim).
        queries: (n, dim).
        index: (c,) rows of the bank, ascending.
        asker: (c,) rows of the queries.
    """
    starts = torch.zeros(len(bank) + 1, dtype=torch.int64)
    torch.cumsum(torch.bincount(index, minlength=len(bank)), 0, out=starts[1:])
    nothing, size = torch.zeros(len(index)), (len(bank), len(queries))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")  # torch calls it a beta
        wanted = torch.sparse_csr_tensor(starts, asker, nothing, size, check_invariants=False)
        products: torch.Tensor = torch.sparse.sampled_addmm(wanted, bank, queries.T, beta=0.0)
        found: torch.Tensor = products.values()
    return found
