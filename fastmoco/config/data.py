"""The images of a run: which sets, which of their samples, how often each."""

from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator, model_validator

from fastmoco.core.strict_yaml import Count, Positive, Strict


class Subset(Strict):
    """Which samples of the data take part: those of a list, or a share of every class.

    Attributes:
        ids: a text of one sample id a line, or a `.npy` of integers.
        fraction: of every class, as in the 1 % and 10 % protocols; at least one sample of each.
        labels: side table of the data that tells the classes; None: the packed labels.
        seed: of the choice; the share of a smaller fraction is part of that of a larger one.
    """

    ids: Path | None = None
    fraction: Annotated[float, Field(gt=0, le=1)] | None = None
    labels: str | None = None
    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0

    @model_validator(mode="after")
    def _one_of_two(self) -> "Subset":
        if (self.ids is None) == (self.fraction is None):
            raise ValueError("name either ids or fraction")
        return self


class Weights(Strict):
    """How often an epoch shows each sample: in proportion to a number h of it.

    Attributes:
        file: one number a sample, as `fastmoco hardness` writes it: a CSV with the columns `sample`
            and `hardness` (or `weight`, `score`), or a `.npy` in id order.
        power: weights are (h / mean h)^power; above 1, hard samples come more often still.
        bound: weights are clipped to 1 / bound .. bound.
    """

    file: Path
    power: Positive = 1.0
    bound: Annotated[float, Field(ge=1)] = 4.0


class Data(Strict):
    """The images of a run.

    Attributes:
        sets: shard sets, as one; ids run through them in order.
        subset: which of their samples take part; None: all.
        repeat: times that an epoch shows each sample: short epochs of small sets become long ones.
        weights: how often each sample is shown, a file or a section; None: equally often.
        window: shards shuffled together, in random order, for storage that cannot seek; None: all.
        max_bad_images: damaged images to allow, each replaced by the next good one of the epoch;
            0: the first one ends the run.
    """

    sets: Annotated[tuple[Path, ...], Field(min_length=1)]
    subset: Subset | None = None
    weights: Weights | None = None
    repeat: Count = 1
    window: Count | None = None
    max_bad_images: Annotated[int, Field(ge=0)] = 0

    @field_validator("sets", mode="before")
    @classmethod
    def _one_set(cls, value: Any) -> Any:
        return [value] if isinstance(value, str) else value

    @field_validator("weights", mode="before")
    @classmethod
    def _file_alone(cls, value: Any) -> Any:
        return {"file": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _one_order(self) -> "Data":
        if self.weights and self.window:
            raise ValueError("weights draw from all shards at once: leave out window or weights")
        return self
