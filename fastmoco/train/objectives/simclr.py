"""SimCLR: Algorithm 1 of Chen et al. 2020."""

import torch

from fastmoco.train.objectives.in_batch import InBatch
from fastmoco.train.objectives.losses import info_nce_in_batch
from fastmoco.train.objectives.shuffle_bn import Shuffle


class SimClr(InBatch):
    """Each view is to find the other one of its image among all views of the batch."""

    def compare(
        self, q: torch.Tensor, given: Shuffle, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return NT-Xent, of each image the mean of its two views."""
        views, own = self._whole(q, given), self._own
        both = [
            info_nce_in_batch(queries[own], keys, own.start, self._wanted.temperature, queries)
            for queries, keys in (views, views[::-1])
        ]
        loss, positive, negative = (torch.cat(parts) for parts in zip(*both, strict=True))
        return loss.view(2, -1).mean(dim=0), positive, negative
