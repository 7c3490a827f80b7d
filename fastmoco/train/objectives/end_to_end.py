"""End-to-end: one encoder for queries and keys, both with gradient (He et al. 2020, figure 2a)."""

import torch

from fastmoco.train.objectives.in_batch import InBatch
from fastmoco.train.objectives.losses import info_nce_in_batch
from fastmoco.train.objectives.shuffle_bn import Shuffle


class EndToEnd(InBatch):
    """The first view is to find the second one of its image among those of the batch.

    Symmetric: the second is to find the first one too, by the same two outputs.
    """

    def compare(
        self, q: torch.Tensor, given: Shuffle, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return InfoNCE of the queries against the keys of the batch."""
        views, own = self._whole(q, given), self._own
        directions = (views, views[::-1]) if self._wanted.symmetric else (views,)
        compared = [
            info_nce_in_batch(queries[own], keys, own.start, self._wanted.temperature)
            for queries, keys in directions
        ]
        loss, positive, negative = (torch.cat(parts) for parts in zip(*compared, strict=True))
        return loss, positive, negative
