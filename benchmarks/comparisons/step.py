"""The training step on synthetic batches: ours against the official one.

Both start from equal weights and see the same batches, each in the layout that its own loader
gives. BatchNorm normalizes the whole share of a rank at once in both. The proof of equal work is
the loss of the first steps; on several ranks the two draw other shuffles, and it is only near.
"""

import os
import socket
from collections.abc import Callable
from dataclasses import asdict, dataclass
from itertools import cycle, islice
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from typing import Any

import torch
from harness.arm import Section
from harness.compare import Arm, OnRow, compare
from harness.report import Report

from fastmoco.check.throughput import BATCHES, synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device, init_distributed
from fastmoco.errors import UsageError

WARM_UP = 3  # steps before the section, whose losses are the proof
TIMEOUT_S = 300.0  # that a rank waits for another one, which may have failed
TOLERANCE = 0.1  # of those losses, for bf16 and for other shuffles

Views = tuple[torch.Tensor, torch.Tensor]
Step = Callable[[torch.Tensor, torch.Tensor, int], torch.Tensor]
"""Takes query view, key view and step number; returns the loss, one number or one a sample."""


@dataclass(frozen=True)
class Settings:
    """What every arm does.

    Attributes:
        arch: of the encoders.
        size: side of the views, pixels.
        batch: images a step over all ranks.
        queue: keys, a whole number of batches.
        precision: of our step, "bf16" or "fp32"; the official one is in fp32.
        ranks: processes that share a batch.
        steps: in the measured section.
        device: "auto", "cpu" or "cuda".
        tuned: measure the official step with our precision and channels-last too.
    """

    arch: str = "resnet18"
    size: int = 64
    batch: int = 64
    queue: int = 65536
    precision: str = "bf16"
    ranks: int = 1
    steps: int = 40
    device: str = "auto"
    tuned: bool = False

    def recipe(self) -> Recipe:
        """Return the shipped recipe of MoCo v2 with these settings.

        Raises:
            UsageError: they do not fit together.
        """
        if self.batch % self.ranks or self.queue % self.batch:
            raise UsageError(
                f"The official step takes equal shares and whole batches: batch {self.batch} must "
                f"be a multiple of ranks {self.ranks}, and queue {self.queue} one of the batch."
            )
        values = {
            "encoder.arch": self.arch,
            "encoder.image_size": self.size,
            "batch": self.batch,
            # The official code normalizes what one process holds.
            "objective.bn": "whole" if self.ranks == 1 else "groups",
            "objective.bn_group": self.batch // self.ranks,
            "objective.queue": self.queue,
            "runtime.precision": self.precision,
            "runtime.device": self.device,
        }
        return load_recipe("moco_v2_imagenet_r50", [f"{k}={v}" for k, v in values.items()])


def bench_step(
    settings: Settings, pairs: int, against_itself: bool = False, on_row: OnRow | None = None
) -> Report:
    """Measure how fast the step is.

    Raises:
        UsageError: the settings do not fit together, or there are more ranks than GPUs.
        ArmFailed: an arm failed.
    """
    settings.recipe()
    get_device(settings.device, settings.ranks - 1)
    engines = {"fastmoco": "ours", "official": "official"}
    if settings.tuned:
        engines[f"official, {settings.precision}, channels-last"] = "tuned"
    target, options = f"{__name__}:arm", asdict(settings)
    arms = {name: Arm.of(target, engine=engine, **options) for name, engine in engines.items()}
    return compare(
        arms,
        pairs,
        on_row=on_row,
        against_itself=against_itself,
        tolerance=TOLERANCE,
        subject=options,
    )


def arm(section: Section, engine: str, **options: Any) -> dict[str, Any]:
    """Measure an engine ("ours", "official", "tuned"); this process is its rank 0."""
    settings = Settings(**options)
    others = _start_others(engine, settings) if settings.ranks > 1 else []
    done = _run_rank(section, engine, settings)
    for process in others:
        process.join()
    return done


def _start_others(engine: str, settings: Settings) -> list[BaseProcess]:
    """Start the ranks from 1 on, and make this process rank 0 as torchrun would."""
    size = str(settings.ranks)
    shared = {"WORLD_SIZE": size, "LOCAL_WORLD_SIZE": size}
    os.environ.update(shared, MASTER_ADDR="127.0.0.1", MASTER_PORT=str(_free_port()))
    os.environ.update(RANK="0", LOCAL_RANK="0")
    started: list[BaseProcess] = [
        get_context("spawn").Process(target=_other_rank, args=(rank, engine, settings), daemon=True)
        for rank in range(1, settings.ranks)
    ]
    for process in started:
        process.start()
    return started


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def _other_rank(rank: int, engine: str, settings: Settings) -> None:
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank))
    _run_rank(Section(), engine, settings)


def _run_rank(section: Section, engine: str, settings: Settings) -> dict[str, Any]:
    recipe = settings.recipe()
    torch.manual_seed(recipe.seed)
    with init_distributed(settings.device, TIMEOUT_S) as (world, device):
        step = _step_of(engine, recipe, world, device)
        layout = torch.contiguous_format if engine == "official" else torch.channels_last
        share = world.share(recipe.batch)
        batches = [
            (q[share].to(device, memory_format=layout), k[share].to(device, memory_format=layout))
            for q, k in synthetic(recipe.batch, recipe.encoder.image_size, BATCHES)
        ]
        losses = [float(world.mean_(step(*batches[i], i).mean())) for i in range(WARM_UP)]
        _wait(world, device)
        with section:
            for number, views in enumerate(islice(cycle(batches), settings.steps), WARM_UP):
                step(*views, number)
            _wait(world, device)
    return {
        "images": settings.steps * recipe.batch,
        "check": {"losses": losses},
        "details": {"ms_per_step": 1e3 * section.seconds / settings.steps},
    }


def _step_of(engine: str, recipe: Recipe, world: World, device: torch.device) -> Step:
    if engine == "ours":
        from fastmoco.train.engine import Engine

        moco = Engine(recipe, world, device)
        return lambda query_view, key_view, step: moco.step(query_view, key_view, step).loss
    from baselines.reference_moco import OfficialMoCo

    return OfficialMoCo(recipe, world, device, tuned=engine == "tuned").step


def _wait(world: World, device: torch.device) -> None:
    """Wait until every rank has done all that it was given."""
    world.mean_(torch.zeros(1, device=device))
    if device.type == "cuda":
        torch.cuda.synchronize(device)
