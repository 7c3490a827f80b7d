"""What is minimized: one section for each objective, told apart by its `name`."""

from typing import Literal

from fastmoco.core.strict_yaml import Count, Positive, Strict, Unit


class Moco(Strict):
    """Momentum Contrast (He et al. 2020).

    Attributes:
        name: of the objective.
        queue: number of negative keys K.
        momentum: m of the key encoder.
        temperature: T of the loss.
        symmetric: each view is query and key in turn; what is minimized is the sum of both
            losses, as published, and what is logged their mean.
        bn: "groups": BatchNorm over groups of `bn_group`; "whole": over the whole batch of all
            ranks together, through which query and key leak to each other: for ablations.
        bn_group: samples normalized together by BatchNorm, whatever the number of ranks.
        shuffle: who changes places before the keys are made: "global": all samples of the batch;
            "node": those of one machine, which spares the network (the groups then depend on the
            number of machines); "off": none, for ablations.
        exchange: how shuffled images travel: "all_to_all": each to the rank that needs it, the
            fewest bytes; "all_gather": all to all, as published. The result is the same.
    """

    name: Literal["moco"] = "moco"
    queue: Count = 65536
    momentum: Unit = 0.999
    temperature: Positive = 0.07
    symmetric: bool = False
    bn: Literal["groups", "whole"] = "groups"
    bn_group: Count = 32
    shuffle: Literal["global", "node", "off"] = "global"
    exchange: Literal["all_to_all", "all_gather"] = "all_to_all"


Objective = Moco
"""Their union, by `name`: a new objective is a class above and a `|` here."""
