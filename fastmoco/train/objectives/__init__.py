"""What a method adds to the step: keys, loss, and what follows the optimizer."""

from collections.abc import Callable

from fastmoco.config import objectives as config
from fastmoco.config.objectives import Objective as ObjectiveConfig
from fastmoco.train.objectives.end_to_end import EndToEnd
from fastmoco.train.objectives.memory_bank import MemoryBank
from fastmoco.train.objectives.moco import Moco
from fastmoco.train.objectives.objective import Objective
from fastmoco.train.objectives.simclr import SimClr

OBJECTIVES: dict[type[ObjectiveConfig], Callable[..., Objective]] = {
    config.Moco: Moco,
    config.EndToEnd: EndToEnd,
    config.SimClr: SimClr,
    config.MemoryBank: MemoryBank,
}
"""By their section of the recipe: a new objective is a line here and one in the config's union."""
