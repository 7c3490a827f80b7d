"""The loader alone: decoder, hardware share, threads, against ImageFolder; and its pixels."""

import multiprocessing
import os
import time
from collections.abc import Generator
from contextlib import closing
from itertools import islice
from pathlib import Path
from statistics import mean

import torch
from baselines.loaders import official_views

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from gpu_phases.measure import forget, wait
from gpu_phases.task import Figures, Item, Items, Task

SECONDS = 3.0  # of each measurement
WARM_UP = 4  # batches behind the first: more than are made ahead
COMPARED = 4  # batches whose pixels are compared
WORKERS = 16  # of ImageFolder's DataLoader
SMALL_BATCH = 64  # of ImageFolder's, whose workers make two batches each ahead: see `image_folder`
# Decoder ("fused": views drawn on the CPU and copied, no DALI), share of the hardware's, threads.
Way = tuple[str, float, int]
WAYS: tuple[Way, ...] = (
    ("mixed", 0.65, 8),
    ("cpu", 0.0, 16),
    ("fused", 0.0, 16),
    ("mixed", 0.9, 8),
    ("mixed", 0.0, 8),
    ("mixed", 0.65, 16),
    ("mixed", 0.65, 4),
    ("cpu", 0.0, 8),
    ("cpu", 0.0, 4),
    ("mixed", 0.9, 16),
    ("mixed", 0.0, 16),
    ("mixed", 0.9, 4),
    ("mixed", 0.0, 4),
)
TOY_WAYS: tuple[Way, ...] = (("cpu", 0.0, 1), ("fused", 0.0, 2))


def items(task: Task) -> Items:
    """Return the ways to decode in the order of their worth, ImageFolder and the pixels."""
    ways = TOY_WAYS if task.dry else WAYS
    draws = {get_name(way): Item(lambda way=way: draw(task, way)) for way in ways}
    first, second, *rest = draws
    workers = 1 if task.dry else WORKERS
    decoders = ("cpu",) if task.dry else ("mixed", "cpu")
    return {
        # Before this process has CUDA and threads of DALI: its workers are forks.
        f"draw/ImageFolder, PIL, {workers} workers": Item(lambda: image_folder(task, workers)),
        first: draws[first],
        second: draws[second],
        **{
            f"pixels/decoded by {decoder}, drawn on {task.device}": Item(
                lambda decoder=decoder: pixels(task, decoder)
            )
            for decoder in decoders
        },
        **{name: draws[name] for name in rest},
    }


def get_name(way: Way) -> str:
    """Return what the page calls a way to decode."""
    decoder, load, threads = way
    share = f", hardware {load:g}" if decoder == "mixed" else ""
    if decoder == "fused":
        return f"draw/ours, fused and copied, {threads} threads"
    return f"draw/ours, decode {decoder}{share}, {threads} threads"


def recipe_of(task: Task, way: Way, device: str) -> Recipe:
    """Return the shipped recipe of MoCo v2 on the photographs."""
    decoder, load, threads = way
    options = [
        f"runtime.executor={'fused' if decoder == 'fused' else 'dali'}",
        f"runtime.decode={'auto' if decoder == 'fused' else decoder}",
        f"runtime.hw_decoder_load={load}",
        f"runtime.threads={threads}",
    ]
    toy = ["encoder.image_size=32", "batch=16", "objective.bn_group=8"] if task.dry else []
    return load_recipe("moco_v2_imagenet_r50", [*options, f"runtime.device={device}", *toy])


def draw(task: Task, way: Way) -> Figures:
    """Measure our loader."""
    from fastmoco.load import dali_executor, fused_executor  # noqa: F401  # not what is measured

    forget()
    device = torch.device(task.device)
    recipe = recipe_of(task, way, task.device)
    began = time.perf_counter()
    loader = Loader.of(
        recipe, ConcatShardSets.open([task.set]), get_settings(recipe.runtime, World(), device)
    )
    views = (batch.views for batch in loader.batches())
    return _drawn(task, views, WARM_UP, began, device)


def image_folder(task: Task, workers: int) -> Figures:
    """Measure the official loader.

    Its workers start all at once and make two batches each ahead: so many and more are dropped
    before the measurement, or what they have in store would count as drawn in no time.
    """
    batch, size = (8, 32) if task.dry else (SMALL_BATCH, 224)
    began = time.perf_counter()
    views = official_views(str(task.images), size, batch, 10**5, workers)
    warm_up = 2 * workers + workers // 2
    return _drawn(task, views, warm_up, began, torch.device("cpu"))


def _drawn(
    task: Task,
    views: Generator[tuple[torch.Tensor, ...]],
    warm_up: int,
    began: float,
    device: torch.device,
) -> Figures:
    with closing(views):
        next(views)
        wait(device)
        first_batch_s = time.perf_counter() - began
        for _ in range(warm_up):
            next(views)
        wait(device)
        images, busy, began = 0, _cpu_seconds(), time.perf_counter()
        while (elapsed := time.perf_counter() - began) < (0.2 if task.dry else SECONDS):
            images += len(next(views)[0])
            wait(device)  # else the host would only have asked for them
        busy = _cpu_seconds() - busy
        memory = _device_memory(device)
    return {
        "images_per_s": images / elapsed,
        "cores": busy / elapsed,
        "first_batch_s": first_batch_s,
        "memory_gb": memory,
    }


def _cpu_seconds() -> float:
    """Return the CPU time of this process and of the workers that it has, so far."""
    own = (process.pid for process in multiprocessing.active_children())
    ticks = 0
    for pid in (os.getpid(), *own):
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        ticks += int(fields[11]) + int(fields[12])  # utime and stime, see proc(5)
    return ticks / os.sysconf("SC_CLK_TCK")


def _device_memory(device: torch.device) -> float | None:
    """Return what is in use on a GPU, DALI's share too, in GB."""
    if device.type != "cuda":
        return None
    free, total = torch.cuda.mem_get_info(device)
    return (total - free) / 1e9


def pixels(task: Task, decoder: str) -> Figures:
    """Compare the views of the first batches with those that the CPU draws."""
    threads = 1 if task.dry else 8
    load = 0.65 if decoder == "mixed" else 0.0
    sums, largest, images = [], 0.0, 0
    with (
        closing(_levels(task, ("cpu", 0.0, threads), "cpu")) as theirs,
        closing(_levels(task, (decoder, load, threads), task.device)) as ours,
    ):
        for here, there in islice(zip(ours, theirs, strict=True), COMPARED):
            difference = (here - there).abs()
            sums.append(float(difference.mean()))
            largest = max(largest, float(difference.max()))
            images += len(here) // 2
    return {"mean": mean(sums), "largest": largest, "images": images}


def _levels(task: Task, way: Way, device: str) -> Generator[torch.Tensor]:
    """Yield both views of each batch, one after the other, in host memory, levels of 0..255."""
    recipe = recipe_of(task, way, device)
    assert recipe.encoder.mean and recipe.encoder.std
    center, std = (
        torch.tensor(x)[:, None, None] for x in (recipe.encoder.mean, recipe.encoder.std)
    )
    settings = get_settings(recipe.runtime, World(), torch.device(device))
    loader = Loader.of(recipe, ConcatShardSets.open([task.set]), settings)
    for batch in loader.batches():
        yield 255 * (torch.cat(batch.views).float().cpu() * std + center)
