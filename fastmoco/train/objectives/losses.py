"""InfoNCE: one positive key among negatives, of a queue or of the batch."""

import torch


def info_nce(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each sample and its similarities (van den Oord et al. 2018; MoCo eq. 1).

    Args:
        q: (n, dim) queries of unit length, fp32 (bf16 logits are off by 0.02 and more after / T).
        k: (n, dim) positive keys of unit length.
        queue: (K, dim) negative keys.
        temperature: T.

    Returns:
        (n,) losses; (n,) positive and (n, K) negative logits, similarities over T.
    """
    scaled = q / temperature  # (n, dim): to divide the (n, K) products would read them once more
    positive = (scaled * k).sum(dim=1)
    negative = scaled @ queue.T
    return cross_entropy(positive, negative), positive, negative


def info_nce_in_batch(
    q: torch.Tensor,
    keys: torch.Tensor,
    first: int,
    temperature: float,
    more: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each sample against the keys of all others; as in `info_nce`.

    Args:
        q: (n, dim) queries of unit length, of rows `first` and following of the batch.
        keys: (batch, dim) keys of unit length, of which row i is that of sample i.
        first: see `q`.
        temperature: T.
        more: (batch, dim) the queries of the whole batch, if those of the others are negatives too.
            With them it is NT-Xent (Chen et al. 2020, eq. 1), of one of the two views.
    """
    scaled = q / temperature
    own = torch.arange(first, first + len(q), device=q.device)
    positive = (scaled * keys[first : first + len(q)]).sum(dim=1)
    against = [keys] if more is None else [keys, more]
    negative = torch.cat([without(scaled @ rows.T, own) for rows in against], dim=1)
    return cross_entropy(positive, negative), positive, negative


def cross_entropy(positive: torch.Tensor, negative: torch.Tensor) -> torch.Tensor:
    """Return (n,) -log softmax of the positive logits (n,) among theirs and the negative (n, M).

    The (1 + M) logits are never put into one tensor: their log-sum-exp is that of its two parts.
    """
    return torch.logaddexp(positive, torch.logsumexp(negative, dim=1)) - positive


def without(matrix: torch.Tensor, columns: torch.Tensor) -> torch.Tensor:
    """Return a (n, M) matrix as (n, M - 1), of each row left out the one of its `columns` (n,)."""
    before = torch.arange(matrix.shape[1] - 1, device=matrix.device) < columns[:, None]
    return torch.where(before, matrix[:, :-1], matrix[:, 1:])
