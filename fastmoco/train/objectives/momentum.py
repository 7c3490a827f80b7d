"""The momentum update of the key encoder."""

import torch


@torch.no_grad()
def momentum_update(
    keys: list[torch.Tensor], queries: list[torch.Tensor], m: float, ok: torch.Tensor
) -> None:
    """Move the key parameters towards the query ones: k = m k + (1 - m) q (MoCo eq. 2).

    Three launches for all parameters on a GPU, not one or more for each. (`_foreach_lerp_` with
    weights on the device has no fused kernel; with a weight on the host it would wait for `ok`.)

    Args:
        keys, queries: parameters of both encoders, pairwise of one shape, dtype and layout.
        m: momentum.
        ok: 0-d bool on the device; where False nothing changes.
    """
    way = torch._foreach_sub(queries, keys)
    torch._foreach_mul_(way, (1 - m) * ok.to(keys[0].dtype))
    torch._foreach_add_(keys, way)
