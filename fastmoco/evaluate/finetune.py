"""Fine-tuning: backbone and a new linear classifier trained end to end, or the same from scratch.

The protocol of semi-supervised evaluation where only a fraction of the labels is used (Chen et al.
2020, "A Simple Framework ...", section 4.1), of transfer where the set is another one, and of the
supervised baseline where the weights are random.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from fastmoco.config.encoder import PerChannel
from fastmoco.core.files import make_parent, new_folder, write_json
from fastmoco.core.malloc import keep_freed_memory
from fastmoco.core.rng import Permutation, Stream, stratified
from fastmoco.core.schedules import cosine
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DivergedError, UsageError
from fastmoco.evaluate.choosing import HeldOut, choose_rate
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import Preprocessing, embed_labelled
from fastmoco.evaluate.finetune_config import FinetuneConfig
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.noise import noisy
from fastmoco.evaluate.predictions import Predictions
from fastmoco.evaluate.semi import AveragedWeights, Network, Step, Unlabelled, falling
from fastmoco.load.loader import check_channels
from fastmoco.models.encoder import Encoder, saved
from fastmoco.runs.load_encoder import check_finite

_CHECKED = 100  # steps between looks at whether the weights are finite, which wait for the device
_ROWS, _TESTED = 20, 2000  # of the curve, and images that each is tested on at the most
_IMAGENET: tuple[PerChannel, PerChannel] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


def finetune(
    evaluation: Evaluation,
    tuning: FinetuneConfig,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    save: Path | None = None,
    unlabelled: ShardSet | None = None,
) -> dict[str, Any]:
    """Train a run's backbone with a new classifier on labels, test it, and record the accuracy.

    With images without labels, the running mean of the weights is what is tested and saved.

    Args:
        evaluation: the run and the labelled sets.
        tuning: how.
        on_step: called with the steps done and their number.
        save: a new folder for the weights.
        unlabelled: a set, for `tuning.semi`.

    Raises:
        UsageError: `save` exists, or the ranks cannot share a batch evenly.
        DivergedError: a weight, or a logit of the test set, is not a finite number.
    """
    if save and save.exists():
        raise UsageError(f"{save} exists: choose another folder by --save.")
    if save:
        make_parent(save)
    labelled, world = evaluation.train, evaluation.world
    train = labelled.take(
        stratified(labelled.labels.astype(np.int32), tuning.fraction, tuning.seed)
    )
    chosen = None
    if len(tuning.lrs) > 1:
        chosen = _choose(evaluation, train, unlabelled, tuning, on_step)
        tuning = replace(tuning, lr=chosen["lr"])
    trial = Trial.of(evaluation, train, unlabelled, tuning)
    curve: list[dict[str, Any]] = []
    trained = trial.train(on_step, curve)
    found = trial.test(trained.network, evaluation.test)
    counts = np.bincount(train.labels, minlength=evaluation.classes)
    row = _row(trial, dict(zip(train.classes, counts.tolist(), strict=True)))
    if chosen:
        row["chosen"] = chosen
    if trained.unlabelled:
        row |= trained.unlabelled.describe()
        row["last_weights"] = trial.test(trained.last, evaluation.test).summary()
    recorded = evaluation.record(row, found, curve)  # first: the number is what the time went into
    if save and world.is_main:
        try:
            _save(save, trained.network, evaluation, trial.preprocessing)
        except OSError as error:
            recorded["unrecorded"] = f"{save} cannot be written ({error.strerror})"
    return recorded


def _choose(
    evaluation: Evaluation,
    train: Labelled,
    unlabelled: ShardSet | None,
    tuning: FinetuneConfig,
    on_step: Callable[[int, int], None],
) -> dict[str, Any]:
    """Choose the rate by trainings that leave samples out, or by the test set if that is asked."""
    by, parts = "test", [(train, evaluation.test)]
    if tuning.choose == "holdout":
        held = HeldOut.of(train, tuning.seed)
        folds = [held.folds == fold for fold in range(held.count)]
        by = held.how
        parts = [
            (train.take(np.flatnonzero(~out)), train.take(np.flatnonzero(out))) for out in folds
        ]
    images, top1 = sum(len(asked.ids) for _, asked in parts), []
    for lr in tuning.lrs:
        right = 0.0
        for shown, asked in parts:
            trial = Trial.of(evaluation, shown, unlabelled, replace(tuning, lr=lr))
            try:
                found = trial.test(trial.train(on_step).network, asked)
                right += float((found.place == 0).sum())
            except DivergedError:
                right = math.nan
        top1.append(100 * right / images)
    return choose_rate(tuning.lrs, top1, by, images)


@dataclass(frozen=True)
class Trained:
    """What a training leaves.

    Attributes:
        network: to be tested: of the mean of the weights, where there are images without labels.
        last: of the last weights.
        unlabelled: what became of those images.
    """

    network: Encoder
    last: Encoder
    unlabelled: Unlabelled | None


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        evaluation: the run and the test set.
        labelled: what it is trained on.
        unlabelled: beside it.
        protocol: how, with nothing left open.
        preprocessing: how images are shown.
    """

    evaluation: Evaluation
    labelled: Labelled
    unlabelled: ShardSet | None
    protocol: FinetuneConfig
    preprocessing: Preprocessing

    @classmethod
    def of(
        cls,
        evaluation: Evaluation,
        labelled: Labelled,
        unlabelled: ShardSet | None,
        tuning: FinetuneConfig,
    ) -> "Trial":
        """Settle what the protocol leaves open.

        Raises:
            UsageError: the ranks would share too few images.
        """
        protocol = tuning.resolved(len(labelled.ids), evaluation.preprocessing.size)
        if protocol.batch < 2 * evaluation.world.size:
            raise UsageError(
                f"{protocol.batch} images on {evaluation.world.size} processes leave BatchNorm "
                "nothing to average: start fewer, or use more labels."
            )
        return cls(evaluation, labelled, unlabelled, protocol, _sight(evaluation, protocol))

    def train(
        self, on_step: Callable[[int, int], None], curve: list[dict[str, Any]] | None = None
    ) -> Trained:
        """Return a trained network; add the rows of its curve, if there is a list for them."""
        protocol, world, semi = self.protocol, self.evaluation.world, self.protocol.semi
        crops = Crops(
            self.labelled,
            self.labelled.relative_weights(),
            protocol.batch,
            protocol.seed,
            self.preprocessing,
            world,
            protocol.even,
            protocol.view(self.preprocessing.size),
            protocol.noise,
        )
        more = None
        if semi and self.unlabelled:
            more = Unlabelled(
                self.unlabelled,
                self.labelled.classes,
                protocol.batch * semi.ratio,
                protocol.seed,
                semi,
                self.preprocessing,
                world,
            )
        network = _network(self.evaluation, self.protocol)

        def on_row(row: dict[str, float | None]) -> None:
            if curve is None:
                return
            some = self.evaluation.test
            if len(some.ids) > _TESTED:
                order = Permutation(len(some.ids), self.protocol.seed, Stream.STUDY)
                some = some.take(np.sort(order(np.arange(_TESTED))))
            try:
                top1: float | None = self.test(network, some).top(1)
            except DivergedError:  # the weights may be finite still; the next look tells
                top1 = None
            network.train()
            curve.append(row | {"test_top1": top1, "test_images": len(some.ids)})

        noise = noisy(network, protocol.seed ^ world.rank) if protocol.noise else nullcontext()
        with noise:
            tested = _train(network, crops, more, protocol, on_step, on_row)
        return Trained(tested, network, more)

    def test(self, network: Encoder, asked: Labelled) -> Predictions:
        """Return what a network says of labelled samples, on all ranks."""
        world = self.evaluation.world
        logits, labels = embed_labelled(network.eval(), asked, "head", self.preprocessing, world)
        return Predictions.of_logits(logits, labels).gathered(world)


def _sight(evaluation: Evaluation, protocol: FinetuneConfig) -> Preprocessing:
    assert protocol.size, "the protocol is not resolved"
    preprocessing, about = evaluation.preprocessing, evaluation.train.set.manifest
    mean, std = {
        "run": (preprocessing.mean, preprocessing.std),
        "imagenet": _IMAGENET,
        "set": (tuple(about.mean), tuple(about.std)),
    }[protocol.normalize]
    if len(mean) != evaluation.spec.channels:
        check_channels([evaluation.train.set], evaluation.spec.channels)
        raise UsageError("ImageNet's normalization is of three channels: choose --normalize run.")
    return replace(preprocessing, size=protocol.size, mean=mean, std=std)


def _network(evaluation: Evaluation, protocol: FinetuneConfig) -> Encoder:
    """Return backbone and classifier on the device: an encoder whose head gives the logits."""
    spec = evaluation.spec.model_copy(update={"head": "linear", "dim": evaluation.classes})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(protocol.seed)
        network = Encoder(spec)
        weight, bias = network.head.parameters()
        nn.init.normal_(weight, std=0.01)
        nn.init.zeros_(bias)
    if not protocol.from_scratch:
        network.backbone.load_state_dict(evaluation.encoder.backbone.state_dict())
    return network.to(evaluation.preprocessing.settings.device)


def _train(
    network: Encoder,
    crops: Crops,
    unlabelled: Unlabelled | None,
    protocol: FinetuneConfig,
    on_step: Callable[[int, int], None],
    on_row: Callable[[dict[str, float | None]], None],
) -> Encoder:
    """Train in place, and return what is to be tested: the same, or of the mean of its weights.

    The running statistics of BatchNorm end as the mean over the ranks.
    """
    assert protocol.steps, "the protocol is not resolved"
    keep_freed_memory(crops.preprocessing.settings.device)
    optimizer, semi = _optimizer(network, protocol), protocol.semi
    factor = falling if semi else cosine
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: factor(step, protocol.steps or 1)
    )
    mean = AveragedWeights(network.train(), semi.ema) if semi else None
    module = crops.world.wrap(network.train())

    def forward(images: torch.Tensor) -> torch.Tensor:
        with crops.preprocessing.autocast():
            logits: torch.Tensor = module(images)
        return logits.float()

    losses = _losses(forward, crops)
    if unlabelled:
        losses = unlabelled.losses(forward, crops, protocol.steps)
    sums, begun = torch.zeros(2, device=crops.preprocessing.settings.device), 0
    for done, (loss, logits, labels) in enumerate(islice(losses, protocol.steps), 1):
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
        if mean:
            mean.update()
        on_step(done, protocol.steps)
        right = (logits.detach().argmax(dim=1) == labels).float().mean()
        sums += torch.stack([loss.detach(), 100 * right])
        row = _ROWS * done // protocol.steps > _ROWS * (done - 1) // protocol.steps
        if row or done % _CHECKED == 0:
            check_finite(dict(network.named_parameters()), f"the network of step {done}")
        if row:  # the last step has one
            means = (crops.world.mean_(sums) / (done - begun)).tolist()
            finite = [x if math.isfinite(x) else None for x in means]
            on_row({"step": done, "loss": finite[0], "train_top1": finite[1]})
            begun = done
            sums.zero_()
    tested = mean.network if mean else network
    for one in {network, tested}:
        for statistic in one.buffers():
            if statistic.is_floating_point():
                crops.world.mean_(statistic)
    return tested


def _optimizer(network: Encoder, protocol: FinetuneConfig) -> torch.optim.SGD:
    """Return SGD at two rates; with images without labels, as FixMatch's (its section 2.4)."""
    assert protocol.lr and protocol.head_lr, "the protocol is not resolved"
    semi, groups = protocol.semi is not None, []
    for part, lr in ((network.backbone, protocol.lr), (network.head, protocol.head_lr)):
        for vectors in (False, True):
            chosen = [p for p in part.parameters() if (p.ndim == 1) is vectors]
            decay = 0.0 if semi and vectors else protocol.weight_decay
            groups.append({"params": chosen, "lr": lr, "weight_decay": decay})
    return torch.optim.SGD(groups, momentum=0.9, nesterov=semi, fused=True)


def _losses(forward: Network, crops: Crops) -> Iterator[Step]:
    """Yield the loss of each step on labels alone, with what it was taken of."""
    for images, labels, *weights in crops.batches():
        logits = forward(images)
        if weights:
            loss = (F.cross_entropy(logits, labels, reduction="none") * weights[0]).mean()
        else:
            loss = F.cross_entropy(logits, labels)
        yield loss, logits, labels


def _row(trial: Trial, counts: dict[str, int]) -> dict[str, Any]:
    """Return the result's row before its numbers: the whole protocol and what it cost."""
    protocol, preprocessing = trial.protocol, trial.preprocessing
    images = sum(counts.values())
    seen = (protocol.steps or 0) * protocol.batch
    return {
        "kind": "finetune",
        "protocol": {
            **asdict(protocol),
            "epochs": seen / images,
            "optimizer": "sgd 0.9",
            "schedule": "cosine",
            "precision": preprocessing.precision,
            "mean": preprocessing.mean,
            "std": preprocessing.std,
            "bn_batch": protocol.batch // trial.evaluation.world.size,
        },
        "budget": {"steps": protocol.steps, "images_seen": seen},
        "labels": {"images": images, "per_class": counts},
    }


def _save(
    out: Path, network: Encoder, evaluation: Evaluation, preprocessing: Preprocessing
) -> None:
    """Write `weights.pt`, its spec, and the class of each logit."""
    images = {
        "image_size": preprocessing.size,
        "mean": preprocessing.mean,
        "std": preprocessing.std,
    }
    classes = evaluation.train.classes
    spec = evaluation.spec.model_copy(update={"head": "linear", "dim": len(classes), **images})
    with new_folder(out) as folder:
        (folder / "weights.pt").write_bytes(saved(network.cpu().state_dict(), spec))
        write_json(folder / "encoder.json", spec.model_dump(mode="json"))
        write_json(folder / "classes.json", classes)
