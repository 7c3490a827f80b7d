"""What a step asks of torch, counted call by call; and a worker that counts on two ranks.

python counters.py OUT '{"engine": "ours", "recipe": {...}}'
"""

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from baselines.reference_moco import OfficialMoCo
from recipes import overrides
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastmoco.check.throughput import synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, init_distributed
from fastmoco.train.engine import Engine

SYNCS = ("aten::_local_scalar_dense", "aten::nonzero", "aten::is_nonzero")
OPTIONS = {
    "arch": "resnet18",
    "image_size": 32,
    "batch": 16,
    "bn_group": 8,
    "queue": 48,
    "dim": 24,
    "precision": "bf16",
    "device": "cpu",
}


@dataclass(frozen=True)
class Seen:
    """A tensor that went into an operator or came out of it.

    Attributes:
        layout: "last" or "first" of channels; "" where it does not show, or is neither.
        fresh: it is an output with memory of its own.
    """

    shape: tuple[int, ...]
    bytes: int
    layout: str
    fresh: bool = False


@dataclass(frozen=True)
class Call:
    """One call of an operator, such as aten.mm or c10d.allreduce_."""

    name: str
    inputs: list[Seen]
    outputs: list[Seen]


class Counter(TorchDispatchMode):
    """Records every operator that runs below it, those of autograd and of c10d too."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = tensors_in((args, kwargs or {}))
        inputs = [seen(t) for t in given]
        known = {t.untyped_storage().data_ptr() for t in given}
        result = func(*args, **(kwargs or {}))
        outputs = [seen(t, known) for t in tensors_in(result)]
        self.calls.append(Call(func.overloadpacket._qualified_op_name, inputs, outputs))
        return result

    def named(self, *names: str) -> list[Call]:
        return [call for call in self.calls if call.name in names]

    def fresh(self) -> Iterator[Seen]:
        return (t for call in self.calls for t in call.outputs if t.fresh)

    def collectives(self) -> list[Call]:
        return [call for call in self.calls if call.name.startswith("c10d::")]

    def conversions(self) -> list[Call]:
        """Return the calls that copy an activation into the other layout, and convolutions that
        are given an activation or gradient in another layout than channels-last."""
        copies = self.named("aten::clone", "aten::contiguous", "aten::_to_copy", "aten::copy_")
        turned = [
            c for c in copies if {c.inputs[-1].layout, c.outputs[0].layout} >= {"last", "first"}
        ]
        convolutions = self.named("aten::convolution", "aten::convolution_backward")
        return turned + [c for c in convolutions if any(t.layout == "first" for t in c.inputs)]


def tensors_in(tree: Any) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def seen(t: torch.Tensor, known: set[int] | None = None) -> Seen:
    fresh = known is not None and t.untyped_storage().data_ptr() not in known
    return Seen(tuple(t.shape), t.numel() * t.element_size(), layout_of(t), fresh)


def layout_of(t: torch.Tensor) -> str:
    if t.dim() != 4:
        return ""
    last = t.is_contiguous(memory_format=torch.channels_last)
    first = t.is_contiguous()
    return "" if last == first else "last" if last else "first"


Step = Callable[[int], object]


def steps_of(engine: str, recipe: Recipe, world: World = World()) -> tuple[Any, Step]:
    """Return the engine "ours" or "official", and a function that takes its step by number."""
    kind = Engine if engine == "ours" else OfficialMoCo
    made = kind(recipe, world, torch.device("cpu"))
    layout = torch.channels_last if engine == "ours" else torch.contiguous_format
    share = world.share(recipe.batch)
    (whole,) = synthetic(recipe.batch, recipe.encoder.image_size, 1)
    views = [view[share].contiguous(memory_format=layout) for view in whole]
    return made, lambda number: made.step(*views, number)


def trained(made: Any) -> list[torch.Tensor]:
    return list(made.optimizer.param_groups[0]["params"])


def counted(step: Callable[[], object]) -> Counter:
    with Counter() as counter:
        step()
    return counter


def host_syncs(step: Callable[[], object]) -> int:
    """Return how often the host asked for a number, inside of operators too."""
    with profile(activities=[ProfilerActivity.CPU]) as record:
        step()
    return sum(event.name in SYNCS for event in record.events())


def recipe_of(**changes: Any) -> Recipe:
    options = overrides(**OPTIONS | changes)
    return load_recipe("moco_v2_imagenet_r50", options)


def main(out: Path, spec: dict[str, Any]) -> None:
    recipe = recipe_of(**spec.get("recipe", {}))
    with init_distributed("cpu", timeout_s=120) as (world, _):
        made, step = steps_of(spec["engine"], recipe, world)
        for number in range(2):  # DDP settles its buckets in the first two
            step(number)
        counter = counted(lambda: step(2))
        if world.is_main:
            rows = [(call.name, [t.bytes for t in call.inputs]) for call in counter.collectives()]
            parameters = sum(4 * p.numel() for p in trained(made))
            torch.save({"collectives": rows, "parameter_bytes": parameters}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
