"""InfoNCE against a queue of negative keys."""

import torch


def info_nce(
    q: torch.Tensor, k: torch.Tensor, queue: torch.Tensor, temperature: float
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return the loss of each sample and its similarities (van den Oord et al. 2018; MoCo eq. 1).

    The (1 + K) logits are never put into one tensor: their log-sum-exp is that of its two parts.

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
    loss = torch.logaddexp(positive, torch.logsumexp(negative, dim=1)) - positive
    return loss, positive, negative
