"""From a run folder to a number: opens what an evaluation needs, and writes down what it found."""

import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.config import Recipe, View
from fastmoco.distributed import Ranks, device_of
from fastmoco.errors import UsageError
from fastmoco.evaluate.embed import Feature, Sight, embed, sight_of
from fastmoco.evaluate.frozen import load_encoder, unchanged
from fastmoco.evaluate.knn import Neighbours
from fastmoco.evaluate.probe import (
    Heads,
    Pair,
    Protocol,
    Score,
    probe_cached,
    record,
    scores,
    train_heads,
)
from fastmoco.load.loader import Loader
from fastmoco.load.order import Chosen, Ids, Shuffled
from fastmoco.load.plan import Plan
from fastmoco.load.work import settings_of
from fastmoco.models.resnet import Encoder
from fastmoco.run import RunFolder
from fastmoco.shardset import Collection, Labelled, labelled_pair

# As in the paper's probe: RandomResizedCrop and flip, no colour change.
_PROBE_VIEW = View(scale=(0.08, 1.0), flip=0.5)


@dataclass(frozen=True)
class Evaluation:
    """A frozen encoder and the labelled sets that it is tried on.

    Attributes:
        run: where the encoder comes from and the numbers go to.
        recipe: of the run.
        encoder: the query encoder, frozen, in evaluation mode.
        step: of the checkpoint.
        sight: how images are shown.
        train, test: labelled samples with equal class lists.
    """

    run: RunFolder
    recipe: Recipe
    encoder: Encoder
    step: int
    sight: Sight
    train: Labelled
    test: Labelled

    @classmethod
    def open(
        cls,
        root: Path,
        train: Path | None = None,
        test: Path | None = None,
        device: str = "auto",
        labels: str | None = None,
    ) -> "Evaluation":
        """Open a run and two labelled sets, by default those of its monitor.

        Args:
            root: the run folder.
            train, test: the sets; None: those of the monitor.
            device: "auto", "cpu" or "cuda".
            labels: a side table of the training set, see `shardset.labelled_pair`; None: that of
                the monitor if both sets are the monitor's, else the packed labels.

        Raises:
            UsageError: no run there, or no sets named.
            CheckpointError: no checkpoint, or it does not fit the recipe.
            DataError: the sets do not fit together.
        """
        run = RunFolder(root)
        where = device_of(device, 0)
        encoder, recipe, step = load_encoder(run, where)
        if recipe.monitor:
            if train is None and test is None:
                labels = labels or recipe.monitor.labels
            train, test = train or recipe.monitor.bank, test or recipe.monitor.queries
        if not train or not test:
            raise UsageError("The run has no monitor: name labelled sets by --train and --test.")
        sight = sight_of(recipe, settings_of(recipe, Ranks(), where))
        return cls(run, recipe, encoder, step, sight, *labelled_pair(train, test, labels))

    @property
    def classes(self) -> int:
        """Number of classes."""
        return len(self.train.classes)

    def features(self, one: Labelled, feature: Feature) -> Pair:
        """Return the (n, width) fp32 features and (n,) int64 labels of the labelled samples."""
        data = Collection([one.set])
        found = embed(self.encoder, data, feature, self.sight, ids=one.ids)
        return found, torch.from_numpy(one.labels)

    def knn(self, feature: Feature, k: int, t: float) -> dict[str, Any]:
        """Classify the test set by its nearest neighbours in the training set, and record it."""
        bank = Neighbours(*self.features(self.train, feature), self.classes, k, t)
        top1 = bank.accuracy(*self.features(self.test, feature))
        protocol = {"feature": feature, "k": k, "t": t}
        return self._record({"kind": "knn", "top1": top1, "protocol": protocol})

    def probe(self, protocol: Protocol, on_epoch: Callable[[int], None]) -> dict[str, Any]:
        """Train linear classifiers on the frozen backbone, and record their scores.

        Args:
            protocol: how.
            on_epoch: called with the epochs done, for a progress bar.
        """
        with unchanged(self.encoder):
            test = self.features(self.test, "backbone")
            if protocol.features == "cached":
                train = self.features(self.train, "backbone")
                found = probe_cached(train, test, self.classes, protocol, on_epoch)
            else:
                found = self._probe_augmented(test, protocol, on_epoch)
        return self._record(record(found, protocol))

    def _probe_augmented(
        self, test: Pair, protocol: Protocol, on_epoch: Callable[[int], None]
    ) -> list[Score]:
        heads = Heads(self.encoder.features, self.classes, protocol.lrs)
        heads.to(self.sight.settings.device)
        train_heads(heads, self._augmented_epochs(protocol), protocol, on_epoch)
        return scores(heads.cpu(), *test)

    def _augmented_epochs(self, protocol: Protocol) -> Iterator[Iterator[Pair]]:
        """Yield the epochs of features of freshly cropped and flipped images."""
        order = Chosen(self.train.ids, Shuffled(len(self.train.ids), protocol.seed))
        plan = Plan(len(order), min(protocol.batch, len(order)), protocol.seed, order)
        loader = Loader(
            Collection([self.train.set]),
            plan,
            [_PROBE_VIEW],
            size=self.sight.size,
            mean=self.sight.mean,
            std=self.sight.std,
            settings=self.sight.settings,
        )
        device = self.sight.settings.device
        pairs = (
            (self._backbone(batch.views[0]), self._labels_of(batch.ids).to(device))
            for batch in loader.batches()
        )
        for _ in range(protocol.epochs):
            yield islice(pairs, plan.steps_per_epoch)

    def _labels_of(self, ids: Ids) -> torch.Tensor:
        return torch.from_numpy(self.train.labels[np.searchsorted(self.train.ids, ids)])

    @torch.no_grad()
    def _backbone(self, images: torch.Tensor) -> torch.Tensor:
        with self.sight.autocast():
            features: torch.Tensor = self.encoder.backbone(self.sight.cast(images))
        return features.float()

    def _record(self, result: dict[str, Any]) -> dict[str, Any]:
        """Add what the number was measured on, and append it to the run's evaluations."""
        sets = {name: _described(one) for name, one in (("train", self.train), ("test", self.test))}
        result |= {"run": self.recipe.name, "step": self.step, "sets": sets}
        with (self.run.root / "evaluations.jsonl").open("a") as stream:
            stream.write(json.dumps(result) + "\n")
        return result


def _described(one: Labelled) -> dict[str, Any]:
    """Return what a number says about the samples that it was measured on."""
    about = {"path": str(one.set.root), "set_id": one.set.manifest.set_id, "samples": len(one.ids)}
    return about | ({"labels": one.table} if one.table else {})
