"""What objectives share whose negatives are the other images of the batch."""

from collections.abc import Sequence

import torch

from fastmoco.core.rng import Ids
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.objectives.objective import Objective, Views
from fastmoco.train.objectives.shuffle_bn import Shuffle, make_shuffle


class InBatch(Objective):
    """One encoder for both views, in one pass over [view 1; shuffled view 2].

    So no BatchNorm group holds both views of some images and of no others (see `shuffle_bn`).
    """

    def prepare(
        self, views: Views, step: int, ids: Ids, statistics: RunningStatistics
    ) -> tuple[Sequence[torch.Tensor], Shuffle]:
        """Return the first view and the second shuffled; and the way back."""
        shuffle = make_shuffle(self._recipe, step, self._world, self._device)
        first, second = (view.to(self._precision.comm_dtype) for view in views)
        return (first, shuffle.scatter([second])), shuffle

    def _whole(self, projected: torch.Tensor, shuffle: Shuffle) -> tuple[torch.Tensor, ...]:
        """Return both views of the whole batch, (batch, dim) each in plan order, with gradient."""
        first, second = projected.chunk(2)
        return self._world.gather(first), shuffle.gather(second[None])[0]

    @property
    def _own(self) -> slice:
        """This rank's rows of the batch."""
        return self._world.share(self._recipe.batch)
