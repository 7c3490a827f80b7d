"""The training step on synthetic batches: ours in its variants, and the official one."""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch
from baselines.reference_moco import OfficialMoCo

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine, build_encoder
from fastmoco.train.objectives.momentum import momentum_update
from gpu_phases.measure import forget, peak_memory_gb, profiled, seconds_of, wait
from gpu_phases.task import Figures, Item, Items, Task

COMPILING_S = 75.0  # that torch.compile may need before the first step
WARM_UP, SECONDS = 3, 2.0  # steps before each measurement, and its length
# Of ResNet-50 at 224 px, an image and a step of MoCo in bf16, nothing fused: counted from its
# shapes, three passes of BatchNorm forwards and five backwards.
BYTES_PER_IMAGE, FLOP_PER_IMAGE = 659e6, 32.5e9
EXACT = 1e-5  # that an update in fp32 may differ from one in fp64
Views = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor, int], Any]


@dataclass(frozen=True)
class Variant:
    """A step to measure.

    Attributes:
        batch: images.
        engine: "ours", "official" (fp32, NCHW) or "tuned" (the official one in bf16 and
            channels-last).
        bn: of ours, as the recipe has it.
        compiled: by torch.compile.
    """

    batch: int
    engine: str = "ours"
    bn: str = "groups"
    compiled: bool = False

    def name(self, group: int) -> str:
        """Return what the page calls it."""
        if self.engine != "ours":
            how = "fp32" if self.engine == "official" else "bf16, channels-last"
            return f"step/official, {how}, {self.batch}"
        bn = f"groups of {group}" if self.bn == "groups" else "plain BatchNorm"
        return f"step/ours, {'compiled' if self.compiled else 'eager'}, {bn}, {self.batch}"


def variants(large: int, small: int) -> list[Variant]:
    """Return the steps in the order of their worth.

    A small batch is one group, as a rank of eight holds it: there, plain BatchNorm is the same.
    """
    return [
        Variant(large),
        Variant(large, "official"),
        Variant(large, "tuned"),
        Variant(small, bn="whole"),
        Variant(large, bn="whole"),
        Variant(small, "official", bn="whole"),
        Variant(small, "tuned", bn="whole"),
        Variant(large, compiled=True),
        Variant(small, bn="whole", compiled=True),
        Variant(large, bn="whole", compiled=True),
    ]


def items(task: Task) -> Items:
    """Return the momentum update, then the steps."""
    large, small = (16, 4) if task.dry else (256, 32)
    group = small
    steps = {
        one.name(group): Item(
            lambda one=one: step(task, one, group),
            least=COMPILING_S if one.compiled and not task.dry else 0.0,
        )
        for one in variants(large, small)
    }
    updates = {"momentum/as in the package": momentum_update, "momentum/_fused_sgd_": by_fused_sgd}
    return {
        **{
            name: Item(lambda update=update: momentum(task, update))
            for name, update in updates.items()
        },
        **steps,
    }


def recipe_of(task: Task, batch: int, group: int, bn: str) -> Recipe:
    """Return the shipped recipe of MoCo v2 with these sizes."""
    toy = (
        ["encoder.arch=resnet18", "encoder.image_size=32", "objective.queue=256"]
        if task.dry
        else []
    )
    options = [
        f"batch={batch}",
        f"objective.bn={bn}",
        f"objective.bn_group={group}",
        f"runtime.device={task.device}",
    ]
    return load_recipe("moco_v2_imagenet_r50", [*options, *toy])


def step(task: Task, variant: Variant, group: int) -> Figures:
    """Measure a step."""
    forget()
    device = torch.device(task.device)
    torch.backends.cudnn.benchmark = device.type == "cuda"  # as in the official code and in ours
    recipe = recipe_of(task, variant.batch, group, variant.bn)
    batches = cycle([synthetic(recipe, variant.engine, device) for _ in range(2)])
    take = engine_of(recipe, variant, device)
    losses = [take(*next(batches), number) for number in range(1 if task.dry else WARM_UP)]
    if not all(bool(torch.isfinite(loss).all()) for loss in losses):
        raise ArithmeticError("the loss of the first steps is not finite")
    seconds = seconds_of(
        lambda number: take(*next(batches), number), device, 0.1 if task.dry else SECONDS
    )
    memory = peak_memory_gb(device)
    views = next(batches)
    return {
        "images_per_s": variant.batch / seconds,
        "ms": 1e3 * seconds,
        "memory_gb": memory,
        **profiled(lambda: take(*views, 0), device).figures(),
        # What they count is this network alone.
        "bytes_per_image": None if task.dry else BYTES_PER_IMAGE,
        "flop_per_image": None if task.dry else FLOP_PER_IMAGE,
    }


def engine_of(recipe: Recipe, variant: Variant, device: torch.device) -> Step:
    """Return the step of a variant; it returns the loss."""
    if variant.engine != "ours":
        return OfficialMoCo(recipe, World(), device, tuned=variant.engine == "tuned").step
    on_gpu = device.type == "cuda"
    compiles = variant.compiled and on_gpu
    moco = Engine(
        recipe.model_copy(
            update={"runtime": recipe.runtime.model_copy(update={"compile": compiles})}
        ),
        World(),
        device,
    )
    if variant.compiled and not on_gpu:
        # A dry run need not wait a minute for a C++ compiler.
        moco.encoder_q.compile(backend="aot_eager")
        moco.objective.encoder_k.compile(backend="aot_eager")
    return lambda query_view, key_view, number: moco.step(query_view, key_view, number).loss


def synthetic(recipe: Recipe, engine: str, device: torch.device) -> Views:
    """Return two views that look alike, in the dtype and layout of the engine's loader."""
    size = (recipe.batch, 3, recipe.encoder.image_size, recipe.encoder.image_size)
    image = torch.randn(size, device=device)
    layout = torch.contiguous_format if engine == "official" else torch.channels_last
    half = engine == "ours" and device.type == "cuda"  # what DALI hands over there
    query_view, key_view = (
        (image + 0.3 * torch.randn_like(image)).to(
            torch.float16 if half else torch.float32, memory_format=layout
        )
        for _ in range(2)
    )
    return query_view, key_view


def by_fused_sgd(
    keys: list[torch.Tensor], queries: list[torch.Tensor], m: float, ok: torch.Tensor
) -> None:
    """Move keys towards queries in one kernel: a step of SGD along queries - keys.

    With `maximize` and weight decay 1 the gradient is k - q, so that k - (1 - m) (k - q) comes out.
    """
    torch._fused_sgd_(
        keys,
        queries,
        [],
        weight_decay=1.0,
        momentum=0.0,
        lr=1 - m,
        dampening=0.0,
        nesterov=False,
        maximize=True,
        is_first_step=False,
        found_inf=(~ok).float(),
    )


def momentum(task: Task, update: Callable[..., None]) -> Figures:
    """Measure an update of all parameters: kernels, waits, time, and whether it is right."""
    forget()
    device = torch.device(task.device)
    encoder = build_encoder(recipe_of(task, 16, 4, "groups")).to(device)
    keys = [p.detach().clone() for p in encoder.parameters()]
    queries = [p + torch.randn_like(p) for p in keys]
    before = [k.clone() for k in keys]
    yes, no = torch.ones((), dtype=torch.bool, device=device), torch.zeros_like
    m = 0.99
    with torch.no_grad():
        update(keys, queries, m, no(yes))
        if not all(map(torch.equal, keys, before)):
            raise ArithmeticError("a step that is to be skipped moves the keys")
        update(keys, queries, m, yes)
        wanted = [
            m * k.double() + (1 - m) * q.double() for k, q in zip(before, queries, strict=True)
        ]
        difference = max(float((k - w).abs().max()) for k, w in zip(keys, wanted, strict=True))
        if not difference <= EXACT:  # NaN too
            raise ArithmeticError(f"the keys are off by {difference:.1e}")
        waits = _waits(lambda: update(keys, queries, m, yes), device)
        ran = profiled(lambda: update(keys, queries, m, yes), device)
        seconds = seconds_of(lambda _: update(keys, queries, m, yes), device, 0.1)
    return {
        "kernels": ran.kernels,
        "waits": waits,
        "ms": 1e3 * seconds,
        "difference": difference,
        "parameters": len(keys),
    }


def _waits(work: Callable[[], None], device: torch.device) -> str | None:
    """Return whether torch says that the host waits: "yes" or "no"; None on a CPU."""
    if device.type != "cuda":
        return None
    wait(device)
    torch.cuda.set_sync_debug_mode("error")
    try:
        work()
    except RuntimeError as error:
        if "synchroniz" not in str(error):
            raise
        return "yes"
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return "no"
