"""The linear probe: a linear classifier on frozen features, at several learning rates in one pass.

ProbeConfig of the MoCo paper (He et al. 2020, section 4.1): SGD, learning rate 30, momentum 0.9, no
weight decay, batch 256, 100 epochs, rate times 0.1 after 60 % and 80 % of them.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

import torch
from torch import nn

from fastmoco.core.distributed import World
from fastmoco.core.schedules import cosine
from fastmoco.errors import DivergedError
from fastmoco.evaluate.choosing import Choose
from fastmoco.evaluate.features import Pair, Samples
from fastmoco.evaluate.predictions import Predictions

_CHUNK = 1024  # samples scored at a time: their logits are of all heads and classes


@dataclass(frozen=True)
class ProbeConfig:
    """How the heads are trained.

    Attributes:
        epochs: of training; the milestones scale with them.
        lrs: one head each.
        batch: images a step over all ranks.
        seed: of the order.
        features: "cached" (one central view, embedded once) or "augmented" (crop and flip anew
            each epoch, as in the paper).
        schedule: "step" (the paper's) or "cosine", which falls each step.
        warmup: epochs of a linear rise before either.
        choose: the rate whose number counts, by labels held out of training or, as before, by
            the test set; of one rate there is nothing to choose.
    """

    epochs: int = 100
    lrs: tuple[float, ...] = (0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
    batch: int = 256
    seed: int = 0
    features: str = "augmented"
    schedule: Literal["step", "cosine"] = "step"
    warmup: float = 0.0
    choose: Choose = "holdout"

    def rate(self, step: int, per_epoch: int) -> float:
        """Return what the learning rates are multiplied by in a step, counted from 0."""
        rise = self.warmup * per_epoch
        if self.schedule == "cosine" or step < rise:
            return cosine(step, self.epochs * per_epoch, rise)
        epoch = step // per_epoch
        return 0.1 ** sum(epoch >= milestone * self.epochs for milestone in (0.6, 0.8))


@dataclass(frozen=True)
class Score:
    """Accuracy of one head on the test set, percent; NaN: it diverged."""

    lr: float
    top1: float
    top5: float


class Heads(nn.Module):
    """Linear classifiers with equal initial weights, one a learning rate.

    Args:
        features: width of the input.
        classes: number of labels.
        lrs: learning rates.
    """

    def __init__(self, features: int, classes: int, lrs: Sequence[float]) -> None:
        super().__init__()
        weight = torch.empty(classes, features)
        nn.init.normal_(weight, std=0.01, generator=torch.Generator().manual_seed(0))
        self.weight = nn.Parameter(weight.repeat(len(lrs), 1))
        self.bias = nn.Parameter(torch.zeros(classes * len(lrs)))
        self.rates = tuple(lrs)  # fp32 would turn 0.01 into 0.009999999776
        self.lrs: torch.Tensor
        self.register_buffer("lrs", torch.tensor(lrs))

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Return (n, heads, classes) logits of (n, features) fp32 features."""
        logits = nn.functional.linear(features, self.weight, self.bias)
        heads = len(self.rates)  # view(-1) could not tell the classes of no features
        return logits.view(len(features), heads, len(self.bias) // heads)

    def losses(
        self, logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Return the (heads,) cross-entropies.

        Args:
            logits: (n, heads, classes).
            labels: (n,) int64.
            weights: (n,) fp32, that the losses of the samples are multiplied by, or (n, m) for m
                groups of heads, one after the other; None: 1.
        """
        wanted = labels[:, None].expand(-1, len(self.lrs))
        each = nn.functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none")
        if weights is not None:
            each = (each.view(*weights.shape, -1) * weights[..., None]).flatten(1)
        return each.mean(dim=0)

    def group(self, number: int, size: int) -> "Heads":
        """Return `size` of the heads, copied: those from `number * size` on."""
        part = slice(number * size, (number + 1) * size)
        classes = len(self.bias) // len(self.rates)
        found = Heads(self.weight.shape[1], classes, self.rates[part]).to(self.weight)
        rows = slice(part.start * classes, part.stop * classes)
        with torch.no_grad():
            found.weight.copy_(self.weight[rows])
            found.bias.copy_(self.bias[rows])
        return found


def train_heads(
    heads: Heads,
    epochs: Iterable[Iterable[Samples]],
    per_epoch: int,
    protocol: ProbeConfig,
    on_epoch: Callable[[int], None] = lambda done: None,
    world: World = World(),
) -> torch.Tensor:
    """Train the heads in place.

    SGD without weight decay at rate 1, on the sum of the losses each times its learning rate, moves
    each head as its own rate would.

    Args:
        heads: to train.
        epochs: for each epoch its batches of (n, features) fp32 features.
        per_epoch: number of batches in each.
        protocol: see `ProbeConfig`.
        on_epoch: called with the epochs done.
        world: each has an equal share of every batch.

    Returns:
        (epochs, 2, heads) mean loss and share of right guesses of the training batches.
    """
    curve = torch.zeros(protocol.epochs, 2, len(heads.rates)).to(heads.lrs)
    optimizer = torch.optim.SGD(heads.parameters(), lr=1.0, momentum=0.9, fused=True)
    for epoch, batches in enumerate(epochs):
        for step, batch in enumerate(batches, epoch * per_epoch):
            optimizer.param_groups[0]["lr"] = protocol.rate(step, per_epoch)
            optimizer.zero_grad()
            features, labels, *weights = batch
            logits = heads(features)
            losses = heads.losses(logits, labels, *weights)
            (losses * heads.lrs).sum().backward()  # type: ignore[no-untyped-call]
            right = (logits.detach().argmax(dim=2) == labels[:, None]).to(losses.dtype)
            curve[epoch] += torch.stack([losses.detach(), right.mean(dim=0)]) / per_epoch
            for parameter in heads.parameters():
                if parameter.grad is not None:
                    world.mean_(parameter.grad)
            optimizer.step()
        on_epoch(epoch + 1)
    return world.mean_(curve)


def cached_epochs(samples: Samples, protocol: ProbeConfig) -> Iterator[Iterator[Samples]]:
    """Yield the epochs over features that were embedded once: all of them, in a new order each."""
    generator = torch.Generator().manual_seed(protocol.seed)
    for _ in range(protocol.epochs):
        order = torch.randperm(len(samples[0]), generator=generator).to(samples[0].device)
        yield (
            tuple(column[rows] for column in samples) for rows in torch.split(order, protocol.batch)
        )


@torch.no_grad()
def judge(heads: Heads, features: torch.Tensor, labels: torch.Tensor) -> list[Predictions]:
    """Return what each head says of (N, features) fp32 features with (N,) int64 labels."""
    parts: list[list[Predictions]] = [[] for _ in heads.rates]
    for some, wanted in zip(
        torch.split(features, _CHUNK), torch.split(labels, _CHUNK), strict=True
    ):
        for logits, own in zip(heads(some).unbind(dim=1), parts, strict=True):
            own.append(Predictions.of_logits(logits, wanted))
    return [Predictions.cat(own) for own in parts]


@torch.no_grad()
def count_right(heads: Heads, features: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
    """Return the (heads,) right guesses among (N, features) features with (N,) int64 labels."""
    found = torch.zeros(len(heads.rates), dtype=torch.int64, device=labels.device)
    for some, wanted in zip(
        torch.split(features, _CHUNK), torch.split(labels, _CHUNK), strict=True
    ):
        found += (heads(some).argmax(dim=2) == wanted[:, None]).sum(dim=0)
    return found


def scores(heads: Heads, found: Sequence[Predictions]) -> list[Score]:
    """Return each head's top-1 and top-5 accuracy."""
    pairs = zip(heads.rates, found, strict=True)
    return [
        Score(lr, one.top(1), one.top(5)) if one.finite() else Score(lr, math.nan, math.nan)
        for lr, one in pairs
    ]


def train_cached(
    train: Samples,
    classes: int,
    protocol: ProbeConfig,
    on_epoch: Callable[[int], None] = lambda done: None,
) -> Heads:
    """Return heads trained on cached features, on their device.

    Args:
        train: (N, features) fp32 features, labels and weights.
        classes: number of labels.
        protocol: see `ProbeConfig`.
        on_epoch: called with the epochs done.
    """
    heads = Heads(train[0].shape[1], classes, protocol.lrs).to(train[0].device)
    per_epoch = -(-len(train[0]) // protocol.batch)
    train_heads(heads, cached_epochs(train, protocol), per_epoch, protocol, on_epoch)
    return heads


def probe_cached(train: Samples, test: Pair, classes: int, protocol: ProbeConfig) -> list[Score]:
    """Train the heads on cached features and score them on those of a test set."""
    heads = train_cached(train, classes, protocol)
    return scores(heads, judge(heads, *test))


def held_out_top1(
    heads: Heads, rates: int, samples: Pair, folds: torch.Tensor, world: World = World()
) -> list[float]:
    """Return for each rate the top-1 of the samples by the heads that did not see them, percent.

    Args:
        heads: groups of `rates` heads; group 1 + f was trained without the samples of fold f.
        rates: their number.
        samples: (n, features) fp32 features and (n,) int64 labels, this rank's share.
        folds: (n,) int64; -1: seen by all.
        world: that shares the samples.

    Returns:
        NaN for a rate at which a head diverged.
    """
    right, total = torch.zeros(rates, dtype=torch.float64), 0
    for fold in range(len(heads.rates) // rates - 1):
        out = folds == fold
        total += int(out.sum())
        if out.any():
            found = judge(heads.group(1 + fold, rates), *(part[out] for part in samples))
            counts = [float((one.place == 0).sum()) if one.finite() else math.nan for one in found]
            right += torch.tensor(counts)
    parts = world.gather_object((right, total))
    share = sum(part for part, _ in parts) / sum(count for _, count in parts)
    return (100 * torch.as_tensor(share)).tolist()


def get_best(found: Sequence[Score]) -> Score:
    """Return the score with the highest top-1.

    Raises:
        DivergedError: every head diverged.
    """
    sound = [score for score in found if math.isfinite(score.top1)]
    if not sound:
        rates = ", ".join(f"{score.lr:g}" for score in found)
        raise DivergedError(f"The probe diverged at every learning rate ({rates}): lower --lr.")
    return max(sound, key=lambda score: score.top1)


def record(found: Sequence[Score], protocol: ProbeConfig) -> dict[str, Any]:
    """Return a result that cannot be taken for another: the numbers with their protocol."""
    return {
        "kind": "probe",
        "best": asdict(get_best(found)),
        "learning_rates": [
            asdict(score) if math.isfinite(score.top1) else {"lr": score.lr, "diverged": True}
            for score in found
        ],
        "protocol": asdict(protocol)
        | {"optimizer": "sgd 0.9", "weight_decay": 0.0, "best_by": "test"},
    }
