"""What classifiers are trained on: labelled images, cropped and flipped anew each time."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from fastmoco.config.recipe import View
from fastmoco.core.distributed import World
from fastmoco.core.rng import Stream, philox, repeat_evenly
from fastmoco.dataset.labels import Labelled, Weights
from fastmoco.errors import UsageError
from fastmoco.evaluate.features import Preprocessing, Samples
from fastmoco.evaluate.noise import cut_out
from fastmoco.load.loader import Loader
from fastmoco.load.order import Shuffled, SubsetOrder
from fastmoco.load.sampler import Plan

# As in the paper's probe: RandomResizedCrop and flip, no color change.
VIEW = View(scale=(0.08, 1.0), flip=0.5)


@dataclass(frozen=True)
class Crops:
    """An endless stream of a labelled set's images.

    Attributes:
        labelled: the n samples.
        weights: (n, ...) fp32, what each counts; None: all the same.
        batch: images a step over all ranks; all of them where there are fewer.
        seed: of order and crops.
        preprocessing: size and normalization.
        world: each draws its contiguous slice of every batch.
        even: every class equally often: an epoch shows the samples of the smaller classes again.
        view: how images are cropped and flipped.
        cut: whether a square of each is cut out.

    Raises:
        UsageError: the ranks cannot share a batch evenly.
    """

    labelled: Labelled
    weights: Weights | None
    batch: int
    seed: int
    preprocessing: Preprocessing
    world: World = field(default_factory=World)
    even: bool = False
    view: View = VIEW
    cut: bool = False

    def __post_init__(self) -> None:
        if self.plan.batch % self.world.size:
            raise UsageError(
                f"{self.world.size} processes cannot share a batch of {self.plan.batch} evenly: "
                "choose another --batch, or start one process."
            )

    @cached_property
    def plan(self) -> Plan:
        """Order and batch size."""
        ids = self.labelled.ids
        if self.even:
            ids = ids[repeat_evenly(self.labelled.labels, self.seed)]
        order = SubsetOrder(ids, Shuffled(len(ids), self.seed))
        return Plan(len(order), min(self.batch, len(order)), self.seed, order)

    def batches(self) -> Iterator[Samples]:
        """Yield this rank's (n, 3, size, size) images, labels and weights, on the device."""
        preprocessing = self.preprocessing
        given = self.labelled.data, self.plan, [self.view]
        rank, ranks = self.world.rank, self.world.size
        loader = Loader(*given, rank=rank, ranks=ranks, **preprocessing.drawn)
        for step, batch in enumerate(loader.batches()):
            places = np.searchsorted(self.labelled.ids, batch.ids)
            columns = (self.labelled.labels, self.weights)
            parts = (torch.from_numpy(of[places]) for of in columns if of is not None)
            device = preprocessing.settings.device
            images = preprocessing.cast(batch.views[0])
            if self.cut:
                bits = philox(self.seed, Stream.NOISE, step * ranks + rank)
                images = cut_out(images, np.random.Generator(bits))
            yield images, *(part.to(device) for part in parts)
