"""What a run measures of itself, and which of its checkpoints stay."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from fastmoco.core.strict_yaml import Count, Positive, Strict


class Monitor(Strict):
    """What is measured during training: how features spread, and with labels their kNN accuracy.

    Attributes:
        bank: the images that are looked at; labelled, if their neighbors are to vote. None: those
            that the run is trained on.
        queries: a labelled set, classified by its neighbors in the bank; None: the run needs no
            labels.
        validation: a share of each class of the labelled bank that is classified by the rest of it:
            an accuracy that may choose a checkpoint, as the one of the queries must not.
        labels: a side table of the bank, see `labelled.labelled_pair`; None: the packed labels.
        feature: of the head, as in the published notebook, or of the backbone.
        k, t: neighbors that vote, and the temperature of their votes.
        lidar: measure LiDAR too, which looks at ten views each of 1,000 images.
        every: in epochs.
    """

    bank: Path | None = None
    queries: Path | None = None
    validation: Annotated[float, Field(gt=0, le=0.5)] | None = None
    labels: str | None = None
    feature: Literal["head", "backbone"] = "head"
    k: Count = 200
    t: Positive = 0.1
    lidar: bool = False
    every: Count = 1

    @property
    def labelled(self) -> bool:
        """Whether the bank's labels are read."""
        return self.queries is not None or self.validation is not None

    @model_validator(mode="after")
    def _labels_of_the_bank(self) -> "Monitor":
        if self.bank is None and (self.labelled or self.labels):
            raise ValueError("queries, validation and labels need a labelled bank: name it")
        return self


class Checkpoints(Strict):
    """When a run is saved.

    Attributes:
        every, minutes: between checkpoints, in steps or in minutes of rank 0's clock: one of the
            two; neither: 30 minutes.
        keep: the newest ones.
        best: keep the one with the highest such number of the monitor beside them, and save
            whenever it is reached: "rankme" of the backbone, "rankme_head", or "knn_top1", which
            is that of `monitor.validation` and never of the queries.
    """

    every: Count | None = None
    minutes: Positive | None = None
    keep: Annotated[int, Field(ge=2)] = 2
    best: Literal["rankme", "rankme_head", "knn_top1"] | None = None

    @property
    def best_metric(self) -> str | None:
        """The name in the metrics of the number that `best` goes by."""
        return "validation_top1" if self.best == "knn_top1" else self.best

    @model_validator(mode="before")
    @classmethod
    def _by_the_clock(cls, values: Any) -> Any:
        if isinstance(values, Mapping) and values.get("every") is None:
            return {"minutes": 30.0, **values}
        return values

    @model_validator(mode="after")
    def _one_interval(self) -> "Checkpoints":
        if (self.every is None) == (self.minutes is None):
            raise ValueError("name either every or minutes, the other null")
        return self
