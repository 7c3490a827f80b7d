"""The momentum update of the key encoder."""

import torch


@torch.no_grad()
def momentum_update(
    keys: list[torch.Tensor], queries: list[torch.Tensor], m: float, ok: torch.Tensor
) -> None:
    """Move the key parameters towards the query ones: k = m k + (1 - m) q (MoCo eq. 2).

    One call without temporaries, for all parameters.

    Args:
        keys, queries: parameters of both encoders, pairwise of one shape and dtype.
        m: momentum.
        ok: 0-d bool on the device; where False nothing changes.
    """
    # A list of device weights: one 0-d tensor for all would be read back to the host.
    weight = (1 - m) * ok.to(keys[0].dtype)
    torch._foreach_lerp_(keys, queries, [weight] * len(keys))
