"""Shuffling BN: keys are normalised in other company than queries.

Without it the network cheats: the statistics of a BatchNorm group tell which samples share it, and
query and positive key would always share theirs (MoCo, section 3.3). The permutation of a step is
a function of (seed, step), so no rank has to tell it to the others.
"""

import numpy as np
import torch

from fastmoco.distributed import Ranks

_STREAM = 1 << 63  # keeps these permutations apart from the data's order under one seed


class Shuffle:
    """The permutation of one step's global batch.

    Args:
        seed: of the run.
        step: of the run.
        batch: rows of the global batch.
        ranks: each holds a contiguous, equal slice of it.
        device: where the rows live.
    """

    def __init__(
        self, seed: int, step: int, batch: int, ranks: Ranks, device: torch.device
    ) -> None:
        numbers = np.random.Philox(key=np.array([seed, _STREAM + step], dtype=np.uint64))
        order = np.argsort(numbers.random_raw(batch), kind="stable")
        self._ranks = ranks
        self._own = ranks.share(batch)
        self._order = torch.from_numpy(order[self._own]).to(device, non_blocking=True)
        self._inverse = torch.from_numpy(np.argsort(order)).to(device, non_blocking=True)

    def scatter(self, images: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of the shuffled batch.

        Args:
            images: (n, 3, H, W) channels-last rows of this rank, in plan order.
        """
        rows = images.permute(0, 2, 3, 1)  # channels-last memory seen as plain contiguous rows
        return self._ranks.gather(rows)[self._order].permute(0, 3, 1, 2)

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the keys of the whole batch, (batch, dim), back in plan order."""
        return self._ranks.gather(keys)[self._inverse]

    def own(self, rows: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of rows that are in plan order."""
        return rows[self._own]
