"""What is minimized: one section for each objective, told apart by its `name`."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Discriminator, Tag

from fastmoco.core.strict_yaml import Count, Positive, Strict, Unit


class Normalized(Strict):
    """What the sections share, and what others ask of them.

    Attributes:
        name: of the objective.
        bn: "groups": BatchNorm over groups of `bn_group`; "whole": over the whole batch of all
            ranks together.
        bn_group: samples normalized together by BatchNorm, whatever the number of ranks.
    """

    name: str
    bn: Literal["groups", "whole"] = "groups"
    bn_group: Count = 32

    drawn_views: ClassVar[int] = 2  # of each image
    in_batch: ClassVar[bool] = False  # the samples of a step are compared with each other

    @property
    def encoded_views(self) -> int:
        """Views of each image that the query encoder sees."""
        return 2

    @property
    def shuffled_views(self) -> int:
        """Views of each image that the ranks exchange to shuffle them."""
        return 0

    @property
    def shares_statistics(self) -> bool:
        """Whether query and key share BatchNorm statistics that tell them from the negatives."""
        return False

    def candidates(self, batch: int) -> int:
        """Return among how many keys the right one is to be found: chance is a loss of its log."""
        raise NotImplementedError


class Shuffled(Normalized):
    """Keys are normalized in other company than their queries.

    Attributes:
        shuffle: who changes places before the keys are made: "global": all samples of the batch;
            "node": those of one machine, which spares the network (the groups then depend on the
            number of machines); "off": none, for ablations.
        exchange: how shuffled images travel: "all_to_all": each to the rank that needs it, the
            fewest bytes; "all_gather": all to all, as published. The result is the same.
    """

    shuffle: Literal["global", "node", "off"] = "global"
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"


class Moco(Shuffled):
    """Momentum Contrast (He et al. 2020).

    Attributes:
        queue: number of negative keys K.
        momentum: m of the key encoder.
        temperature: T of the loss.
        symmetric: each view is query and key in turn; what is minimized is the sum of both
            losses, as published, and what is logged their mean.
        bn: "groups": BatchNorm over groups of `bn_group`; "whole": over the whole batch of all
            ranks together, through which query and key leak to each other: for ablations.
    """

    name: Literal["moco"] = "moco"
    queue: Count = 65536
    momentum: Unit = 0.999
    temperature: Positive = 0.07
    symmetric: bool = False

    @property
    def encoded_views(self) -> int:
        """Both if symmetric."""
        return 1 + self.symmetric

    @property
    def shuffled_views(self) -> int:
        """As many as the key encoder sees."""
        return 0 if self.shuffle == "off" else 1 + self.symmetric

    @property
    def shares_statistics(self) -> bool:
        """The negatives are of other batches."""
        return self.bn == "whole" or self.shuffle == "off"

    def candidates(self, batch: int) -> int:
        """Return K + 1."""
        return self.queue + 1


class InBatch(Shuffled):
    """The negatives are the other images of the batch, with gradient.

    Over the whole batch, BatchNorm says nothing of which views belong together: no shuffle.
    """

    in_batch: ClassVar[bool] = True

    @property
    def shuffled_views(self) -> int:
        """The second, unless all are normalized together."""
        return int(self.bn == "groups" and self.shuffle != "off")

    @property
    def shares_statistics(self) -> bool:
        """In a group lie both views of its images, and of no others."""
        return self.bn == "groups" and self.shuffle == "off"


class EndToEnd(InBatch):
    """Keys of the encoder that is trained, with gradient (He et al. 2020, figure 2a).

    Attributes:
        temperature: T of the loss.
        symmetric: each view is query and key in turn; what is minimized is the sum of both
            losses, and what is logged their mean.
    """

    name: Literal["end_to_end"] = "end_to_end"
    temperature: Positive = 0.07
    symmetric: bool = False

    def candidates(self, batch: int) -> int:
        """Return the keys of the batch."""
        return batch


class SimClr(InBatch):
    """SimCLR (Chen et al. 2020).

    Attributes:
        temperature: T of the loss.
        bn: "whole": BatchNorm over both views of the whole batch of all ranks, as published;
            "groups": over groups of `bn_group`, the second view shuffled.
    """

    name: Literal["simclr"] = "simclr"
    bn: Literal["groups", "whole"] = "whole"
    temperature: Positive = 0.5

    def candidates(self, batch: int) -> int:
        """Return all views of the batch but the query itself."""
        return 2 * batch - 1


class MemoryBank(Normalized):
    """A bank of features, one for each image (Wu et al. 2018; He et al. 2020, section 4.1).

    Attributes:
        queue: number of negatives K, drawn from the bank for each step.
        temperature: T of the loss.
        bank_momentum: b: what is left of an image's feature when the image is seen.
    """

    name: Literal["memory_bank"] = "memory_bank"
    queue: Count = 4096
    temperature: Positive = 0.07
    bank_momentum: Unit = 0.5

    drawn_views: ClassVar[int] = 1

    @property
    def encoded_views(self) -> int:
        """The query alone."""
        return 1

    def candidates(self, batch: int) -> int:
        """Return K + 1."""
        return self.queue + 1


def _name_of(section: Any) -> Any:
    """Return which objective a section is of; one without a name is of moco."""
    if isinstance(section, Mapping):
        return section.get("name", "moco")
    return getattr(section, "name", None)


Objective = Annotated[
    Annotated[Moco, Tag("moco")]
    | Annotated[EndToEnd, Tag("end_to_end")]
    | Annotated[SimClr, Tag("simclr")]
    | Annotated[MemoryBank, Tag("memory_bank")],
    Discriminator(_name_of),
]
"""Their union, by `name`: a new objective is a class above and a `|` here."""
