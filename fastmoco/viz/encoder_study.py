"""What a frozen encoder makes of labelled images: neighbors, predictions, maps, a projection."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from fastmoco.core.rng import Ids, Permutation, Stream
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import Feature, Pair, Preprocessing
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.predictions import Predictions
from fastmoco.load.loader import evaluation_batches
from fastmoco.models.attention import AttentiveResNet
from fastmoco.models.encoder import Encoder
from fastmoco.plots import Images
from fastmoco.viz.views import to_pixels

_LAYERS = {"conv1": "conv1", **{f"layer{n}": f"stage {n}" for n in (1, 2, 3, 4)}}
_SHOWN_SIDE = 96  # pixels of an image on the page, at the most
_WITHOUT_MONITOR: tuple[int, float, Feature] = (200, 0.1, "backbone")
_PROJECTED = 2000  # points: more of them hide each other


@dataclass(frozen=True)
class Study:
    """Labelled samples and an encoder's features of them.

    Attributes:
        evaluation: encoder, preprocessing and the samples that are looked at.
        feature: which features: those of the run's monitor, else of the backbone.
        bank: the features of the training samples.
        queries: those of the test samples, with their labels.
    """

    evaluation: Evaluation
    feature: Feature
    bank: KNNClassifier
    queries: Pair

    @classmethod
    def of(cls, evaluation: Evaluation, samples: int) -> "Study":
        """Embed at most `samples` training and test samples each, chosen by the run's seed.

        Raises:
            DataError: an image cannot be read or decoded.
        """
        seed = evaluation.seed
        train, test = (subsample(one, samples, seed) for one in (evaluation.train, evaluation.test))
        evaluation = replace(evaluation, train=train, test=test)
        monitor = evaluation.recipe.monitor if evaluation.recipe else None
        k, t, feature = (monitor.k, monitor.t, monitor.feature) if monitor else _WITHOUT_MONITOR
        # More neighbors than a class has images cannot but vote for other classes.
        k = min(k, -(-len(train.ids) // evaluation.classes))
        bank = KNNClassifier(*evaluation.features(train, feature), evaluation.classes, k, t)
        return cls(evaluation, feature, bank, evaluation.features(test, feature))

    def predictions(self) -> Predictions:
        """Return what the neighbors of each test sample vote for."""
        return self.bank.predict(*self.queries)

    @property
    def classifier(self) -> str:
        """Who predicts, in words."""
        return (
            f"votes of the {self.bank.k} nearest neighbors ({self.feature} features, "
            f"T {self.bank.t:g}) among {len(self.evaluation.train.ids):,} training images"
        )

    def nearest(self, places: Ids, count: int) -> tuple[npt.NDArray[np.float32], Ids]:
        """Return (n, count) similarities to the test samples at `places`, and places in train."""
        similarity, rows = self.bank.nearest(self.queries[0][torch.from_numpy(places)], count)
        return similarity.cpu().numpy(), rows.cpu().numpy()

    def some(self, count: int) -> Ids:
        """Return the places of `count` test samples, drawn by the run's seed."""
        size = len(self.evaluation.test.ids)
        draw = Permutation(size, self.evaluation.seed, Stream.STUDY, 1)
        return draw(np.arange(min(count, size)))

    def pixels(self, one: Labelled, places: Ids) -> Images:
        """Return the samples at `places` as the encoder sees them, at most 96 pixels wide."""
        return shown(self.evaluation.preprocessing, one.data, one.ids[places])

    @torch.no_grad()
    def attention(self, places: Ids) -> list[torch.Tensor]:
        """Return what weights stages 2 and 3 of the test samples at `places`, (n, h, w) each.

        An encoder without attention has none.
        """
        backbone, preprocessing = self.evaluation.encoder.backbone, self.evaluation.preprocessing
        if not isinstance(backbone, AttentiveResNet):
            return []
        test = self.evaluation.test
        views = _views(preprocessing, test.data, test.ids[places], preprocessing.share)
        with preprocessing.autocast():
            return [maps.float().cpu() for maps in backbone.maps(preprocessing.cast(views))]


def most_confident(found: Predictions, right: bool, count: int) -> Ids:
    """Return the places of the surest right (or wrong) predictions, the surest first."""
    order = found.confidence.argsort(descending=True, stable=True)
    places: Ids = order[(found.place == 0)[order] == right][:count].numpy()
    return places


def subsample(one: Labelled, samples: int, seed: int) -> Labelled:
    """Return at most `samples` of the labelled samples, drawn by the seed, in id order."""
    if len(one.ids) <= samples:
        return one
    kept = np.sort(Permutation(len(one.ids), seed, Stream.STUDY)(np.arange(samples)))
    return one.take(kept)


def shown(preprocessing: Preprocessing, data: ConcatShardSets, ids: Ids) -> Images:
    """Return (n, side, side, 3) pixels of samples as an encoder sees them, side 96 at the most."""
    small = replace(preprocessing, size=min(preprocessing.size, _SHOWN_SIDE))
    return to_pixels(
        _views(small, data, ids, preprocessing.share), preprocessing.mean, preprocessing.std
    )


def _views(
    preprocessing: Preprocessing, data: ConcatShardSets, ids: Ids, share: float
) -> torch.Tensor:
    """Return (n, 3, size, size) normalized views."""
    batches = evaluation_batches(
        data, ids=ids, share=share, batch=min(len(ids), 128), **preprocessing.drawn
    )
    return torch.cat([batch.views[0].float() for batch in batches])


@torch.no_grad()
def feature_maps(
    encoder: Encoder, preprocessing: Preprocessing, data: ConcatShardSets, sample: int
) -> dict[str, torch.Tensor]:
    """Return the (C, h, w) fp32 outputs of the first convolution and of each stage, by name.

    Raises:
        DataError: the image cannot be read or decoded.
    """
    found: dict[str, torch.Tensor] = {}

    def keep(name: str, output: torch.Tensor) -> None:
        found[name] = output[0].float().cpu()

    hooks = [
        encoder.backbone.get_submodule(layer).register_forward_hook(
            lambda module, given, output, name=name: keep(name, output)
        )
        for layer, name in _layers(encoder.backbone).items()
    ]
    with preprocessing.autocast():
        encoder.backbone(
            preprocessing.cast(_views(preprocessing, data, np.array([sample]), preprocessing.share))
        )
    for hook in hooks:
        hook.remove()
    return found


def _layers(backbone: Any) -> dict[str, str]:
    """Return the first convolution and the stages: what each is called on the page, by its name."""
    stages = getattr(backbone, "feature_info", None)
    if stages is None:
        return _LAYERS
    # timm's networks say where their stages end.
    first = next(name for name, m in backbone.named_modules() if isinstance(m, nn.Conv2d))
    return {first: "conv1"} | {stage["module"]: stage["module"] for stage in stages}


def projected(
    features: torch.Tensor, labels: Ids, seed: int
) -> tuple[npt.NDArray[np.float64], Ids, str]:
    """Return (n, 2) places for features on a plane, their labels, and the method in words.

    t-SNE where scikit-learn is installed, else the two principal components.

    Args:
        features: (N, width) fp32; normalized here.
        labels: (N,) int64.
        seed: of the choice of samples and of t-SNE.
    """
    chosen = Permutation(len(features), seed, Stream.STUDY, 2)(
        np.arange(min(len(features), _PROJECTED))
    )
    some = features[torch.from_numpy(chosen)].cpu()
    rows = torch.nn.functional.normalize(some, dim=1).double().numpy()
    if find_spec("sklearn") and len(rows) > 10:
        return _tsne(rows, seed), labels[chosen], f"t-SNE of {len(rows):,} test images"
    return _principal(rows), labels[chosen], f"principal components of {len(rows):,} test images"


def _tsne(rows: npt.NDArray[np.float64], seed: int) -> npt.NDArray[np.float64]:
    from sklearn.manifold import TSNE
    from threadpoolctl import threadpool_limits

    perplexity = min(30.0, (len(rows) - 1) / 3)
    # Threads would add up in another order each time, and t-SNE makes much of a rounding error.
    with threadpool_limits(1):
        plane = TSNE(perplexity=perplexity, random_state=seed % 2**32).fit_transform(rows)
    found: npt.NDArray[np.float64] = plane.astype(np.float64)
    return found


def _principal(rows: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    centerd = rows - rows.mean(axis=0)
    _, _, axes = np.linalg.svd(centerd, full_matrices=False)
    plane = np.zeros((len(rows), 2))
    plane[:, : min(2, len(axes))] = centerd @ axes[:2].T
    return plane


def most_confused(confused: Ids, names: Sequence[str], count: int) -> list[tuple[str, str, int]]:
    """Return the most frequent errors: true class, predicted class, how often.

    Args:
        confused: see `Predictions.confused`.
        names: of the classes.
        count: of errors.
    """
    errors = confused[confused[:, 0] != confused[:, 1]]
    order = np.argsort(-errors[:, 2], kind="stable")[:count]
    return [(names[a], names[b], times) for a, b, times in errors[order].tolist()]
