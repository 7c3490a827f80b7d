"""`fastmoco query`: which samples of a pool to ask labels for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.core.rng import Ids, Permutation, Stream
from fastmoco.core.terminal import echo
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ShardSet, holds_pseudo_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate.features import Feature
from fastmoco.label.diversity import CLUSTERS, coreset, herding, spread, typiclust
from fastmoco.label.estimate import LONG, estimate_minutes
from fastmoco.label.head import Head, fit_bootstrap, fit_head
from fastmoco.label.pool import PoolFeatures, embed_pool
from fastmoco.label.request import Request, read_request
from fastmoco.label.uncertainty import Beliefs, Member, balance, disagree, judge, rank_scores
from fastmoco.runs.run_folder import RunFolder

BY_HEAD = ("least", "margin", "entropy", "intersection", "disagreement", "hybrid")
_FEW_LABELS = 100  # a class; below, covering the pool brings more than uncertainty
_LOSES_WITH_FEW = ("least", "entropy", "intersection", "disagreement", "coreset")
_CANDIDATES, _REFERENCE = 65_536, 32_768  # that herding looks at, of a larger pool
_UNSURE = 10  # times the budget: the samples that hybrid clusters


@dataclass(frozen=True)
class Options:
    """What is asked of the pool.

    Attributes:
        budget: how many samples.
        strategy: how they are chosen, one of `cli.labels.Strategy`.
        feature: of the backbone or of the head.
        balanced: at most an equal share of each predicted class, for strategies by the head.
        seed: of folds and samples.
        members: with "disagreement": heads of the run, fitted on bootstraps of the labels.
        committee: with "disagreement": further runs, each with a head on its own features.
        features: of the pool, as `fastmoco embed` wrote them; None: they are computed.
        scores: with "scores": an (N,) `.npy` of one number a sample, the largest first.
        exclude: earlier requests that are still out.
        device: "auto", "cpu" or "cuda".
    """

    budget: int
    strategy: str = "auto"
    feature: Feature = "backbone"
    balanced: bool = True
    seed: int = 0
    members: int = 0
    committee: tuple[Path, ...] = ()
    features: Path | None = None
    scores: Path | None = None
    exclude: tuple[Path, ...] = ()
    device: str = "auto"


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
    shard_set = ShardSet(pool)
    warnings: list[str] = []
    candidates = find_candidates(shard_set, train, test, options.exclude, warnings)
    if not 0 < options.budget <= len(candidates):
        raise UsageError(
            f"--budget {options.budget}: {pool} has {len(candidates):,} samples to ask for."
        )
    strategy, why = _decide(options, train)
    decided = replace(options, strategy=strategy)
    classes = train.classes if train else []
    head, beliefs, features = None, None, []
    if strategy == "random":
        order = Permutation(len(candidates), options.seed, Stream.QUERY)
        places = order(np.arange(options.budget))
    elif strategy == "scores":
        scores = read_scores(options.scores, len(shard_set))
        places = rank_scores(scores[candidates])[: options.budget]
    else:
        feature, device = options.feature, options.device
        features = [
            embed_pool(run, shard_set, candidates, train, feature, device, warnings, file)
            for run, file in ((root, options.features), *((run, None) for run in options.committee))
        ]
        labels = weights = None
        if train:
            labels = torch.from_numpy(train.labels).to(features[0].known.device)
            if (relative := train.relative_weights()) is not None:
                weights = torch.from_numpy(relative).to(features[0].known)
        _tell_if_long(features, len(classes), decided)
        places, head, beliefs = choose(features, labels, len(classes), decided, warnings, weights)
    if train and (missing := sorted(set(range(len(classes))) - set(train.labels.tolist()))):
        warnings.append(f"no label of the class {classes[missing[0]]!r} yet ({len(missing)} such)")
    runs = (root, *options.committee)
    about = {
        "pool": str(pool),
        "set_id": shard_set.manifest.set_id,
        "budget": options.budget,
        "asked_strategy": options.strategy,
        "feature": options.feature,
        "balance": options.balanced,
        "members": options.members,
        "seed": options.seed,
        "labels": len(train.ids) if train else 0,
        "runs": [
            {"run": RunFolder(run).name, "step": found.step}
            for run, found in zip(runs, features, strict=False)
        ],
    }
    ids = candidates[places]
    return Request(
        shard_set, ids, strategy, why, len(candidates), classes, head, beliefs, warnings, about
    )


def find_candidates(
    pool: ShardSet,
    train: Labelled | None,
    test: Labelled | None,
    exclude: Iterable[Path],
    warnings: list[str],
) -> Ids:
    """Return the ids, ascending, that nobody has a label of yet; say what is left out.

    Raises:
        DataError: none is left, or a request to exclude cannot be read.
    """
    free = np.ones(len(pool), dtype=bool)
    hashes = np.array(pool.samples["hash"])

    def leave_out(which: "np.ndarray[Any, Any]", why: str) -> None:
        if count := int(free[which].sum()):
            warnings.append(f"{count:,} samples are left out: {why}")
        free[which] = False

    for labelled, why in ((train, "labelled already"), (test, "of the test set")):
        if labelled:
            known = labelled.data.rows(labelled.ids)["hash"]
            leave_out(np.isin(hashes, known), why)
    for path in sorted((pool.root / "labels").glob("*.npy")):
        rows = Labelled.of(pool, path.stem)
        if holds_pseudo_labels(pool, path.stem):  # nobody has looked at these
            continue
        known = hashes[rows.ids]
        use = f"--more {pool.root} {path.stem} trains on them"
        leave_out(np.isin(hashes, known), f"labelled in the table {path.stem!r} ({use})")
    for request in exclude:
        asked = np.unique(np.array(read_request(request), np.int64))
        known = hashes[asked[(asked >= 0) & (asked < len(pool))]]
        leave_out(np.isin(hashes, known), f"asked for in {request}")
    _, firsts = np.unique(hashes, return_index=True)
    again = np.ones(len(pool), dtype=bool)
    again[firsts] = False
    leave_out(again, "their bytes come before in the pool")
    ids = np.flatnonzero(free)
    if not len(ids):
        raise DataError(f"{pool.root} has no sample left to ask for: all are labelled or asked.")
    return ids


def _decide(options: Options, train: Labelled | None) -> tuple[str, str]:
    """Return the strategy, and why that one where it was not named."""
    if (options.strategy == "scores") != (options.scores is not None):
        raise UsageError("--strategy scores and --scores FILE.npy belong together.")
    size = max(1, options.members) + len(options.committee)
    if (options.strategy == "disagreement") != (size > 1):
        raise UsageError(
            "--strategy disagreement needs a committee of two or more, and no other strategy has "
            "one: add --members 5, or --with RUN."
        )
    each = len(train.ids) / len(train.classes) if train else 0
    if options.strategy == "auto":
        if each < _FEW_LABELS:
            return "herding", f"{each:.0f} labels a class are few: covering the pool brings more"
        return "margin", f"{each:.0f} labels a class: uncertain samples bring more"
    if options.strategy in BY_HEAD and train and len(np.unique(train.labels)) == 1:
        raise DataError(
            f"All labels are of one class ({train.classes[train.labels[0]]!r}): a classifier "
            "learns nothing from them. Begin with --strategy herding or random."
        )
    if options.strategy in BY_HEAD and not train:
        raise UsageError(
            f"--strategy {options.strategy} needs labels: name them by --train, or begin with "
            "herding or random."
        )
    return options.strategy, ""


def _tell_if_long(features: Sequence[PoolFeatures], classes: int, options: Options) -> None:
    """Say how long it takes, before it begins, if that is longer than somebody waits."""
    rows, known, _ = features[0]
    minutes = estimate_minutes(
        *(options.strategy, len(rows), rows.shape[1], options.budget, len(known), classes),
        *(torch.get_num_threads(), options.members, len(features)),
    )
    if rows.device.type == "cpu" and minutes > LONG:
        shorter = "; --feature head takes less" if options.feature == "backbone" else ""
        echo(
            f"{options.strategy}: {options.budget:,} of {len(rows):,} samples by {rows.shape[1]} "
            f"numbers each take up to about {minutes:.0f} minutes on this CPU{shorter}"
        )


def choose(
    features: Sequence[PoolFeatures],
    labels: torch.Tensor | None,
    classes: int,
    options: Options,
    warnings: list[str],
    weights: torch.Tensor | None = None,
) -> tuple[Ids, Head | None, Beliefs | None]:
    """Choose among samples by their features.

    Args:
        features: by the run; with "disagreement", by the other runs of the committee too.
        labels: (m,) of what is labelled; None: a strategy that needs none.
        classes: their number.
        options: the budget and the rest; a strategy that looks at features.
        warnings: what the reader should know is added.
        weights: (m,) fp64, what each label counts; None: all the same.

    Returns:
        (budget,) places, the head and what it says of them, if the strategy has one.
    """
    strategy = options.strategy
    rows, known, _ = features[0]
    budget, seed = options.budget, options.seed
    loses = strategy in _LOSES_WITH_FEW or (strategy == "margin" and not options.balanced)
    if labels is not None and loses and (each := len(labels) / classes) < _FEW_LABELS:
        warnings.append(
            f"{each:.0f} labels a class are few for {strategy}: --strategy herding serves better"
        )
    if strategy == "herding":
        return _herd(rows, known.to(rows), options, warnings), None, None
    if strategy == "coreset":
        return coreset(rows, known.to(rows), budget), None, None
    if strategy == "kmeans":
        return spread(rows, budget, seed), None, None
    if strategy == "typiclust":
        _check_clusters(len(known) + budget, classes, warnings)
        return typiclust(rows, known.to(rows), budget, seed), None, None
    assert labels is not None
    head = fit_head(known, labels, classes, seed, weights)
    beliefs = judge(head, rows)
    if strategy == "hybrid":
        unsure = rank_scores(-beliefs.margin)[: _UNSURE * budget]
        urgency = torch.from_numpy(beliefs.margin[unsure].max() - beliefs.margin[unsure] + 1e-3)
        some = rows[torch.from_numpy(unsure)]
        places = unsure[spread(some, budget, seed, urgency.to(rows.device))]
    else:
        if strategy == "disagreement":
            scores = disagree(_get_committee(head, features, labels, weights, options))
        else:
            scores = beliefs.scores(strategy)
        places = rank_scores(scores)
        if options.balanced:
            places = balance(places, beliefs.predicted, budget, classes)
    places = places[:budget]
    of_chosen = Beliefs(*(column[places] for column in vars(beliefs).values()))
    return places, head, of_chosen


def _check_clusters(wanted: int, classes: int, warnings: list[str]) -> None:
    """Refuse typiclust with clusters that hold several classes each: there it loses to chance."""
    if min(wanted, CLUSTERS) < 2 * classes:
        raise UsageError(
            f"typiclust would make {min(wanted, CLUSTERS)} clusters, too few for {classes} "
            "classes: choose --strategy herding."
        )
    if wanted > CLUSTERS:
        warnings.append(f"typiclust makes {CLUSTERS} clusters at most, not {wanted:,}")


def _get_committee(
    head: Head,
    features: Sequence[PoolFeatures],
    labels: torch.Tensor,
    weights: torch.Tensor | None,
    options: Options,
) -> list[Member]:
    """Return the heads of the run, its own or on bootstraps, and one of each other run."""
    (rows, known, _), *others = features
    own = [
        fit_bootstrap(head, known, labels, options.seed, member, weights)
        for member in range(options.members)
    ]
    more = [
        (fit_head(other.known, labels, len(head.bias), options.seed, weights), other.rows)
        for other in others
    ]
    return [(one, rows) for one in own or [head]] + more


def _herd(rows: torch.Tensor, known: torch.Tensor, options: Options, warnings: list[str]) -> Ids:
    """Herd over all candidates, or over a sample of so many that it takes minutes."""
    most, known = max(_CANDIDATES, 4 * options.budget), known / 4  # its kernel is of unit features
    if len(rows) <= most:
        return herding(rows / 4, known, options.budget)
    some = np.sort(Permutation(len(rows), options.seed, Stream.QUERY, 1)(np.arange(most)))
    points = Permutation(len(rows), options.seed, Stream.QUERY, 2)(np.arange(_REFERENCE))
    warnings.append(f"herding looks at {most:,} candidates and {_REFERENCE:,} samples to cover")
    reference = rows[torch.from_numpy(points)] / 4
    return some[herding(rows[torch.from_numpy(some)] / 4, known, options.budget, reference)]


def read_scores(path: Path | None, samples: int) -> "np.ndarray[Any, Any]":
    """Return the (samples,) fp64 numbers of a `.npy`.

    Raises:
        DataError: it cannot be read, has another length, or a number is not finite.
    """
    assert path is not None
    try:
        scores: np.ndarray[Any, Any] = np.load(path, allow_pickle=False).astype(np.float64)
    except (OSError, ValueError, TypeError) as error:
        raise DataError(f"{path} cannot be read as numbers: {error}.") from error
    if scores.shape != (samples,):
        raise DataError(f"{path} has the shape {scores.shape}, the pool has {samples} samples.")
    if not np.isfinite(scores).all():
        odd = int(np.flatnonzero(~np.isfinite(scores))[0])
        raise DataError(f"{path}: the score of sample {odd} is no finite number.")
    return scores
