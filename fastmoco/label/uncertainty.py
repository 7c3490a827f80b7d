"""How unsure a classifier is of each sample, and the order in which samples are asked for."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from fastmoco.core.rng import Ids
from fastmoco.label.head import CHUNK, Head, Scores

Member = tuple[Head, torch.Tensor]
"""A head, and the (n, d) standardized rows that it judges."""


@dataclass(frozen=True)
class Beliefs:
    """What a head says of each of n samples.

    Attributes:
        predicted: (n,) class.
        confidence: (n,) p1, the largest probability.
        margin: (n,) p1 - p2.
        entropy: (n,) of 0..1: divided by that of the uniform distribution.
    """

    predicted: Ids
    confidence: Scores
    margin: Scores
    entropy: Scores

    @classmethod
    def of(cls, chunks: Iterable[torch.Tensor]) -> "Beliefs":
        """Return what (n, c) probabilities say, which come in parts."""
        parts = []
        for p in chunks:
            top, places = p.topk(2, dim=1)
            entropy = _get_entropy(p) / np.log(p.shape[1])
            parts.append((places[:, 0], top[:, 0], top[:, 0] - top[:, 1], entropy))
        return cls(*(torch.cat(column).cpu().numpy() for column in zip(*parts, strict=True)))

    def take(self, places: Ids) -> "Beliefs":
        """Return those of some samples."""
        return Beliefs(*(column[places] for column in vars(self).values()))

    def least(self) -> Scores:
        """Return 1 - p1: the larger, the sooner it is asked for."""
        return 1 - self.confidence

    def scores(self, strategy: str) -> Scores:
        """Return the (n,) scores of a strategy, the largest to be asked for first."""
        by_name = {
            "least": self.least(),
            "margin": -self.margin,
            "entropy": self.entropy,
        }
        if strategy in by_name:
            return by_name[strategy]
        assert strategy == "intersection"
        # The samples among the first r by all three are those whose worst rank is r or better.
        ranks = [np.argsort(rank_scores(scores)) for scores in by_name.values()]
        worst: Scores = np.max(ranks, axis=0).astype(np.float64)
        return -worst


def judge(head: Head, rows: torch.Tensor) -> Beliefs:
    """Return what a head says of (n, d) standardized rows, chunk by chunk."""
    starts = range(0, len(rows), CHUNK)
    return Beliefs.of(_get_probabilities((head, rows), start) for start in starts)


def disagree(members: Sequence[Member]) -> Scores:
    """Return how much a committee disagrees on each of n samples: H(mean p) - mean H(p), in nats.

    It is the mean divergence of the members from their mean (McCallum and Nigam, "Employing EM and
    Pool-Based Active Learning for Text Classification", 1998), and the mutual information of label
    and member.
    """
    parts = []
    for start in range(0, len(members[0][1]), CHUNK):
        mean = _get_probabilities(members[0], start)
        own = _get_entropy(mean)
        for number, member in enumerate(members[1:], 2):  # means so far: two chunks are held
            p = _get_probabilities(member, start)
            own += (_get_entropy(p) - own) / number
            mean += (p - mean) / number
        parts.append(_get_entropy(mean) - own)
    scores: Scores = torch.cat(parts).cpu().numpy()
    return scores


def _get_probabilities(member: Member, start: int) -> torch.Tensor:
    head, rows = member
    return head.probabilities(rows[start : start + CHUNK])


def _get_entropy(p: torch.Tensor) -> torch.Tensor:
    entropy: torch.Tensor = -torch.special.xlogy(p, p).sum(dim=1)
    return entropy


def rank_scores(scores: Scores) -> Ids:
    """Return places by score, the largest first; of equal ones, the first (ids are shuffled)."""
    return np.argsort(-scores, kind="stable")


def balance(order: Ids, predicted: Ids, budget: int, classes: int) -> Ids:
    """Return the first places of an order with at most ceil(budget / classes) of a predicted class.

    Those passed over follow where the end is reached.
    """
    most = -(-budget // classes)
    taken: list[int] = []
    passed: list[int] = []
    counts = np.zeros(classes, np.int64)
    for place in order.tolist():
        if len(taken) == budget:
            break
        if counts[predicted[place]] < most:
            counts[predicted[place]] += 1
            taken.append(place)
        else:
            passed.append(place)
    return np.array((taken + passed)[:budget], np.int64)
