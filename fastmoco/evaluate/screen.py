"""Exact nearest neighbours at the price of bfloat16: a coarse look rules out, fp32 decides.

The product of all queries with the whole bank is the cost of kNN; processors with bfloat16
instructions do it in half the time of fp32. Its error is bounded, so whatever the coarse look puts
more than twice that bound below the k-th best cannot be among the k nearest. The few that are left
get their fp32 similarity, and the k best of them are the answer, as without the screen.
"""

import warnings

import torch
from torch.nn.functional import pad

Nearest = tuple[torch.Tensor, torch.Tensor]
"""(n, k) fp32 similarities and (n, k) int64 rows of the bank, in no order."""

_BLOCK, _BLOCKS = 16, 4  # columns whose maximum is taken at once; of which so many again
_UNIT = _BLOCK * _BLOCKS
_ADDING = 2.0**-14  # bounds what fp32 loses when it adds up a product of some hundred terms
_MANY = 16  # times k candidates a query: no longer cheaper than fp32 everywhere


def pays(bank: torch.Tensor, k: int) -> bool:
    """Return whether a screen of an (N, dim) bank is quicker than fp32 here."""
    swift = bank.device.type == "cpu" and torch.cpu.get_capabilities().get("avx512_bf16", False)
    return bool(swift) and len(bank) >= 2 * k * _UNIT


class Screen:
    """A bank in bfloat16 beside its fp32 rows.

    Args:
        bank: (N, dim) fp32 rows of length 1.
        queries: at most so many at a time.
    """

    def __init__(self, bank: torch.Tensor, queries: int) -> None:
        self._bank = bank
        padded = pad(bank, (0, 0, 0, -len(bank) % _UNIT))
        self._coarse = padded.bfloat16()
        self._error = _rounding(padded, self._coarse).max()
        # Kept: fresh pages for each chunk cost as much as half of its product.
        self._similarity = torch.empty(queries, len(padded), dtype=torch.bfloat16)

    def nearest(self, queries: torch.Tensor, k: int) -> Nearest | None:
        """Return the k nearest of the bank; None: too much of it is equally near to tell cheaply.

        Args:
            queries: (n, dim) fp32 rows of length 1.
            k: at most N / 64.
        """
        coarse = queries.bfloat16()
        similarity = torch.mm(coarse, self._coarse.T, out=self._similarity[: len(queries)])
        similarity[:, len(self._bank) :] = -torch.inf
        # Block b holds the columns b, b + step, ...: maxima of whole rows, which vectorises.
        blocks = similarity.view(len(queries), _BLOCK, -1)
        best = blocks.amax(dim=1)
        cut = self._cut(best, _rounding(queries, coarse), k)
        rows, block = (best >= cut).nonzero(as_tuple=True)
        if len(rows) > _MANY * k * len(queries):
            return None
        hit, member = (blocks[rows, :, block] >= cut[rows]).nonzero(as_tuple=True)
        return self._exact(queries, rows[hit], block[hit] + member * best.shape[1], k)

    def _cut(self, best: torch.Tensor, error: torch.Tensor, k: int) -> torch.Tensor:
        """Return the (n, 1) coarse similarity that none of the k nearest is below.

        The k-th largest of maxima of different blocks: at least k columns reach it.
        """
        wider = best.view(len(best), _BLOCKS, -1).amax(dim=1)
        reached = wider.topk(k, dim=1, sorted=False).values.amin(dim=1)
        bound = error * (1 + self._error) + self._error + _ADDING
        low = torch.tensor(-torch.inf, dtype=best.dtype)
        # What was rounded to `reached` was more than the next number below it; and so for the cut.
        least = torch.nextafter(reached, low).float() - 2 * bound
        cut: torch.Tensor = torch.nextafter(least.bfloat16(), low)
        return cut[:, None]

    def _exact(
        self, queries: torch.Tensor, rows: torch.Tensor, columns: torch.Tensor, k: int
    ) -> Nearest:
        """Return the k nearest of the candidates (rows[i], columns[i]), rows ascending."""
        counts = torch.bincount(rows, minlength=len(queries))
        ends = counts.cumsum(0)
        place = torch.arange(len(rows)) - (ends - counts)[rows]
        similarity = torch.full((len(queries), int(counts.max())), -torch.inf)
        similarity[rows, place] = _products(queries, self._bank, ends, columns)
        index = torch.zeros(similarity.shape, dtype=torch.int64)
        index[rows, place] = columns
        nearest = similarity.topk(k, dim=1, sorted=False)
        return nearest.values, index.gather(1, nearest.indices)


def _rounding(exact: torch.Tensor, coarse: torch.Tensor) -> torch.Tensor:
    """Return (n,) lengths of what rounding took from each row."""
    lengths: torch.Tensor = torch.linalg.vector_norm(exact - coarse.float(), dim=1)
    return lengths


def _products(
    queries: torch.Tensor, bank: torch.Tensor, ends: torch.Tensor, columns: torch.Tensor
) -> torch.Tensor:
    """Return the fp32 similarity of each candidate, without a copy of its row of the bank."""
    starts = torch.cat([ends.new_zeros(1), ends])
    nothing, size = torch.zeros(len(columns)), (len(queries), len(bank))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Sparse CSR")  # torch calls it a beta
        # Columns of a row do not ascend: products do not mind, the check would.
        wanted = torch.sparse_csr_tensor(starts, columns, nothing, size, check_invariants=False)
        products: torch.Tensor = torch.sparse.sampled_addmm(wanted, queries, bank.T, beta=0.0)
        found: torch.Tensor = products.values()
    return found
