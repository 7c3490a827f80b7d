"""Fine-tuning on few labels and many images without: FixMatch, MixMatch and pseudo-labels."""

import copy
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch.nn import functional as F

from fastmoco.config.recipe import View
from fastmoco.core.distributed import World
from fastmoco.core.rng import Ids, Stream, philox
from fastmoco.dataset.classes import Known
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import UsageError
from fastmoco.evaluate.features import Preprocessing
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.noise import cut_out, strong
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.models.encoder import Encoder

Method = Literal["fixmatch", "mixmatch", "pseudo"]
Network = Callable[[torch.Tensor], torch.Tensor]
Step = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""A 0-d loss with its gradient, (B, c) logits of labelled images, and their (B,) labels."""

_APART = 0x756E6C6162656C  # between the seeds of the two streams
_LOOKS = 10  # at the pseudo-labels, while training
WEAK = View(scale=(0.5, 1.0), flip=0.5)


@dataclass(frozen=True)
class SemiConfig:
    """How images without labels are used.

    Attributes:
        method: "fixmatch" (Sohn et al. 2020), "mixmatch" (Berthelot et al. 2019) or "pseudo"
            (Lee 2013).
        ratio: images without a label for each with one.
        threshold: with fixmatch: the least probability of a class that is taken for the truth.
        ema: the most that the averaged weights, which are tested, keep of themselves at a step.
    """

    method: Method
    ratio: int = 7
    threshold: float = 0.95
    ema: float = 0.999

    def views(self, size: int) -> tuple[View, ...]:
        """Return the views of an image without a label."""
        return {"fixmatch": (WEAK, strong(size)), "mixmatch": (WEAK, WEAK), "pseudo": (WEAK,)}[
            self.method
        ]


@dataclass(frozen=True)
class SemiBatch:
    """What a loss is taken of.

    Attributes:
        images, labels, weights: (B, 3, S, S), (B,) int64 and (B,) of the labelled samples.
        views: each (MU B, 3, S, S), of the same samples without labels.
        progress: share of the steps that are done, 0..1.
        noise: the numbers of this step and rank.
    """

    images: torch.Tensor
    labels: torch.Tensor
    weights: torch.Tensor
    views: tuple[torch.Tensor, ...]
    progress: float
    noise: np.random.Generator


@dataclass(frozen=True)
class SemiLoss:
    """What a method makes of a batch.

    Attributes:
        loss: 0-d, with its gradient.
        logits: (B, c) of the labelled images.
        guesses: (MU B,) int64, the pseudo-labels.
        taken: (MU B,) bool, those that were trained on.
    """

    loss: torch.Tensor
    logits: torch.Tensor
    guesses: torch.Tensor
    taken: torch.Tensor


def fixmatch(network: Network, batch: SemiBatch, threshold: float = 0.95) -> SemiLoss:
    """Return the loss of FixMatch (Sohn et al. 2020, eq. 3 and 4).

    A weak view's class, where it is certain, is what its strong view is trained on.
    """
    weak, hard = batch.views
    hard = cut_out(hard, batch.noise)
    # All in one pass, so that BatchNorm sees one mixture.
    logits = _wide(network(torch.cat([batch.images, weak, hard])))
    labelled, weak_logits, hard_logits = torch.split(
        logits, [len(batch.labels), len(weak), len(hard)]
    )
    certainty, guesses = weak_logits.detach().softmax(dim=1).max(dim=1)
    taken = certainty >= threshold
    unlabelled = (F.cross_entropy(hard_logits, guesses, reduction="none") * taken).mean()
    return SemiLoss(_supervised(labelled, batch) + unlabelled, labelled, guesses, taken)


def mixmatch(
    network: Network, batch: SemiBatch, weight: float = 75.0, ramp: float = 0.4
) -> SemiLoss:
    """Return the loss of MixMatch (Berthelot et al. 2019, algorithm 1 and eq. 2 to 8).

    Args:
        network: gives logits; it is called twice.
        batch: with two weak views.
        weight: of the unlabelled term, lambda_U.
        ramp: share of the steps over which it rises to that.
    """
    with torch.no_grad():
        first, second = _wide(network(torch.cat(batch.views))).softmax(dim=1).chunk(2)
        sharp = ((first + second) / 2).square()  # to the power of 1 / T, T = 0.5
        guess = sharp / sharp.sum(dim=1, keepdim=True)
    images = torch.cat([batch.images, *batch.views])
    truth = F.one_hot(batch.labels, guess.shape[1]).to(guess)
    targets = torch.cat([truth, guess, guess])

    order = torch.from_numpy(batch.noise.permutation(len(images))).to(images.device)
    share = batch.noise.beta(0.75, 0.75, len(images))
    keep = torch.from_numpy(np.maximum(share, 1 - share)).to(targets)
    here = keep.to(images)[:, None, None, None]
    images = here * images + (1 - here) * images[order]
    targets = keep[:, None] * targets + (1 - keep[:, None]) * targets[order]

    logits = _wide(network(images))
    count = len(batch.labels)
    labelled = F.cross_entropy(logits[:count], targets[:count], reduction="none")
    unlabelled = (logits[count:].softmax(dim=1) - targets[count:]).square().mean()
    risen = weight * min(1.0, batch.progress / ramp)
    guesses = guess.argmax(dim=1)
    loss = (batch.weights * labelled).mean() + risen * unlabelled
    return SemiLoss(loss, logits[:count], guesses, torch.ones_like(guesses, dtype=torch.bool))


def pseudo(network: Network, batch: SemiBatch) -> SemiLoss:
    """Return the loss of pseudo-labels (Lee 2013, eq. 15 and 16).

    The network's own guess is what it is trained on; the weight of that rises from 0 at a tenth of
    the steps to 3 at six tenths.
    """
    (weak,) = batch.views
    logits = _wide(network(torch.cat([batch.images, weak])))
    labelled, unlabelled = torch.split(logits, [len(batch.labels), len(weak)])
    guesses = unlabelled.detach().argmax(dim=1)
    risen = 3 * min(1.0, max(0.0, (batch.progress - 0.1) / 0.5))
    loss = _supervised(labelled, batch) + risen * F.cross_entropy(unlabelled, guesses)
    return SemiLoss(loss, labelled, guesses, torch.ones_like(guesses, dtype=torch.bool))


def _supervised(logits: torch.Tensor, batch: SemiBatch) -> torch.Tensor:
    return (batch.weights * F.cross_entropy(logits, batch.labels, reduction="none")).mean()


def _wide(logits: torch.Tensor) -> torch.Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


@dataclass
class Unlabelled:
    """The stream of images without labels, and what became of them.

    Attributes:
        set: where they come from. Its own labels, where it has any, only tell how many guesses
            are right.
        classes: that the network tells apart.
        batch: images a step over all ranks.
        seed: of the run.
        config: how they are used.
        looks: rows of coverage and precision so far.

    Raises:
        UsageError: there are fewer than a step takes.
    """

    set: ShardSet
    classes: list[str]
    batch: int
    seed: int
    config: SemiConfig
    preprocessing: Preprocessing
    world: World
    looks: list[dict[str, Any]] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.batch > len(self.set):
            raise UsageError(
                f"A step takes {self.batch} images without a label, and {self.set.root} has "
                f"{len(self.set)}: lower --ratio or --batch."
            )
        codes = Known(self.classes).codes(self.set.manifest.classes)
        packed = self.set.labels()
        known = np.append(np.asarray(codes, np.int64), -1)  # the last: for those without a label
        self._truth = known[packed]
        # Seen, taken, of known truth, right.
        device = self.preprocessing.settings.device
        self._counts = torch.zeros(4, dtype=torch.float64, device=device)

    def batches(self) -> Iterator[tuple[tuple[torch.Tensor, ...], Ids]]:
        """Yield this rank's views, each (n, 3, S, S) on the device, and ids, without end."""
        preprocessing, data = self.preprocessing, ConcatShardSets([self.set])
        plan = Plan(len(self.set), self.batch, self.seed ^ _APART)
        views = self.config.views(preprocessing.size)
        rank, ranks = self.world.rank, self.world.size
        loader = Loader(data, plan, views, rank=rank, ranks=ranks, **preprocessing.drawn)
        for batch in loader.batches():
            yield tuple(preprocessing.cast(view) for view in batch.views), batch.ids

    def losses(self, network: Network, crops: Crops, steps: int) -> Iterator[Step]:
        """Yield the loss of each step, with what it was taken of."""
        method = get_loss(self.config)
        for step, (here, there) in enumerate(zip(crops.batches(), self.batches(), strict=False)):
            images, labels, *weights = here
            views, ids = there
            number = step * self.world.size + self.world.rank
            batch = SemiBatch(
                images,
                labels,
                weights[0] if weights else torch.ones_like(labels, dtype=torch.float32),
                views,
                step / steps,
                np.random.Generator(philox(self.seed, Stream.NOISE, number)),
            )
            done = method(network, batch)
            self._count(done, ids, step + 1, steps)
            yield done.loss, done.logits, labels

    def describe(self) -> dict[str, Any]:
        """Return what a result says about them."""
        manifest = self.set.manifest
        about = {"path": str(self.set.root), "set_id": manifest.set_id, "samples": len(self.set)}
        return {"unlabelled": about, "pseudo_labels": self.looks}

    def _count(self, done: SemiLoss, ids: Ids, step: int, steps: int) -> None:
        """Count a step's guesses; all ranks together, at each tenth of the steps, keep a row."""
        truth = torch.from_numpy(self._truth[ids]).to(self._counts.device)
        told = done.taken & (truth >= 0)
        counts = [torch.ones_like(told), done.taken, told, told & (done.guesses == truth)]
        self._counts += torch.stack([c.sum() for c in counts])
        if step * _LOOKS // steps == (step - 1) * _LOOKS // steps:
            return
        seen, taken, known, right = self.world.mean_(self._counts).tolist()
        row = {"step": step, "coverage": taken / seen}
        if known:
            row["precision"] = right / known
        self.looks.append(row)
        self._counts.zero_()


class AveragedWeights:
    """A running mean of a network's weights and statistics, of a shorter memory while it is young.

    (`torch.optim.swa_utils.AveragedModel` counts its updates on the device and waits for it.)

    Args:
        network: before its training, which moves its tensors in place.
        ema: what the mean keeps of itself at an update, at the most.

    Attributes:
        network: with the mean.
    """

    def __init__(self, network: Encoder, ema: float) -> None:
        self.network = copy.deepcopy(network)
        self._ema, self._updates = ema, 0
        pairs = zip(self.network.state_dict().values(), network.state_dict().values(), strict=True)
        self._pairs = list(zip(*((m, n) for m, n in pairs if m.is_floating_point()), strict=True))

    def update(self) -> None:
        """Take the weights of a step in: all of them at the first one."""
        k = self._updates
        keep = min(self._ema, (1 + k) / (10 + k)) if k else 0.0
        mean, now = self._pairs
        torch._foreach_lerp_(mean, now, 1 - keep)
        self._updates += 1


def falling(step: int, steps: int) -> float:
    """Return what FixMatch multiplies its rate by (Sohn et al. 2020, section 2.4)."""
    return math.cos(7 * math.pi * step / (16 * steps))


def get_loss(config: SemiConfig) -> Callable[[Network, SemiBatch], SemiLoss]:
    """Return the loss of a method."""
    if config.method == "fixmatch":
        return lambda network, batch: fixmatch(network, batch, config.threshold)
    return {"mixmatch": mixmatch, "pseudo": pseudo}[config.method]
