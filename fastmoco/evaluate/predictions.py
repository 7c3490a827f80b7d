"""What a classifier got right: top-1, top-5, each class, confusion; the same for all of them."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from fastmoco.core.distributed import World


@dataclass(frozen=True)
class Predictions:
    """What a classifier said of each sample.

    Attributes:
        labels: (n,) int64, the truth; all tensors are on one device.
        predicted: (n,) int64, the class with the highest score.
        place: (n,) int64, classes that came before the true one; 0: it is right.
        confidence: (n,) fp32, the share of the predicted class, 0..1.
        classes: their number.
    """

    labels: torch.Tensor
    predicted: torch.Tensor
    place: torch.Tensor
    confidence: torch.Tensor
    classes: int

    @classmethod
    def of(
        cls, scores: torch.Tensor, labels: torch.Tensor, confidence: torch.Tensor
    ) -> "Predictions":
        """Return what (n, classes) scores say; of equal scores the lower class comes first."""
        scores = scores.nan_to_num(nan=-torch.inf)  # nothing compares with NaN: all would be right
        own = scores.gather(1, labels[:, None])
        earlier = torch.arange(scores.shape[1], device=scores.device) < labels[:, None]
        place = ((scores > own) | ((scores == own) & earlier)).sum(dim=1)
        return cls(labels, scores.argmax(dim=1), place, confidence, scores.shape[1])

    @classmethod
    def of_votes(cls, votes: torch.Tensor, labels: torch.Tensor) -> "Predictions":
        """Return what (n, classes) votes say; a class without a vote is in no place."""
        found = cls.of(votes, labels, votes.amax(dim=1) / votes.sum(dim=1))
        voted = votes.gather(1, labels[:, None])[:, 0] > 0
        return replace(found, place=found.place.where(voted, votes.shape[1]))

    @classmethod
    def of_logits(cls, logits: torch.Tensor, labels: torch.Tensor) -> "Predictions":
        """Return what (n, classes) logits say."""
        return cls.of(logits, labels, logits.softmax(dim=1).amax(dim=1))

    @classmethod
    def cat(cls, parts: Sequence["Predictions"]) -> "Predictions":
        """Return the predictions of all parts, in order."""
        return cls(
            torch.cat([part.labels for part in parts]),
            torch.cat([part.predicted for part in parts]),
            torch.cat([part.place for part in parts]),
            torch.cat([part.confidence for part in parts]),
            parts[0].classes,
        )

    def gathered(self, world: World) -> "Predictions":
        """Return the predictions of all ranks in rank order, in host memory."""
        own = replace(
            self,
            labels=self.labels.cpu(),
            predicted=self.predicted.cpu(),
            place=self.place.cpu(),
            confidence=self.confidence.cpu(),
        )
        return Predictions.cat(world.gather_object(own))

    def finite(self) -> bool:
        """Return whether all scores were numbers: of others no accuracy is one."""
        return bool(self.confidence.isfinite().all())

    def top(self, k: int) -> float:
        """Return the percentage of samples whose class is among the first k."""
        return 100 * (self.place < k).double().mean().item()

    def confusion(self) -> torch.Tensor:
        """Return (classes, classes) int64 counts: true class down, predicted class across.

        8 bytes for each pair of classes, which `confused` spares.
        """
        cells = self.labels * self.classes + self.predicted
        return torch.bincount(cells, minlength=self.classes**2).view(self.classes, -1)

    def confused(self) -> torch.Tensor:
        """Return (m, 3) int64 rows of true class, predicted class and count above 0, in order."""
        cells, counts = torch.unique(
            self.labels * self.classes + self.predicted, return_counts=True
        )
        return torch.stack([cells // self.classes, cells % self.classes, counts], dim=1)

    def per_class(self) -> list[float | None]:
        """Return the percentage of each class that is found; None where there is no sample."""
        right = self.labels[self.labels == self.predicted]
        both = (torch.bincount(labels, minlength=self.classes) for labels in (right, self.labels))
        pairs = zip(*(counts.tolist() for counts in both), strict=True)
        return [100 * right / total if total else None for right, total in pairs]

    def summary(self) -> dict[str, Any]:
        """Return the numbers that every evaluation writes down."""
        return {"top1": self.top(1), "top5": self.top(5), "per_class": self.per_class()}
