"""End to end, the same network on the same images: how many times as fast is fastmoco?

    python benchmarks/peers.py FOLDER [--arch resnet18 --size 64 --batch 64 --pairs 5]

The official recipe (written by us from its published code: ImageFolder, PIL, torchvision, a plain
step) and lightly's MoCo v2 (its own transform, modules, loss), each as its users run it (fp32,
NCHW) and tuned (bf16 autocast, channels-last), both with the DataLoader workers that are best for
the official one here. Ours reads a packed set, which is made before and not measured. FOLDER holds
class folders of images.
"""

import copy
import json
import os
import time
from collections.abc import Callable, Generator, Iterator
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from baselines.loaders import lightly_views, official_views
from baselines.reference_moco import OfficialMoCo
from comparisons.loader import Settings as LoaderSettings
from comparisons.loader import best_workers
from harness.arm import Section
from harness.compare import Arm, compare, require_tools
from harness.images import names_of, repeated, scratch_beside, subject_of, warm
from harness.record import Record
from harness.table import line_of, show
from rich.console import Console
from torch import nn

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from fastmoco.pretrain import resolve
from fastmoco.train.engine import Engine

WARM_UP = 4  # steps before the section
Step = Callable[[torch.Tensor, torch.Tensor], object]
Views = tuple[torch.Tensor, ...]


def recipe_of(root: str, options: dict[str, Any]) -> Recipe:
    """Return the recipe of all arms: MoCo v2 on one process, its BatchNorm over the whole batch."""
    overrides = [
        f"data.sets=[{json.dumps(root)}]",
        *("monitor=null", "objective.bn=whole"),
        *(f"{key}={value}" for key, value in options.items()),
    ]
    return load_recipe("moco_v2_imagenet_r50", overrides)


def ours(section: Section, root: str, options: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train as `fastmoco pretrain` does, without its logs."""
    recipe = recipe_of(root, options)
    device = get_device(recipe.runtime.device, 0)
    data = ConcatShardSets.open(recipe.data.sets)
    recipe = resolve(recipe, data.sets[0])

    def batches() -> Iterator[Views]:
        settings = get_settings(recipe.runtime, World(), device)
        return (batch.views for batch in Loader.of(recipe, data, settings).batches())

    def start() -> tuple[nn.Module, Step]:
        engine, numbers = Engine(recipe, World(), device), iter(range(10**9))
        return engine.encoder_q, lambda q, k: engine.step(q, k, next(numbers))

    return _measured(section, start, batches, steps)


def official(
    section: Section, root: str, options: dict[str, Any], steps: int, workers: int, tuned: bool
) -> dict[str, Any]:
    """Train with the official recipe."""
    recipe = recipe_of(root, options)
    device = get_device(recipe.runtime.device, 0)

    def start() -> tuple[nn.Module, Step]:
        moco = OfficialMoCo(recipe, World(), device, tuned)
        return moco.model.encoder_q, lambda q, k: moco.step(q, k, 0)

    views = partial(_views, official_views, root, recipe, steps, workers)
    return _measured(section, start, lambda: _on_device(views(), device, tuned), steps)


def lightly(
    section: Section, root: str, options: dict[str, Any], steps: int, workers: int, tuned: bool
) -> dict[str, Any]:
    """Train with lightly's MoCo v2, as its documentation writes it."""
    recipe = recipe_of(root, options)
    device = get_device(recipe.runtime.device, 0)
    start = partial(_lightly_step, recipe, device, tuned)
    views = partial(_views, lightly_views, root, recipe, steps, workers)
    return _measured(section, start, lambda: _on_device(views(), device, tuned), steps)


def _lightly_step(recipe: Recipe, device: torch.device, tuned: bool) -> tuple[nn.Module, Step]:
    from lightly.loss import NTXentLoss
    from lightly.models.modules import MoCoProjectionHead
    from lightly.models.utils import deactivate_requires_grad, update_momentum
    from torchvision.models import resnet

    net = getattr(resnet, recipe.encoder.arch)()
    width, net.fc = net.fc.in_features, nn.Identity()
    query = nn.Sequential(net, MoCoProjectionHead(width, width, recipe.encoder.dim)).to(device)
    if tuned:
        query.to(memory_format=torch.channels_last)
    key = copy.deepcopy(query)
    deactivate_requires_grad(key)
    bank = (recipe.objective.queue, recipe.encoder.dim)
    criterion = NTXentLoss(recipe.objective.temperature, memory_bank_size=bank).to(device)
    rate = recipe.optimizer.lr or 0.03
    sgd = torch.optim.SGD(query.parameters(), rate, momentum=0.9, weight_decay=1e-4)

    def step(query_view: torch.Tensor, key_view: torch.Tensor) -> torch.Tensor:
        update_momentum(query, key, m=recipe.objective.momentum)
        with torch.autocast(device.type, torch.bfloat16, enabled=tuned):
            q = query(query_view)
            with torch.no_grad():
                k = key(key_view)
        loss: torch.Tensor = criterion(q.float(), k.float())
        sgd.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        sgd.step()
        return loss.detach()

    return query, step


def _views(
    draw: Callable[..., Generator[Views]], root: str, recipe: Recipe, steps: int, workers: int
) -> Generator[Views]:
    return draw(root, recipe.encoder.image_size, recipe.batch, WARM_UP + steps, workers)


def _on_device(views: Iterator[Views], device: torch.device, tuned: bool) -> Iterator[Views]:
    layout = torch.channels_last if tuned else torch.contiguous_format
    for pair in views:
        yield tuple(view.to(device, memory_format=layout, non_blocking=True) for view in pair)


def _measured(
    section: Section,
    start: Callable[[], tuple[nn.Module, Step]],
    batches: Callable[[], Iterator[Views]],
    steps: int,
) -> dict[str, Any]:
    began = time.perf_counter()
    views = batches()
    encoder, step = start()
    pair = next(views)
    step(*pair)
    first_step_s = time.perf_counter() - began
    for _ in range(WARM_UP - 1):
        step(*next(views))
    on_gpu = pair[0].device.type == "cuda"
    if on_gpu:
        torch.cuda.synchronize()
    with section:
        for _ in range(steps):
            step(*next(views))
        if on_gpu:
            torch.cuda.synchronize()
    count = sum(p.numel() for p in encoder.parameters())
    return {
        "images": steps * len(pair[0]),
        "check": {"shape": list(pair[0].shape), "parameters": count},
        "first_batch_s": first_step_s,
    }


def main(
    folder: Annotated[Path, typer.Argument(help="Class folders of images.")],
    arch: str = "resnet18",
    size: int = 64,
    batch: int = 64,
    queue: int = 16384,
    steps: Annotated[int, typer.Option(help="In the measured section.")] = 40,
    repeat: Annotated[int, typer.Option(help="How many times each image occurs.")] = 1,
    pairs: int = 5,
    device: str = "cpu",
    out: Annotated[Path | None, typer.Option(help="A .jsonl for the rows.")] = None,
) -> None:
    """Measure, in turn, on this machine."""
    require_tools()
    from fastmoco.pack.options import PackOptions
    from fastmoco.pack.packer import pack

    options = {
        "encoder.arch": arch,
        "encoder.image_size": size,
        "batch": batch,
        "objective.queue": queue,
        "objective.bn_group": batch,
        "runtime.device": device,
    }
    names = names_of(folder)
    with scratch_beside(folder) as scratch:
        root = repeated(folder, names, repeat, scratch)
        warm(root)
        pack(root, scratch / "set", PackOptions(workers=len(os.sched_getaffinity(0))))
        tried = LoaderSettings(size=size, batch=batch, rivals=("imagefolder",))
        workers = best_workers(root, tried)
        work = {"options": options, "steps": steps}
        arms = {"fastmoco": Arm.of("peers:ours", root=str(scratch / "set"), **work)}
        for name in ("official", "lightly"):
            for tuned in (False, True):
                given = {"root": str(root), **work, "workers": workers, "tuned": tuned}
                arms[f"{name}, tuned" if tuned else name] = Arm.of(f"peers:{name}", **given)
        record, errors = Record(out, "peers"), Console(stderr=True)

        def on_row(found: Any) -> None:
            record.measurement(found)
            errors.print(line_of(found), markup=False, highlight=False)

        subject = {
            **subject_of(folder, names, repeat),
            **options,
            "steps": steps,
            "workers": workers,
        }
        report = compare(arms, pairs, on_row=on_row, subject=subject)
        record.report(report)
        show(report, Console())
        report.require_result()


if __name__ == "__main__":
    typer.run(main)
