"""From a run folder to a number: opens what an evaluation needs, and writes down what it found."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.dataset.labels import Labelled, labelled_pair
from fastmoco.errors import UsageError
from fastmoco.evaluate.features import (
    Feature,
    Pair,
    Preprocessing,
    embed_labelled,
    frozen_preprocessing,
)
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.predictions import Predictions
from fastmoco.evaluate.probe import (
    Heads,
    ProbeConfig,
    judge,
    record,
    scores,
    train_cached,
    train_heads,
)
from fastmoco.evaluate.results import append
from fastmoco.evaluate.sanity import cautions
from fastmoco.load.executor import get_settings
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

        Raises:
            UsageError: no run there, or no sets named.
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
        preprocessing = frozen_preprocessing(spec, runtime, get_settings(runtime, world, where))
        preprocessing = replace(preprocessing, precision=precision or preprocessing.precision)
        pair = labelled_pair(train, test, labels)
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
        """Classify the test set by its nearest neighbors in the training set, and record it."""
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
        with unchanged(self.encoder):
            test = self.features(self.test, "backbone")
            if protocol.features == "cached":
                heads = self._train_cached(protocol, on_epoch)
            else:
                heads = self._train_augmented(protocol, on_epoch)
        found = [one.gathered(self.world) for one in judge(heads, *test)]
        result = record(scores(heads, found), protocol)
        result["protocol"]["precision"] = self.preprocessing.precision
        sound = (one for one in found if one.finite())
        return self.record(result, max(sound, key=lambda one: one.top(1)))

    def _train_cached(self, protocol: ProbeConfig, on_epoch: Callable[[int], None]) -> Heads:
        # Every rank trains the same heads on all features (10.5 GB for ImageNet and ResNet-50).
        # Shared out, each step would have to average gradients 40 times as large as its batch.
        features, labels = (
            self.world.gather_shares(rows, len(self.train.ids))
            for rows in self.features(self.train, "backbone")
        )
        return train_cached((features, labels), self.classes, protocol, on_epoch)

    def _train_augmented(self, protocol: ProbeConfig, on_epoch: Callable[[int], None]) -> Heads:
        heads = Heads(self.encoder.features, self.classes, protocol.lrs)
        heads.to(self.preprocessing.settings.device)
        crops = self._crops(protocol)
        epochs = self._augmented_epochs(crops, protocol.epochs)
        per_epoch = crops.plan.steps_per_epoch
        train_heads(heads, epochs, per_epoch, protocol, on_epoch, self.world)
        return heads

    def _crops(self, protocol: ProbeConfig) -> Crops:
        return Crops(
            self.train,
            self.train.ids,
            protocol.batch,
            protocol.seed,
            self.preprocessing,
            self.world,
        )

    def _augmented_epochs(self, crops: Crops, epochs: int) -> Iterator[Iterator[Pair]]:
        """Yield the epochs of features of freshly cropped and flipped images."""
        pairs = ((self._backbone(images), labels) for images, labels in crops.batches())
        for _ in range(epochs):
            yield islice(pairs, crops.plan.steps_per_epoch)

    @torch.no_grad()
    def _backbone(self, images: torch.Tensor) -> torch.Tensor:
        with self.preprocessing.autocast():
            features: torch.Tensor = self.encoder.backbone(images)
        return features.float()

    def record(self, result: dict[str, Any], found: Predictions) -> dict[str, Any]:
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
            return append(self.run, result, found, self.test)
        except (OSError, MemoryError, UsageError) as error:
            reason = getattr(error, "strerror", None) or str(error) or "out of memory"
            return result | {"unrecorded": f"{self.run.root} cannot be written ({reason})"}


def _described(one: Labelled) -> dict[str, Any]:
    """Return what a number says about the samples that it was measured on."""
    about = {"path": str(one.set.root), "set_id": one.set.manifest.set_id, "samples": len(one.ids)}
    return about | ({"labels": one.table} if one.table else {})
