"""The weighted kNN classifier of instance discrimination (Wu et al. 2018, section 3.4)."""

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch.nn.functional import normalize

_CHUNK = 512  # queries at a time: the similarities never fill more than (512, N)


@dataclass(frozen=True)
class Neighbours:
    """A labelled bank of features to look queries up in.

    Attributes:
        features: (N, dim) fp32; normalised here.
        labels: (N,) int64, 0..classes-1.
        classes: their number.
        k: neighbours that vote; the whole bank where it is smaller.
        t: temperature of their weights exp(similarity / t).
    """

    features: torch.Tensor
    labels: torch.Tensor
    classes: int
    k: int = 200
    t: float = 0.1

    def nearest(self, queries: torch.Tensor, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (M, count) cosine similarities and rows of the bank, the nearest one first."""
        similarity = normalize(queries, dim=1) @ normalize(self.features, dim=1).T
        best, rows = similarity.topk(min(count, len(self.features)), dim=1)
        return best, rows

    def scores(self, queries: torch.Tensor) -> Iterator[torch.Tensor]:
        """Yield the (chunk, classes) votes for (M, dim) queries, chunk by chunk."""
        bank = normalize(self.features, dim=1).T
        for chunk in torch.split(normalize(queries, dim=1), _CHUNK):
            similarity, index = (chunk @ bank).topk(min(self.k, len(self.features)), dim=1)
            votes = torch.zeros(len(chunk), self.classes)
            yield votes.scatter_add_(1, self.labels[index], (similarity / self.t).exp())

    def accuracy(self, queries: torch.Tensor, labels: torch.Tensor) -> float:
        """Return the percentage of (M, dim) queries whose top vote is their label."""
        found = torch.cat([votes.argmax(dim=1) for votes in self.scores(queries)])
        return 100 * (found == labels).float().mean().item()
