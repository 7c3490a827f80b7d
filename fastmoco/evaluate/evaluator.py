"""From a run folder to a number: opens what an evaluation needs, and writes down what it found."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.dataset.labels import Labelled, Weights, labelled_pair
from fastmoco.errors import UsageError
from fastmoco.evaluate.choosing import HeldOut, choose_rate
from fastmoco.evaluate.features import (
    Feature,
    Pair,
    Preprocessing,
    Samples,
    embed_labelled,
    frozen_preprocessing,
)
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.predictions import Predictions
from fastmoco.evaluate.probe import (
    Heads,
    ProbeConfig,
    cached_epochs,
    count_right,
    held_out_top1,
    judge,
    record,
    scores,
    train_heads,
)
from fastmoco.evaluate.results import append
from fastmoco.evaluate.sanity import cautions
from fastmoco.models.encoder import Encoder
from fastmoco.runs.load_encoder import load_encoder, unchanged
from fastmoco.runs.run_folder import RunFolder


@dataclass(frozen=True)
class Evaluation:
    """A frozen encoder and the labelled sets that it is tried on.

    Attributes:
        run: where the encoder comes from and the numbers go to.
        spec: of the encoder.
        recipe: of the run; None: its weights were imported.
        encoder: the query encoder, frozen, in evaluation mode.
        step: of the checkpoint.
        preprocessing: how images are shown.
        train, test: labelled samples with equal class lists.
        world: the first one writes; all of them get every number.
        cautions: what makes the numbers say less than it seems, in words.
    """

    run: RunFolder
    spec: EncoderSpec
    recipe: Recipe | None
    encoder: Encoder
    step: int
    preprocessing: Preprocessing
    train: Labelled
    test: Labelled
    world: World = field(default_factory=World)
    cautions: tuple[str, ...] = ()

    @classmethod
    def open(
        cls,
        root: Path,
        train: Path | None = None,
        test: Path | None = None,
        device: str = "auto",
        labels: str | None = None,
        precision: str | None = None,
        world: World = World(),
        more: Sequence[Labelled] = (),
        per_class: int | None = None,
        seed: int = 0,
    ) -> "Evaluation":
        """Open a run and two labelled sets, by default those of its monitor.

        Args:
            root: the run folder.
            train, test: the sets; None: those of the monitor.
            device: "auto", "cpu" or "cuda".
            labels: a side table of the training set, see `labelled.labelled_pair`; None: that of
                the monitor if both sets are the monitor's, else the packed labels.
            precision: of the forward pass, "bf16" or "fp32"; None: see `frozen_preprocessing`.
            world: of this evaluation.
            more: labels that are added to the training set, see `dataset.labels.union`.
            per_class: so many labels of each class, drawn by the seed; None: all.
            seed: of that choice.

        Raises:
            UsageError: no run there, no sets named, or too few labels of a class.
            CheckpointError: no checkpoint, or it does not fit the recipe.
            DataError: the sets do not fit together.
        """
        run = RunFolder(root)
        where = get_device(device, world.local_rank)
        encoder, spec, step = load_encoder(run, where)
        recipe = run.recipe()
        if recipe and recipe.monitor:
            if train is None and test is None:
                labels = labels or recipe.monitor.labels
            train, test = train or recipe.monitor.bank, test or recipe.monitor.queries
        if not train or not test:
            raise UsageError(
                "The run has no monitor of labelled sets: name two by --train and --test."
            )
        runtime = run.runtime()
        preprocessing = frozen_preprocessing(spec, runtime, where, world)
        preprocessing = replace(preprocessing, precision=precision or preprocessing.precision)
        first, second = labelled_pair(train, test, labels, more)
        pair = first.draw(per_class, seed) if per_class else first, second
        told = tuple(cautions(*pair, None if run.imported else step))  # imported: no steps of ours
        return cls(run, spec, recipe, encoder, step, preprocessing, *pair, world, told)

    @property
    def seed(self) -> int:
        """Of the run."""
        return self.recipe.seed if self.recipe else 0

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    def features(self, one: Labelled, feature: Feature) -> Pair:
        """Return features and labels of this rank's share of the samples, on the device."""
        return embed_labelled(self.encoder, one, feature, self.preprocessing, self.world)

    def knn(self, feature: Feature, k: int, t: float) -> dict[str, Any]:
        """Classify the test set by its nearest neighbors in the training set, and record it.

        Each has one vote by its similarity: weights of labels do not count.
        """
        bank = KNNClassifier(*self.features(self.train, feature), self.classes, k, t, self.world)
        found = bank.predict(*self.features(self.test, feature))
        protocol = {"feature": feature, "k": k, "t": t, "precision": self.preprocessing.precision}
        return self.record({"kind": "knn", "protocol": protocol}, found)

    def probe(
        self, protocol: ProbeConfig, on_epoch: Callable[[int], None] = lambda done: None
    ) -> dict[str, Any]:
        """Train linear classifiers on the frozen backbone, and record their scores.

        Args:
            protocol: how.
            on_epoch: called with the epochs done, for a progress bar.

        Raises:
            UsageError: the ranks cannot share a batch evenly.
            DivergedError: of no learning rate the logits are finite numbers.
        """
        held, rates = None, len(protocol.lrs)
        if protocol.choose == "holdout" and rates > 1:
            held = HeldOut.of(self.train, protocol.seed)
        weights = held.weights(self.train) if held else self.train.relative_weights()
        lrs = protocol.lrs * (1 + held.count if held else 1)
        heads = Heads(self.encoder.features, self.classes, lrs)
        heads.to(self.preprocessing.settings.device)
        right = []
        with unchanged(self.encoder):
            test = self.features(self.test, "backbone")
            needed = held or protocol.features == "cached"
            train = self.features(self.train, "backbone") if needed else None

            def test_epoch(done: int) -> None:
                right.append(count_right(heads.group(0, rates), *test))
                on_epoch(done)

            epochs, per_epoch, world = self._epochs(protocol, weights, train)
            trained = train_heads(heads, epochs, per_epoch, protocol, test_epoch, world)
        curve = self._curve(trained[:, :, :rates], torch.stack(right))
        final = heads.group(0, rates)
        found = [one.gathered(self.world) for one in judge(final, *test)]
        result = record(scores(final, found), protocol)
        lr = result["best"]["lr"]
        if held and train:
            folds = torch.from_numpy(held.folds[self.world.share(len(held.folds))])
            top1 = held_out_top1(heads, rates, train, folds.to(train[1].device), self.world)
            sound = [t if one.finite() else math.nan for t, one in zip(top1, found, strict=True)]
            result["chosen"] = choose_rate(protocol.lrs, sound, held.how, held.images)
            lr = result["chosen"]["lr"]
        result["protocol"]["precision"] = self.preprocessing.precision
        return self.record(result, found[protocol.lrs.index(lr)], curve)

    def _curve(self, trained: torch.Tensor, right: torch.Tensor) -> list[dict[str, Any]]:
        """Return a row an epoch, with a number for each rate; None where it is not finite.

        Args:
            trained: (epochs, 2, rates) loss and share of right guesses in training.
            right: (epochs, rates) right guesses of this rank's share of the test set.
        """
        total = torch.stack(self.world.gather_object(right.cpu())).sum(dim=0)
        test = 100 * total.double() / len(self.test.ids)
        trained = trained.double().cpu() * torch.tensor([1.0, 100.0])[:, None]
        columns = {"loss": trained[:, 0], "train_top1": trained[:, 1], "test_top1": test}
        return [
            {"epoch": epoch + 1}
            | {
                name: [x if math.isfinite(x) else None for x in of[epoch].tolist()]
                for name, of in columns.items()
            }
            for epoch in range(len(test))
        ]

    def _epochs(
        self, protocol: ProbeConfig, weights: Weights | None, train: Pair | None
    ) -> tuple[Iterator[Iterator[Samples]], int, World]:
        """Return the epochs, the batches of each, and who shares a batch."""
        if protocol.features == "augmented":
            crops = self._crops(protocol, weights)
            epochs = self._augmented_epochs(crops, protocol.epochs)
            return epochs, crops.plan.steps_per_epoch, self.world
        # Every rank trains the same heads on all features (10.5 GB for ImageNet and ResNet-50).
        # Shared out, each step would have to average gradients 40 times as large as its batch.
        assert train
        samples = [self.world.gather_shares(rows, len(self.train.ids)) for rows in train]
        if weights is not None:
            samples.append(torch.from_numpy(weights).to(samples[0].device))
        per_epoch = -(-len(samples[0]) // protocol.batch)
        return cached_epochs(tuple(samples), protocol), per_epoch, World()

    def _crops(self, protocol: ProbeConfig, weights: Weights | None = None) -> Crops:
        return Crops(
            self.train,
            weights,
            protocol.batch,
            protocol.seed,
            self.preprocessing,
            self.world,
        )

    def _augmented_epochs(self, crops: Crops, epochs: int) -> Iterator[Iterator[Samples]]:
        """Yield the epochs of features of freshly cropped and flipped images."""
        samples = ((self._backbone(images), *rest) for images, *rest in crops.batches())
        for _ in range(epochs):
            yield islice(samples, crops.plan.steps_per_epoch)

    @torch.no_grad()
    def _backbone(self, images: torch.Tensor) -> torch.Tensor:
        with self.preprocessing.autocast():
            features: torch.Tensor = self.encoder.backbone(images)
        return features.float()

    def record(
        self, result: dict[str, Any], found: Predictions, curve: Sequence[dict[str, Any]] = ()
    ) -> dict[str, Any]:
        """Add what the numbers were measured on, and append them to the run's evaluations.

        Where these cannot be written, the number is returned all the same, and under `unrecorded`
        the reason.
        """
        sets = {name: _described(one) for name, one in (("train", self.train), ("test", self.test))}
        result |= {"run": self.run.name, "step": self.step, "sets": sets}
        result |= {"cautions": list(self.cautions)}
        result |= found.summary()
        if not self.world.is_main:
            return result
        try:
            return append(self.run, result, found, self.test, curve)
        except (OSError, MemoryError, UsageError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
            return result | {"unrecorded": f"{self.run.root} cannot be written ({reason})"}


def _described(one: Labelled) -> dict[str, Any]:
    """Return what a number says about the samples that it was measured on."""
    first, *more = (
        {"path": str(source.set.root), "set_id": source.set.manifest.set_id}
        | {"samples": source.samples}
        | ({"labels": source.table} if source.table else {})
        for source in one.sources
    )
    if not more and not one.drawn:
        return first
    return first | {"more": more, "total": len(one.ids), **one.drawn}
