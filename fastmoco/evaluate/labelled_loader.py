"""What classifiers are trained on: labelled images, cropped and flipped anew each time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fastmoco.config.recipe import View
from fastmoco.core.distributed import World
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import UsageError
from fastmoco.evaluate.features import Preprocessing
from fastmoco.load.loader import Loader
from fastmoco.load.order import Shuffled, SubsetOrder
from fastmoco.load.sampler import Plan

# As in the paper's probe: RandomResizedCrop and flip, no color change.
VIEW = View(scale=(0.08, 1.0), flip=0.5)


@dataclass(frozen=True)
class Crops:
    """An endless stream of a labelled set's images.

    Attributes:
        labelled: where they come from.
        ids: (n,) int64, ascending: which of the labelled samples.
        batch: images a step over all ranks; all of them where there are fewer.
        seed: of order and crops.
        preprocessing: size and normalization.
        world: each draws its contiguous slice of every batch.
        view: how images are cropped and flipped.

    Raises:
        UsageError: the ranks cannot share a batch evenly.
    """

    labelled: Labelled
    ids: Ids
    batch: int
    seed: int
    preprocessing: Preprocessing
    world: World = field(default_factory=World)
    view: View = VIEW

    def __post_init__(self) -> None:
        if self.plan.batch % self.world.size:
            raise UsageError(
                f"{self.world.size} processes cannot share a batch of {self.plan.batch} evenly: "
                "choose another --batch, or start one process."
            )

    @cached_property
    def plan(self) -> Plan:
        """Order and batch size."""
        order = SubsetOrder(self.ids, Shuffled(len(self.ids), self.seed))
        return Plan(len(order), min(self.batch, len(order)), self.seed, order)

    def batches(self) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
        """Yield this rank's (n, 3, size, size) images and (n,) int64 labels, on the device."""
        preprocessing = self.preprocessing
        loader = Loader(
            ConcatShardSets([self.labelled.set]),
            self.plan,
            [self.view],
            size=preprocessing.size,
            mean=preprocessing.mean,
            std=preprocessing.std,
            settings=preprocessing.settings,
            rank=self.world.rank,
            ranks=self.world.size,
        )
        for batch in loader.batches():
            labels = self._get_labels(batch.ids).to(preprocessing.settings.device)
            yield preprocessing.cast(batch.views[0]), labels

    def _get_labels(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(self.labelled.labels[np.searchsorted(self.labelled.ids, ids)])
