"""What a method adds to the step that all of them share."""

from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import nn

from fastmoco.core.precision import Precision
from fastmoco.models.encoder import Encoder
from fastmoco.train.guard import RunningStatistics

Views = tuple[torch.Tensor, torch.Tensor]
"""Query and key view of this rank's slice of a batch, (n, 3, H, W) channels-last each."""


class Objective(Protocol):
    """Keys, loss, and what follows the optimizer; made of (recipe, encoder, precision, world).

    Nothing in it waits for the device, `numbers` apart.
    """

    @property
    def networks(self) -> Sequence[Encoder]:
        """What it trains or moves beside the query encoder."""

    def queries(self, views: Views) -> Sequence[torch.Tensor]:
        """Return the views that the query encoder sees, V times (n, 3, H, W)."""

    def keys(self, views: Views, step: int, statistics: RunningStatistics) -> torch.Tensor:
        """Return what queries are compared with, before the backward pass and without gradient."""

    def compare(
        self, q: torch.Tensor, keys: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return the loss of each query and its similarities over T.

        Args:
            q: (V * r, dim) queries of unit length, fp32 (or fp64), one view after the other.
            keys: what `keys` returned.
            rows: r, of this rank's slice of the batch, that the queries are of.

        Returns:
            (V * r,) losses, (V * r,) positive and (V * r, M) negative logits.
        """

    def follow(self, keys: torch.Tensor, ok: torch.Tensor) -> None:
        """Move what follows the optimizer; nothing where `ok` (0-d bool) is False."""

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, by names of a checkpoint."""

    def load(self, state: dict[str, Any]) -> None:
        """Take over its part of a checkpoint's state."""

    def numbers(self) -> dict[str, float]:
        """Return what a row of the metrics says of it."""


def unit(projected: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return projections at unit length, in fp32: bf16 logits are off by 0.02 after / T."""
    return nn.functional.normalize(projected.to(precision.weights), dim=1)
