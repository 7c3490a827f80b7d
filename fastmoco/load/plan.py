"""Which sample stands at which position: a pure function of (seed, position), with no state.

A position is the absolute index in the endless stream of samples: epoch * N + index. Every epoch
has its own permutation of the N ids, computed for any index alone, so memory is O(1), resuming is
a number, and a global batch does not depend on how many ranks share it.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from fastmoco.errors import UsageError
from fastmoco.load.order import Ids, Order, Shuffled


@dataclass(frozen=True)
class Plan:
    """The order of a run: positions, ids and steps.

    Attributes:
        samples: N, indices of an epoch.
        batch: images a step over all ranks.
        seed: of the run.
        through: the way through the samples; None: all of them, shuffled.

    Raises:
        UsageError: the batch is larger than the data.
    """

    samples: int
    batch: int
    seed: int
    through: Order | None = None

    def __post_init__(self) -> None:
        if self.batch > self.samples:
            raise UsageError(
                f"batch {self.batch} is larger than the data ({self.samples} images): "
                "lower `batch` or add images."
            )

    @property
    def steps_per_epoch(self) -> int:
        """Steps an epoch; the tail that fills no batch is dropped, another one each epoch."""
        return self.samples // self.batch

    def positions(self, step: int, rank: int = 0, ranks: int = 1) -> Ids:
        """Return the (batch / ranks,) positions of a rank's slice of the global batch."""
        epoch, within = divmod(step, self.steps_per_epoch)
        start = epoch * self.samples + within * self.batch
        share = self.batch // ranks
        return np.arange(start + rank * share, start + (rank + 1) * share, dtype=np.int64)

    def order(self, positions: Ids) -> Ids:
        """Return the sample id at each position."""
        epochs, indices = np.divmod(positions, self.samples)
        ids = np.empty_like(positions)
        for epoch in np.unique(epochs).tolist():
            mask = epochs == epoch
            ids[mask] = self._through(epoch, indices[mask])
        return ids

    @cached_property
    def _through(self) -> Order:
        return self.through or Shuffled(self.samples, self.seed)
