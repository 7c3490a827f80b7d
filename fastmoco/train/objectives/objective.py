"""What a method adds to the step that all of them share."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.core.rng import Ids
from fastmoco.models.encoder import Encoder
from fastmoco.train.guard import RunningStatistics

Views = tuple[torch.Tensor, torch.Tensor]
"""Query and key view of this rank's slice of a batch, (n, 3, H, W) channels-last each."""


class Objective:
    """What the encoder sees, the loss, and what follows the optimizer.

    As it stands here, it has nothing beside the encoder: no other network, no state. Nothing in it
    waits for the device, `numbers` apart.

    Args:
        recipe: of the run.
        encoder: that is trained, on its device.
        precision: that it computes in.
        world: that share each global batch.
        ids: (N,) int64 of the samples that take part, ascending.

    Attributes:
        networks: what moves beside the query encoder.
    """

    networks: Sequence[Encoder] = ()

    def __init__(
        self, recipe: Recipe, encoder: Encoder, precision: Precision, world: World, ids: Ids
    ) -> None:
        self._recipe, self._precision, self._world = recipe, precision, world
        self._wanted: Any = recipe.objective  # its own section, whichever it is
        self._device = next(encoder.parameters()).device

    def prepare(
        self, views: Views, step: int, ids: Ids, statistics: RunningStatistics
    ) -> tuple[Sequence[torch.Tensor], Any]:
        """Get ready for a step, before the backward pass.

        Args:
            views: of this rank's samples.
            step: of the run.
            ids: (n,) int64 of the samples.
            statistics: for networks that go over the batch in parts.

        Returns:
            The images that the query encoder sees, V times (n, 3, H, W); and what `compare` and
            `follow` need beside its output.
        """
        raise NotImplementedError

    def compare(
        self, q: torch.Tensor, given: Any, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return losses, and similarities over T.

        Args:
            q: (V * r, dim) outputs of unit length, fp32 (or fp64), one view after the other.
            given: what `prepare` returned beside the images.
            rows: r, of this rank's slice of the batch, that they are of.

        Returns:
            (L * r,) losses, of which each image's L are added up; (m,) positive and (m, M) negative
            logits of the m queries.
        """
        raise NotImplementedError

    def follow(self, q: torch.Tensor, given: Any, ok: torch.Tensor) -> None:
        """Move what follows the optimizer; nothing where `ok` (0-d bool) is False.

        Args:
            q: (V * n, dim) outputs of unit length, of a step in parts one part after the other.
            given: what `prepare` returned beside the images.
            ok: whether the step counts.
        """

    def state(self) -> dict[str, Any]:
        """Return what a resumed run needs, by names of a checkpoint."""
        return {}

    def load(self, state: dict[str, Any]) -> None:
        """Take over its part of a checkpoint's state."""

    def numbers(self) -> dict[str, float]:
        """Return what a row of the metrics says of it."""
        return {}


def unit(projected: torch.Tensor, precision: Precision) -> torch.Tensor:
    """Return projections at unit length, in fp32: bf16 logits are off by 0.02 after / T."""
    return nn.functional.normalize(projected.to(precision.weights), dim=1)


def to_device(index: Ids, device: torch.device) -> torch.Tensor:
    """Return an index on the device, without waiting for it."""
    host = torch.from_numpy(index)
    if device.type == "cuda":
        host = host.pin_memory()  # from other memory the copy would wait for the device
    return host.to(device, non_blocking=True)
