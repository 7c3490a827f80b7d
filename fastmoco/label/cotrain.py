"""Two runs teach each other: each labels what it is sure of, for the other to learn from."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch

from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.errors import UsageError
from fastmoco.label.head import Head, Scores, fit_linear
from fastmoco.label.pool import PoolFeatures, embed_pool, to_tensors
from fastmoco.label.pseudo import (
    Options,
    PseudoLabels,
    ask,
    describe_pool,
    open_pool,
)
from fastmoco.label.threshold import take_surest
from fastmoco.label.uncertainty import judge


@dataclass(frozen=True)
class Lessons:
    """What a run learns from another.

    Attributes:
        places: (n,) ascending, of the candidates.
        labels: (n,) theirs.
        confidence: (n,) of the head that labelled them, when it did.
    """

    places: Ids
    labels: Ids
    confidence: Scores

    @classmethod
    def join(cls, parts: Sequence["Lessons"]) -> "Lessons":
        """Return the lessons of all rounds."""
        columns = zip(*((p.places, p.labels, p.confidence) for p in parts), strict=True)
        places, labels, confidence = map(np.concatenate, columns)
        order = np.argsort(places)
        return cls(places[order], labels[order], confidence[order])


def co_train(
    views: Sequence[PoolFeatures],
    heads: Sequence[Head],
    labels: torch.Tensor,
    rounds: int,
    per_round: int,
    weights: torch.Tensor | None = None,
) -> tuple[Lessons, Lessons]:
    """Let the heads of two views label candidates for each other.

    Blum and Mitchell, "Combining Labeled and Unlabeled Data with Co-Training", 1998. In each round
    either head labels the surest candidates of each class that nobody labelled before; then both
    learn what the other has labelled. C and temperature stay those of the given heads.

    Args:
        views: the features of both.
        heads: of both, fitted on the labels alone.
        labels: (m,) of what is labelled.
        rounds: at most so many.
        per_round: labels that each head gives in a round, equally many of each class.
        weights: (m,) what each label counts; those of the other always 1. None: 1.

    Returns:
        What the first learns from the second, and the second from the first.
    """
    free = np.arange(len(views[0].rows))
    learnt: tuple[list[Lessons], list[Lessons]] = ([], [])  # by each, a round after the other
    for _ in range(rounds):
        if not len(free):
            break
        given = []
        for view, head, lessons in zip(views, heads, learnt, strict=True):
            now = _learn(head, view, labels, lessons, weights) if lessons else head
            said = judge(now, view.rows[torch.from_numpy(free)])
            kept = take_surest(said.confidence, said.predicted, per_round // len(head.bias))
            given.append(Lessons(free[kept], said.predicted[kept], said.confidence[kept]))
        for lessons, lesson in zip(learnt, reversed(given), strict=True):
            lessons.append(lesson)
        free = np.setdiff1d(free, np.concatenate([lesson.places for lesson in given]))
    first, second = map(Lessons.join, learnt)
    return first, second


def _learn(
    chosen: Head,
    view: PoolFeatures,
    labels: torch.Tensor,
    lessons: list[Lessons],
    weights: torch.Tensor | None,
) -> Head:
    """Return a head fitted on the labels and the lessons."""
    more = Lessons.join(lessons)
    rows = torch.cat([view.known, view.rows[torch.from_numpy(more.places)].to(view.known)])
    targets = torch.cat([labels, torch.from_numpy(more.labels).to(labels)])
    if weights is not None:
        weights = torch.cat([weights, torch.ones(len(more.places)).to(weights)])
    weight, bias = fit_linear(rows, targets, len(chosen.bias), chosen.strength, weights=weights)
    return replace(chosen, weight=weight, bias=bias, samples=len(rows))


@dataclass(frozen=True)
class CoTraining:
    """How two runs teach each other.

    Attributes:
        other: the second run.
        rounds: at most so many.
        per_round: labels that each gives in a round.
    """

    other: Path
    rounds: int = 3
    per_round: int = 1000


def co_label(
    root: Path,
    pool: Path,
    options: Options,
    plan: CoTraining,
    train: Labelled,
    test: Labelled | None,
) -> list[PseudoLabels]:
    """Label samples of a pool by two runs, each for the other.

    Args:
        root: the first run.
        pool: the set.
        options: the feature, the seed and the device.
        plan: the other run, and how often.
        train: what is labelled.
        test: whose images get no label.

    Returns:
        What the first run learns, and the second.

    Raises:
        UsageError: a round gives less than one label of each class.
        DataError: the labels do not serve, or all samples have one.
        CheckpointError: a run has no checkpoint.
    """
    classes = len(train.classes)
    if plan.per_round < classes:
        raise UsageError(
            f"--per-round {plan.per_round}: there are {classes} classes: choose {classes} or more."
        )
    shard_set, candidates, warnings = open_pool(pool, train, test)
    runs = (root, plan.other)
    sight = options.feature, options.device, warnings
    views = [
        embed_pool(run, shard_set, candidates, train, *sight, file)
        for run, file in zip(runs, (options.features, None), strict=True)
    ]
    labels, weights = to_tensors(train, views[0])
    opinions = [ask(run, view, train, options) for run, view in zip(runs, views, strict=True)]
    heads = [opinion.head for opinion in opinions if opinion.head]
    lessons = co_train(views, heads, labels, plan.rounds, plan.per_round, weights)
    _, first, second = np.intersect1d(lessons[0].places, lessons[1].places, return_indices=True)
    about = {
        **describe_pool(pool, shard_set, candidates, train, options),
        "rounds": plan.rounds,
        "per_round": plan.per_round,
        "classifiers": [opinion.describe() for opinion in opinions],
        "called_differently": int((lessons[0].labels[first] != lessons[1].labels[second]).sum()),
    }
    return [
        PseudoLabels(
            shard_set,
            candidates[lesson.places],
            lesson.labels,
            lesson.confidence,
            train.classes,
            warnings,
            about | {"learner": str(run)},
        )
        for run, lesson in zip(runs, lessons, strict=True)
    ]
