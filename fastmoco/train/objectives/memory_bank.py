"""The memory bank: one feature for each image (Wu et al. 2018; He et al. 2020, section 4.1)."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from fastmoco.config.objectives import MemoryBank as Section
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.core.rng import Ids, Permutation, Stream
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.objectives.losses import cross_entropy, without
from fastmoco.train.objectives.objective import Objective, Views, to_device
from fastmoco.train.objectives.queue import random_units


@dataclass(frozen=True)
class Drawn:
    """What the queries of a step are compared with.

    Attributes:
        rows: (n,) int64 of the bank, one for each image; on the device, as all here.
        positives: (n, dim) those rows as they are.
        negatives: (K + 1, dim) rows drawn for the whole batch.
        left_out: (n,) int64, which of them each query leaves out: its own, or else the last.
    """

    rows: torch.Tensor
    positives: torch.Tensor
    negatives: torch.Tensor
    left_out: torch.Tensor


class MemoryBank(Objective):
    """Each image has a row of a bank, which moves towards its output when it is seen.

    The bank is the same on every rank. Its rows were made in other steps: no shuffle is needed.

    Attributes:
        bank: (N, dim) rows of unit length, random ones to begin with.
    """

    def __init__(
        self, recipe: Recipe, encoder: Encoder, precision: Precision, world: World, ids: Ids
    ) -> None:
        super().__init__(recipe, encoder, precision, world, ids)
        check_bank(recipe, len(ids))
        self._ids = ids
        units = random_units(len(ids), recipe.encoder.dim, recipe.seed, precision.weights)
        self.bank = units.to(self._device)

    def prepare(
        self, views: Views, step: int, ids: Ids, statistics: RunningStatistics
    ) -> tuple[Sequence[torch.Tensor], Drawn]:
        """Return the query view; and the rows of its images, and others."""
        rows = np.searchsorted(self._ids, ids)
        drawn = Permutation(len(self._ids), self._recipe.seed, Stream.NEGATIVES, step)(
            np.arange(self._wanted.queue + 1)
        )
        own, negatives, left_out = (
            to_device(index, self._device) for index in (rows, drawn, places_in(drawn, rows))
        )
        return views[:1], Drawn(own, self.bank[own], self.bank[negatives], left_out)

    def compare(
        self, q: torch.Tensor, given: Drawn, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return InfoNCE of the queries against their own rows and K others."""
        scaled = q / self._wanted.temperature
        positive = (scaled * given.positives[rows]).sum(dim=1)
        negative = without(scaled @ given.negatives.T, given.left_out[rows])
        return cross_entropy(positive, negative), positive, negative

    @torch.no_grad()
    def follow(self, q: torch.Tensor, given: Drawn, ok: torch.Tensor) -> None:
        """Move the rows of the batch: v = b v + (1 - b) q, at unit length.

        Of an image that is twice in a batch, the last one counts.
        """
        rows, q = self._world.gather(given.rows), self._world.gather(q)
        before, b = self.bank[rows], self._wanted.bank_momentum
        moved = nn.functional.normalize(b * before + (1 - b) * q, dim=1)
        places = torch.arange(len(rows), device=rows.device)
        last = torch.where(rows[:, None] == rows, places, -1).amax(dim=1)
        # The same value for the same row: the order of the writes does not matter.
        self.bank[rows] = torch.where(ok, moved[last], before)

    def state(self) -> dict[str, Any]:
        """Return the bank."""
        return {"bank": self.bank}

    def load(self, state: dict[str, Any]) -> None:
        """Take over the bank."""
        self.bank.copy_(state["bank"])


def places_in(drawn: Ids, wanted: Ids) -> Ids:
    """Return the place of each `wanted` (n,) among the distinct `drawn` (M,), else the last."""
    order = np.argsort(drawn)
    near = order[np.searchsorted(drawn, wanted, sorter=order).clip(max=len(drawn) - 1)]
    return np.where(drawn[near] == wanted, near, len(drawn) - 1)


def check_bank(recipe: Recipe, samples: int) -> None:
    """Check that there are as many images as a memory bank is to draw, where there is one.

    Raises:
        UsageError: there are not.
    """
    if isinstance(recipe.objective, Section) and recipe.objective.queue >= samples:
        raise UsageError(
            f"objective.queue {recipe.objective.queue}: the memory bank of {samples:,} images has "
            f"{samples - 1:,} others to draw: choose fewer."
        )
