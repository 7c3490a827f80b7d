"""Loader and step together, against the same step on batches that are there already."""

from typing import Any

from fastmoco.check.throughput import Timer, step_alone, together
from fastmoco.config.loading import load_recipe
from gpu_phases.measure import forget
from gpu_phases.step import COMPILING_S
from gpu_phases.task import Figures, Item, Items, Task

STEPS = 40


def items(task: Task) -> Items:
    """Return the recipe as shipped, compiled, and compiled with views from the CPU."""
    if task.dry:
        return {"train/resnet10 at 32 px, 16": Item(lambda: compare(task, []))}
    compiled, fused = "runtime.compile=true", "runtime.executor=fused"
    return {
        "train/resnet50 at 224 px, 256": Item(lambda: compare(task, [])),
        "train/the same, compiled": Item(lambda: compare(task, [compiled]), COMPILING_S),
        "train/compiled, drawn by fused": Item(
            lambda: compare(task, [compiled, fused]), COMPILING_S
        ),
    }


def compare(task: Task, more: list[str]) -> Figures:
    """Train MoCo v2's recipe on the photographs, and on synthetic batches."""
    toy = [
        "encoder.arch=resnet10",
        "encoder.image_size=32",
        "batch=16",
        "objective.bn_group=8",
        "objective.queue=256",
    ]
    options = [
        f"runtime.device={task.device}",
        f'data.sets=["{task.set}"]',
        *more,
        *(toy if task.dry else []),
    ]
    recipe: dict[str, Any] = load_recipe("moco_v2_imagenet_r50", options).model_dump(mode="json")
    steps = 3 if task.dry else STEPS
    rates, details = [], {}
    for arm in (step_alone, together):
        forget()
        section = Timer()
        done = arm(section, recipe, steps)  # type: ignore[arg-type]
        rates.append(done["images"] / section.seconds)
        details |= done.get("details", {})
    return {"synthetic": rates[0], "real": rates[1], "ratio": rates[1] / rates[0], **details}
