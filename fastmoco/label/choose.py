"""Which of the candidates are asked for: the strategies, put to work on features and beliefs."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastmoco.core.rng import Ids, Permutation, Stream
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate.features import Feature
from fastmoco.label.diversity import CLUSTERS, coreset, herding, spread, typiclust
from fastmoco.label.head import Head, Scores, fit_bootstrap, fit_head
from fastmoco.label.pool import PoolFeatures
from fastmoco.label.uncertainty import Beliefs, Member, balance, disagree, judge, rank_scores

BY_HEAD = ("least", "margin", "entropy", "intersection", "disagreement", "hybrid")
_BY_FEATURES = ("herding", "coreset", "kmeans", "typiclust", "hybrid", "disagreement")
FEW_LABELS = 100
"""Of a class: below, covering the pool brings more than uncertainty."""
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
        balanced: at most an equal share of each predicted class, for strategies by scores.
        max_confidence, max_margin, min_entropy: samples that a classifier is surer of are not
            asked for; None: any are.
        seed: of folds and samples.
        members: with "disagreement": heads of the run, fitted on bootstraps of the labels.
        committee: with "disagreement": further runs, each with a head on its own features.
        by: what `finetune --save` wrote: its network is the classifier, instead of a head.
        classifier: a file of the run's head, read if it is there, else written.
        features: of the pool, as `fastmoco embed` wrote them; None: they are computed.
        scores: with "scores": a file of one number a sample, the largest first.
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
    max_confidence: float | None = None
    max_margin: float | None = None
    min_entropy: float | None = None
    by: Path | None = None
    classifier: Path | None = None
    features: Path | None = None
    scores: Path | None = None
    exclude: tuple[Path, ...] = ()
    device: str = "auto"

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are set, by the names of the options."""
        names = ("max_confidence", "max_margin", "min_entropy")
        return {name: value for name in names if (value := getattr(self, name)) is not None}

    @property
    def judges(self) -> bool:
        """Whether a classifier has a say."""
        balances = self.strategy == "scores" and self.balanced
        return self.strategy in BY_HEAD or balances or bool(self.thresholds)

    @property
    def embeds(self) -> bool:
        """Whether features of the pool are looked at."""
        return self.strategy in _BY_FEATURES or (self.judges and not self.by)


@dataclass(frozen=True)
class Chosen:
    """Samples to ask for, the most wanted first.

    Attributes:
        places: (n,) among the candidates.
        head: that judged them; None: a fine-tuned network did, or none.
        beliefs: of the classifier on each; None: there is none.
        scores: of each, falling but for balance; None: the strategy has none.
    """

    places: Ids
    head: Head | None
    beliefs: Beliefs | None
    scores: Scores | None


def choose(
    features: Sequence[PoolFeatures],
    labels: torch.Tensor | None,
    classes: int,
    options: Options,
    warnings: list[str],
    weights: torch.Tensor | None = None,
    head: Head | None = None,
    beliefs: Beliefs | None = None,
    scores: Scores | None = None,
) -> Chosen:
    """Choose among samples.

    Args:
        features: by the run; with "disagreement", by the other runs of the committee too; empty
            where neither strategy nor classifier looks at them.
        labels: (m,) of what is labelled; None: nothing is.
        classes: their number.
        options: the budget and the rest.
        warnings: what the reader should know is added.
        weights: (m,) fp64, what each label counts; None: all the same.
        head: that judges; None: one is fitted here where the options ask for it.
        beliefs: of another classifier on all samples, instead of a head.
        scores: (n,) of one's own, the largest to be asked for first.

    Raises:
        DataError: no sample passes the thresholds.
    """
    strategy, passing = options.strategy, None
    loses = strategy in _LOSES_WITH_FEW or (strategy == "margin" and not options.balanced)
    if labels is not None and loses and (each := len(labels) / classes) < FEW_LABELS:
        warnings.append(
            f"{each:.0f} labels a class are few for {strategy}: --strategy herding serves better"
        )
    if beliefs is None and options.judges:
        if head is None:
            assert labels is not None
            head = fit_head(features[0].known, labels, classes, options.seed, weights)
        beliefs = judge(head, features[0].rows)
    if options.thresholds:
        assert beliefs is not None
        passing = _find_unsure(beliefs, options, warnings)
        options = replace(options, budget=min(options.budget, len(passing)))
        some = torch.from_numpy(passing)
        features = [one._replace(rows=one.rows[some]) for one in features]
        beliefs, scores = beliefs.take(passing), None if scores is None else scores[passing]
    if strategy == "disagreement":
        assert head is not None and labels is not None
        scores = disagree(_get_committee(head, features, labels, weights, options))
    elif beliefs is not None and scores is None and strategy not in _BY_FEATURES:
        scores = beliefs.scores(strategy)
    if scores is None:
        places = _spread_out(features[0], beliefs, classes, options, warnings)
    else:
        places = rank_scores(scores)
        if options.balanced and beliefs is not None and strategy != "random":
            places = balance(places, beliefs.predicted, options.budget, classes)
        places = places[: options.budget]
    return Chosen(
        places if passing is None else passing[places],
        head,
        None if beliefs is None else beliefs.take(places),
        None if scores is None or strategy == "random" else scores[places],
    )


def _find_unsure(beliefs: Beliefs, options: Options, warnings: list[str]) -> Ids:
    """Return the places of the samples that the classifier is not too sure of."""
    unsure = np.ones(len(beliefs.predicted), dtype=bool)
    for name, found, sign in (
        ("max_confidence", beliefs.confidence, 1),
        ("max_margin", beliefs.margin, 1),
        ("min_entropy", beliefs.entropy, -1),
    ):
        if (bound := options.thresholds.get(name)) is not None:
            unsure &= sign * found < sign * bound
    places = np.flatnonzero(unsure)
    if not len(places):
        raise DataError(
            "No sample passes the thresholds: choose wider ones. The lowest confidence is "
            f"{beliefs.confidence.min():.3f}, the lowest margin {beliefs.margin.min():.3f}, the "
            f"highest entropy {beliefs.entropy.max():.3f}."
        )
    if len(places) < options.budget:
        warnings.append(f"only {len(places):,} of {options.budget:,} pass the thresholds")
    return places


def _spread_out(
    seen: PoolFeatures,
    beliefs: Beliefs | None,
    classes: int,
    options: Options,
    warnings: list[str],
) -> Ids:
    """Return places by a strategy that looks at how the features lie."""
    rows, known, budget, seed = seen.rows, seen.known, options.budget, options.seed
    if options.strategy == "herding":
        return _herd(rows, known.to(rows), options, warnings)
    if options.strategy == "coreset":
        return coreset(rows, known.to(rows), budget)
    if options.strategy == "kmeans":
        return spread(rows, budget, seed)
    if options.strategy == "typiclust":
        _check_clusters(len(known) + budget, classes, warnings)
        return typiclust(rows, known.to(rows), budget, seed)
    assert beliefs is not None  # hybrid
    unsure = rank_scores(-beliefs.margin)[: _UNSURE * budget]
    urgency = torch.from_numpy(beliefs.margin[unsure].max() - beliefs.margin[unsure] + 1e-3)
    some = rows[torch.from_numpy(unsure)]
    return unsure[spread(some, budget, seed, urgency.to(rows.device))]


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
    (rows, known, *_), *others = features
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
