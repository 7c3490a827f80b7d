"""`fastmoco query`: which samples of a pool to ask labels for."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from fastmoco.core.distributed import get_device
from fastmoco.core.rng import Permutation, Stream
from fastmoco.core.terminal import echo
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.numbers import read_numbers
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.label.choose import FEW_LABELS, Options, choose
from fastmoco.label.classifier import read_classifier
from fastmoco.label.estimate import LONG, estimate_minutes
from fastmoco.label.pool import (
    PoolFeatures,
    ask_network,
    embed_pool,
    find_candidates,
    get_classifier,
    to_tensors,
)
from fastmoco.label.request import Request
from fastmoco.runs.run_folder import RunFolder


def query(
    root: Path, pool: Path, options: Options, train: Labelled | None, test: Labelled | None
) -> Request:
    """Choose samples of a pool; labels that it was packed with are never looked at.

    Args:
        root: the run.
        pool: the set.
        options: how many, and how.
        train: what is labelled already; None: nothing is.
        test: whose images must not be asked for.

    Raises:
        UsageError: the budget or the strategy does not fit what there is.
        DataError: nothing is left to ask for, or the scores do not fit the pool.
        CheckpointError: the run has no checkpoint.
    """
    if train and not len(train.ids):
        raise DataError(
            f"{train.set.root} has no labels: name a table by --labels, or another set by --train."
        )
    shard_set, asked = ShardSet(pool), options.strategy
    warnings: list[str] = []
    candidates = find_candidates(shard_set, train, test, options.exclude, warnings)
    if not 0 < options.budget <= len(candidates):
        raise UsageError(
            f"--budget {options.budget}: {pool} has {len(candidates):,} samples to ask for."
        )
    stored = None
    if options.classifier:
        stored = read_classifier(options.classifier, get_device(options.device, 0))
    judged = options.by is not None or stored is not None
    options, why = _decide(options, train, judged, warnings)
    classes = train.classes if train else []
    head, beliefs, scores, features = None, None, None, []
    if options.by:
        beliefs, classes = ask_network(root, options.by, shard_set, candidates, options.device)
        warnings.append(f"{options.by} is not calibrated: nothing was held out of its training")
    if stored:
        classes = classes or stored.classes
        stored.check(classes=classes)
        warnings += stored.warn_of_labels(train)
    if options.strategy == "random":
        scores = np.empty(len(candidates))
        order = Permutation(len(candidates), options.seed, Stream.QUERY)
        scores[order(np.arange(len(candidates)))] = -np.arange(len(candidates))
    elif options.scores:
        scores = read_numbers(options.scores, ConcatShardSets([shard_set]))[candidates]
    if options.embeds:
        sight = options.feature, options.device, warnings
        features = [
            embed_pool(root, shard_set, candidates, train, *sight, options.features, stored)
        ]
        features += (
            embed_pool(run, shard_set, candidates, train, *sight) for run in options.committee
        )
        fitted = int(options.judges and not judged)
        _tell_if_long(features, len(classes), options, fitted + len(options.committee))
        if options.judges and not options.by:
            kept = options.feature, options.seed, stored, options.classifier
            head, _ = get_classifier(features[0], train, *kept)
    labels, weights = to_tensors(train, features[0]) if train and features else (None, None)
    given = len(classes), options, warnings, weights, head, beliefs, scores
    chosen = choose(features, labels, *given)
    if train and (missing := sorted(set(range(len(train.classes))) - set(train.labels.tolist()))):
        name = train.classes[missing[0]]
        warnings.append(f"no label of the class {name!r} yet ({len(missing)} such)")
    runs = (root, *options.committee)
    about = {
        "pool": str(pool),
        "set_id": shard_set.manifest.set_id,
        "budget": options.budget,
        "asked_strategy": asked,
        "feature": options.feature,
        "balance": options.balanced,
        "members": options.members,
        "thresholds": options.thresholds,
        "by": str(options.by) if options.by else None,
        "seed": options.seed,
        "labels": len(train.ids) if train else 0,
        "runs": [
            {"run": RunFolder(run).name, "step": found.step}
            for run, found in zip(runs, features, strict=False)
        ],
    }
    return Request(
        *(shard_set, candidates[chosen.places], options.strategy, why, len(candidates), classes),
        *(chosen.head, chosen.beliefs, chosen.scores, warnings, about),
    )


def _decide(
    options: Options, train: Labelled | None, judged: bool, warnings: list[str]
) -> tuple[Options, str]:
    """Return the options with a strategy, and why that one where it was not named.

    Args:
        options: as asked.
        train: what is labelled.
        judged: there is a classifier already, which needs no labels.
        warnings: what the reader should know is added.

    Raises:
        UsageError: they do not fit together, or there are no labels for a classifier.
        DataError: the labels are of one class.
    """
    if (options.strategy == "scores") != (options.scores is not None):
        raise UsageError("--strategy scores and --scores FILE belong together.")
    size = max(1, options.members) + len(options.committee)
    if (options.strategy == "disagreement") != (size > 1):
        raise UsageError(
            "--strategy disagreement needs a committee of two or more, and no other strategy has "
            "one: add --members 5, or --with RUN."
        )
    why, each = "", len(train.ids) / len(train.classes) if train else 0
    if options.strategy == "auto":
        options, why = replace(options, strategy="margin"), "a classifier is named"
        if not judged and each < FEW_LABELS:
            options = replace(options, strategy="herding")
            why = f"{each:.0f} labels a class are few: covering the pool brings more"
        elif not judged:
            why = f"{each:.0f} labels a class: uncertain samples bring more"
    if options.strategy == "scores" and options.balanced and not (train or judged):
        options = replace(options, balanced=False)
        warnings.append("without labels no class is predicted, and none gets an equal share")
    if options.by and (options.classifier or options.strategy == "disagreement"):
        raise UsageError("--by names the one classifier: leave --classifier and committees out.")
    for name, of, serves in (
        ("by", options.by, options.judges),
        ("classifier", options.classifier, options.judges),
        ("features", options.features, options.embeds),
    ):
        if of and not serves:
            raise UsageError(f"--{name} does nothing with {options.strategy}: leave it out.")
    needed = options.judges and not judged
    if needed and train and len(np.unique(train.labels)) == 1:
        raise DataError(
            f"All labels are of one class ({train.classes[train.labels[0]]!r}): a classifier "
            "learns nothing from them. Begin with --strategy herding or random."
        )
    if not train and (needed or options.strategy == "disagreement"):
        raise UsageError(
            f"--strategy {options.strategy} needs labels: name them by --train, or begin with "
            "herding or random."
        )
    return options, why


def _tell_if_long(
    features: Sequence[PoolFeatures], classes: int, options: Options, heads: int
) -> None:
    """Say how long it takes, before it begins, if that is longer than somebody waits."""
    rows, known, *_ = features[0]
    minutes = estimate_minutes(
        *(options.strategy, len(rows), rows.shape[1], options.budget, len(known), classes),
        *(torch.get_num_threads(), heads, options.members),
    )
    if rows.device.type == "cpu" and minutes > LONG:
        shorter = "; --feature head takes less" if options.feature == "backbone" else ""
        echo(
            f"{options.strategy}: {options.budget:,} of {len(rows):,} samples by {rows.shape[1]} "
            f"numbers each take up to about {minutes:.0f} minutes on this CPU{shorter}"
        )
