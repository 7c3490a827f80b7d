"""What a checkpoint costs the steps around it, in a run that logs each step."""

import statistics
from collections.abc import Sequence

from fastmoco.config.loading import load_recipe
from gpu_phases.run import ENDING_S, STARTING_S, get_rows, started
from gpu_phases.task import Figures, Item, Items, Task

EVERY, SAVES = 40, 3  # steps between two saves: enough for one to be written


def items(task: Task) -> Items:
    """Return the run."""
    name = "save/resnet10 at 32 px, 16" if task.dry else "save/resnet50 at 224 px, 256"
    return {name: Item(lambda: run(task), least=STARTING_S)}


def run(task: Task) -> Figures:
    """Train MoCo v2's recipe on the photographs and save every so often."""
    every = 2 if task.dry else EVERY
    options = [
        f'data.sets=["{task.set}"]',
        f"runtime.device={task.device}",
        f"checkpoints.every={every}",
        "runtime.log_every=1",
        f"schedule={{steps: {every * (SAVES + 1)}}}",
    ]
    if task.dry:
        options += [
            "encoder.arch=resnet10",
            "encoder.image_size=32",
            "batch=16",
            "objective.bn_group=8",
            "objective.queue=256",
        ]
    out = task.work / "checkpoints"
    with started("moco_v2_imagenet_r50", out, options) as process:
        rows = list(get_rows(process, out, task.until - ENDING_S / 2))
    batch = load_recipe(str(out / "config.yaml")).batch
    ms = [1e3 * batch / row["images_per_s"] for row in rows if row["kind"] == "step"]
    newest = max((out / "checkpoints").glob("step-*/state.pt"))
    return {**cost(ms, every), "size_mb": newest.stat().st_size / 1e6}


def cost(ms: Sequence[float], every: int) -> Figures:
    """Return what saves cost.

    Args:
        ms: of each step, the first one first; a save falls to the step that follows it.
        every: steps between two saves.
    """
    typical = statistics.median(ms[every // 2 :])  # the first steps warm up
    after = [ms[start : start + every] for start in range(every, len(ms) - every + 1, every)]
    if not after:
        raise RuntimeError(f"{len(ms)} steps, of which none follow a save")
    extra = [sum(part) - len(part) * typical for part in after]
    return {
        "ms": typical,
        "longest_ms": max(max(part) for part in after),
        "extra_ms": statistics.mean(extra),
        "saves": len(after),
    }
