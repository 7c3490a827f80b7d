"""Fine-tuning: backbone and a new linear classifier trained end to end, or the same from scratch.

The protocol of semi-supervised evaluation where only a fraction of the labels is used (Chen et al.
2020, "A Simple Framework ...", section 4.1), of transfer where the set is another one, and of the
supervised baseline where the weights are random.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from fastmoco.core.files import make_parent, new_folder, write_json
from fastmoco.core.malloc import keep_freed_memory
from fastmoco.core.rng import Permutation, Stream, stratified
from fastmoco.core.schedules import cosine
from fastmoco.dataset.labels import Labelled
from fastmoco.errors import DivergedError, UsageError
from fastmoco.evaluate.choosing import Choose, HeldOut, choose_rate
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import Preprocessing, embed_labelled
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.predictions import Predictions
from fastmoco.load.loader import Triple
from fastmoco.models.encoder import Encoder, saved
from fastmoco.runs.load_encoder import check_finite

Normalize = Literal["run", "imagenet", "set"]

_EPOCHS, _LEAST_STEPS = 30, 1000
_CHECKED = 100  # steps between looks at whether the weights are finite, which wait for the device
_ROWS, _TESTED = 20, 2000  # of the curve, and images that each is tested on at the most
_HEAD = 5  # times the backbone's rate: with 10, features of norm 17 made the first steps explode
_IMAGENET: tuple[Triple, Triple] = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class FinetuneConfig:
    """How a network is trained on labels.

    Attributes:
        fraction: of the labels of each class, 0..1; at least one of each.
        from_scratch: random weights, the supervised baseline, instead of the run's.
        epochs: over the chosen images.
        steps: instead of epochs; neither: 30 epochs, and at least 1000 steps.
        lr: of the backbone; falls by a cosine. None: 0.02, and 0.1 from scratch, for 256 images a
            step, scaled to `batch` (Goyal et al. 2017).
        lrs: candidates for `lr`; the one that is chosen is trained again on all labels.
        choose: by what, see `HeldOut`; "test": by test accuracy.
        head_lr: of the classifier. None: five times `lr`, and `lr` from scratch.
        batch: images a step over all ranks; BatchNorm averages over those of one rank.
        weight_decay: of all weights.
        seed: of the choice of labels, the order, the crops and the random weights.
        normalize: by the mean and deviation of the run, of ImageNet or of the training set.
        size: side of the images, pixels; small ones are enlarged. None: the run's.
        even: every class is shown equally often, in as many steps.
    """

    fraction: float = 1.0
    from_scratch: bool = False
    epochs: int | None = None
    steps: int | None = None
    lr: float | None = None
    head_lr: float | None = None
    lrs: tuple[float, ...] = ()
    choose: Choose = "holdout"
    batch: int = 256
    weight_decay: float = 1e-4
    seed: int = 0
    normalize: Normalize = "run"
    size: int | None = None
    even: bool = False

    def resolved(self, images: int, size: int) -> "FinetuneConfig":
        """Return the protocol with nothing left open.

        Args:
            images: with a label.
            size: of the run.
        """
        batch = min(self.batch, images)
        lr, times = (0.1, 1) if self.from_scratch else (0.02, _HEAD)
        lr = lr * batch / 256 if self.lr is None else self.lr
        head_lr = times * lr if self.head_lr is None else self.head_lr
        return replace(
            self,
            batch=batch,
            steps=self._steps(images // batch),
            lr=lr,
            head_lr=head_lr,
            size=self.size or size,
        )

    def _steps(self, per_epoch: int) -> int:
        if self.steps or self.epochs:
            return self.steps or (self.epochs or 0) * per_epoch
        return max(_EPOCHS * per_epoch, _LEAST_STEPS)


def finetune(
    evaluation: Evaluation,
    tuning: FinetuneConfig,
    on_step: Callable[[int, int], None] = lambda done, steps: None,
    save: Path | None = None,
) -> dict[str, Any]:
    """Train a run's backbone with a new classifier on labels, test it, and record the accuracy.

    Args:
        evaluation: the run and the labelled sets.
        tuning: how.
        on_step: called with the steps done and their number.
        save: a new folder for the weights.

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
        chosen = _choose(evaluation, train, tuning, on_step)
        tuning = replace(tuning, lr=chosen["lr"])
    trial = Trial.of(evaluation, train, tuning)
    curve: list[dict[str, Any]] = []
    network = trial.train(on_step, curve)
    found = trial.test(network, evaluation.test)
    counts = np.bincount(train.labels, minlength=evaluation.classes)
    row = _row(trial, dict(zip(train.classes, counts.tolist(), strict=True)))
    if chosen:
        row["chosen"] = chosen
    recorded = evaluation.record(row, found, curve)  # first: the number is what the time went into
    if save and world.is_main:
        try:
            _save(save, network, evaluation, trial.preprocessing)
        except OSError as error:
            recorded["unrecorded"] = f"{save} cannot be written ({error.strerror})"
    return recorded


def _choose(
    evaluation: Evaluation,
    train: Labelled,
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
            trial = Trial.of(evaluation, shown, replace(tuning, lr=lr))
            try:
                found = trial.test(trial.train(on_step), asked)
                right += float((found.place == 0).sum())
            except DivergedError:
                right = math.nan
        top1.append(100 * right / images)
    return choose_rate(tuning.lrs, top1, by, images)


@dataclass(frozen=True)
class Trial:
    """One training.

    Attributes:
        evaluation: the run and the test set.
        labelled: what it is trained on.
        protocol: how, with nothing left open.
        preprocessing: how images are shown.
    """

    evaluation: Evaluation
    labelled: Labelled
    protocol: FinetuneConfig
    preprocessing: Preprocessing

    @classmethod
    def of(cls, evaluation: Evaluation, labelled: Labelled, tuning: FinetuneConfig) -> "Trial":
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
        return cls(evaluation, labelled, protocol, _sight(evaluation, protocol))

    def train(
        self, on_step: Callable[[int, int], None], curve: list[dict[str, Any]] | None = None
    ) -> Encoder:
        """Return a trained network; add the rows of its curve, if there is a list for them."""
        crops = Crops(
            self.labelled,
            self.labelled.relative_weights(),
            self.protocol.batch,
            self.protocol.seed,
            self.preprocessing,
            self.evaluation.world,
            self.protocol.even,
        )
        network = _network(self.evaluation, self.protocol)

        def on_row(row: dict[str, float | None]) -> None:
            if curve is None:
                return
            some = self.evaluation.test
            if len(some.ids) > _TESTED:
                order = Permutation(len(some.ids), self.protocol.seed, Stream.STUDY)
                some = some.take(np.sort(order(np.arange(_TESTED))))
            found = self.test(network, some)
            network.train()
            curve.append(row | {"test_top1": found.top(1), "test_images": len(some.ids)})

        _train(network, crops, self.protocol, on_step, on_row)
        return network

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
        "set": (_triple(about.mean), _triple(about.std)),
    }[protocol.normalize]
    return replace(preprocessing, size=protocol.size, mean=mean, std=std)


def _triple(values: Sequence[float]) -> Triple:
    red, green, blue = values
    return red, green, blue


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
    protocol: FinetuneConfig,
    on_step: Callable[[int, int], None],
    on_row: Callable[[dict[str, float | None]], None],
) -> None:
    """Train in place; the running statistics of BatchNorm end as the mean over the ranks."""
    assert protocol.steps and protocol.lr and protocol.head_lr, "the protocol is not resolved"
    keep_freed_memory(crops.preprocessing.settings.device)
    groups = [(network.backbone, protocol.lr), (network.head, protocol.head_lr)]
    optimizer = torch.optim.SGD(
        [{"params": part.parameters(), "lr": lr} for part, lr in groups],
        momentum=0.9,
        weight_decay=protocol.weight_decay,
        fused=True,
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: cosine(step, protocol.steps or 1)
    )
    module = crops.world.wrap(network.train())
    sums, begun = torch.zeros(2, device=crops.preprocessing.settings.device), 0
    for done, (images, labels, *weights) in enumerate(islice(crops.batches(), protocol.steps), 1):
        with crops.preprocessing.autocast():
            logits = module(images)
        optimizer.zero_grad()
        loss = _loss(logits.float(), labels, *weights)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        schedule.step()
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
    for statistic in network.buffers():
        if statistic.is_floating_point():
            crops.world.mean_(statistic)


def _loss(
    logits: torch.Tensor, labels: torch.Tensor, weights: torch.Tensor | None = None
) -> torch.Tensor:
    if weights is None:
        return nn.functional.cross_entropy(logits, labels)
    return (nn.functional.cross_entropy(logits, labels, reduction="none") * weights).mean()


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
