"""`fastmoco pseudolabel`: labels that a classifier is sure of, for training without asking."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.core.distributed import get_device
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled, refuse_unfit
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate.features import Feature
from fastmoco.evaluate.sanity import tell_dropped
from fastmoco.label.classifier import Classifier, read_classifier
from fastmoco.label.head import Head, OutOfFold, Scores, sum_by_confidence
from fastmoco.label.pool import (
    PoolFeatures,
    ask_network,
    embed_pool,
    find_candidates,
    get_classifier,
)
from fastmoco.label.threshold import (
    Judged,
    agree,
    estimate_precision,
    require_threshold,
    take_surest,
    trace_precision,
)
from fastmoco.label.uncertainty import Beliefs, judge

_PRECISION = 0.95
_APART = 1 / 3  # of the share out of fold, by which that of the pool may differ


@dataclass(frozen=True)
class Options:
    """Which labels are trusted.

    Attributes:
        precision: the share of right ones that the threshold is chosen for; None: 0.95, unless
            there is a threshold.
        threshold: the least confidence, by hand.
        per_class: at most so many of each predicted class, the surest; None: all.
        agree: further runs that must say the same.
        by: what `finetune --save` wrote: its network labels, instead of a head.
        feature: of the backbone or of the head.
        features: of the pool by the first run, as `fastmoco embed` wrote them; None: computed.
        classifier: a file of the first run's, read if it is there, else written.
        seed: of the folds.
        device: "auto", "cpu" or "cuda".
    """

    precision: float | None = None
    threshold: float | None = None
    per_class: int | None = None
    agree: tuple[Path, ...] = ()
    by: Path | None = None
    feature: Feature = "backbone"
    features: Path | None = None
    classifier: Path | None = None
    seed: int = 0
    device: str = "auto"

    def wanted(self) -> float | None:
        """Return the precision that the threshold is chosen for; None: it is given.

        Raises:
            UsageError: both are.
        """
        beside = self.agree or self.features or self.classifier
        if self.by and (self.threshold is None or beside):
            raise UsageError(
                "A fine-tuned network has no out-of-fold predictions: --by needs --threshold, and "
                "goes without --precision, --agree, --features and --classifier."
            )
        if self.threshold is None:
            return _PRECISION if self.precision is None else self.precision
        if self.precision is not None:
            raise UsageError("--precision chooses the threshold: pass it or --threshold.")
        return None


@dataclass(frozen=True)
class Opinion:
    """What a classifier says.

    Attributes:
        run: the folder of its run, or of the fine-tuned network.
        step: of the run's checkpoint; None: a fine-tuned network.
        head: on the run's features; None: a fine-tuned network.
        held: what heads say of the labelled samples that they were not fitted on; None: too few.
        beliefs: of the head on the candidates.
    """

    run: Path
    step: int | None
    head: Head | None
    held: OutOfFold | None
    beliefs: Beliefs

    def describe(self) -> dict[str, Any]:
        """Return what is written down of it."""
        if self.head is None:
            return {"run": str(self.run)}
        numbers = {k: v for k, v in vars(self.head).items() if k not in ("weight", "bias")}
        return {"run": str(self.run), "step": self.step, **numbers, "bins": self._bins()}

    def _bins(self) -> dict[str, list[dict[str, float]]]:
        """Return confidence, accuracy and samples by equal bins, before and after calibration."""
        if self.held is None:
            return {}
        right = torch.from_numpy((self.held.predicted == self.held.labels).astype(np.float64))
        found = {}
        for name in ("before", "confidence"):
            sums = sum_by_confidence(torch.from_numpy(getattr(self.held, name)), right)
            rows = zip(*(column.tolist() for column in sums), strict=True)
            found["after" if name == "confidence" else name] = [
                {"samples": int(n), "confidence": total / n, "accuracy": hits / n}
                for n, total, hits in rows
                if n
            ]
        return found


@dataclass(frozen=True)
class PseudoLabels:
    """Labels for samples of a pool.

    Attributes:
        pool: the set.
        ids: (n,) ascending.
        labels: (n,) theirs.
        confidence: (n,) of each.
        classes: names of the labels 0, 1, ...
        warnings: what the reader should know.
        about: what they depend on, and what is known of them.
    """

    pool: ShardSet
    ids: Ids
    labels: Ids
    confidence: Scores
    classes: list[str]
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def pseudolabel(
    root: Path, pool: Path, options: Options, train: Labelled, test: Labelled | None
) -> PseudoLabels:
    """Label the samples of a pool that a classifier is sure of.

    Labels that the pool was packed with are looked at only after all choices.

    Args:
        root: the run whose features the classifier sees.
        pool: the set.
        options: how sure, and who must agree.
        train: what is labelled.
        test: whose images get no label.

    Raises:
        UsageError: the options do not fit together.
        DataError: the precision is not reached, or no candidate is above the threshold.
        CheckpointError: a run has no checkpoint.
    """
    wanted = options.wanted()
    shard_set, candidates, warnings = open_pool(pool, train, test)
    opinions, classes = [], train.classes
    if options.by:
        said, classes = ask_network(root, options.by, shard_set, candidates, options.device)
        opinions.append(Opinion(options.by, None, None, None, said))
        warnings.append(f"{options.by} is not calibrated: nothing was held out of its training")
    stored = None
    if options.classifier:
        stored = read_classifier(options.classifier, get_device(options.device, 0))
    if stored:
        stored.check(classes=classes)
        warnings += stored.warn_of_labels(train)
    for run in () if options.by else (root, *options.agree):  # only one holds its features
        sight = options.feature, options.device, warnings
        own = (options.features, stored, options.classifier) if run is root else (None, None, None)
        seen = embed_pool(run, shard_set, candidates, train, *sight, *own[:2])
        opinions.append(ask(run, seen, train, options, *own[1:]))
    judged = _judged(opinions)
    threshold = options.threshold
    if wanted is not None:
        threshold = require_threshold(judged, wanted)
    assert threshold is not None
    same, confidence = agree(
        [one.beliefs.predicted for one in opinions], [one.beliefs.confidence for one in opinions]
    )
    sure = np.flatnonzero(same & (confidence >= threshold))
    if not len(sure):
        raise DataError(
            f"No sample of {pool} is labelled with a confidence of {threshold:.3f} or more: pass a "
            "lower --threshold or --precision."
        )
    predicted = opinions[0].beliefs.predicted
    kept = sure
    if options.per_class is not None:
        kept = sure[take_surest(confidence[sure], predicted[sure], options.per_class)]
    shares = {
        "out_of_fold": float((judged.confidence >= threshold).sum() / max(1, judged.total)),
        "pool": len(sure) / len(candidates),
    }
    about = {
        **describe_pool(pool, shard_set, candidates, train, options),
        "precision": wanted,
        "threshold": threshold,
        "per_class": options.per_class,
        "classifiers": [one.describe() for one in opinions],
        "estimate": estimate_precision(judged, wanted, threshold),
        "above_threshold": shares,
        "curve": trace_precision(judged),
    }
    warnings += _warn_of_shares(judged, shares)
    return PseudoLabels(
        shard_set,
        candidates[kept],
        predicted[kept],
        confidence[kept],
        classes,
        warnings,
        about,
    )


def open_pool(
    pool: Path, train: Labelled, test: Labelled | None
) -> tuple[ShardSet, Ids, list[str]]:
    """Return a set, its samples that have no label yet, and what speaks against the labels.

    Raises:
        DataError: no classifier can learn from the labels, or all samples have one.
    """
    refuse_unfit(train)
    shard_set, warnings = ShardSet(pool), list(_warn_of_labels(train))
    return shard_set, find_candidates(shard_set, train, test, (), warnings), warnings


def _warn_of_labels(train: Labelled) -> Iterator[str]:
    counts = np.bincount(train.labels, minlength=len(train.classes))
    if len(missing := np.flatnonzero(counts == 0)):
        name = train.classes[missing[0]]
        yield f"no label of the class {name!r}: no sample is taken for one ({len(missing)} such)"
    if tables := [source.table for source in train.sources if source.table]:
        yield (
            f"the labels of {', '.join(tables)} count as true: if they were asked for as "
            "uncertain, the estimate is too low; if they are pseudo-labels, it is too high"
        )
    yield from tell_dropped(train)


def describe_pool(
    pool: Path, shard_set: ShardSet, candidates: Ids, train: Labelled, options: Options
) -> dict[str, Any]:
    """Return what is written down of the samples and of how they are seen."""
    return {
        "pool": str(pool),
        "set_id": shard_set.manifest.set_id,
        "labelled": len(train.ids),
        "candidates": len(candidates),
        "feature": options.feature,
        "seed": options.seed,
    }


def ask(
    root: Path,
    seen: PoolFeatures,
    train: Labelled,
    options: Options,
    stored: Classifier | None = None,
    file: Path | None = None,
) -> Opinion:
    """Return what a head on the features of a run says of the candidates; see `get_classifier`."""
    head, held = get_classifier(seen, train, options.feature, options.seed, stored, file)
    return Opinion(root, seen.step, head, held, judge(head, seen.rows))


def _judged(opinions: list[Opinion]) -> Judged:
    """Return the labelled samples of which all say the same, each by heads that had not seen it."""
    held = [one.held for one in opinions if one.held is not None]
    if not held:  # of the same labels, all or none
        none = np.empty(0)
        return Judged(none, none.astype(bool), none.astype(np.int64), 0)
    same, confidence = agree([one.predicted for one in held], [one.confidence for one in held])
    right = held[0].predicted == held[0].labels
    return Judged(confidence[same], right[same], held[0].folds[same], len(same))


def _warn_of_shares(judged: Judged, shares: dict[str, float]) -> Iterator[str]:
    own, pool = shares["out_of_fold"], shares["pool"]
    if judged.total and abs(own - pool) > _APART * own:
        yield (
            f"above the threshold are {100 * own:.1f} % of the labelled samples, but "
            f"{100 * pool:.1f} % of the pool: it is not drawn as the labels were"
        )
