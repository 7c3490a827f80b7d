"""One rank of a tiny run on random images: the tests start it once a rank and read what it saves.

python worker.py OUT '{"steps": 20, "recipe": {...}, "nan": [step, rank]}'
"""

import json
import sys
from pathlib import Path

import numpy as np
import torch
from recipes import recipe_from

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import init_distributed
from fastmoco.core.rng import Ids
from fastmoco.train.engine import Engine
from fastmoco.train.objectives.memory_bank import MemoryBank
from fastmoco.train.objectives.moco import Moco
from fastmoco.train.objectives.objective import Objective
from fastmoco.train.optimizers import set_learning_rate

DEFAULTS = {
    "name": "tiny",
    "data": ["none"],
    "out": "none",
    "arch": "resnet10",
    "stem": "small-stride2",
    "dim": 8,
    "image_size": 8,
    "views": [{}, {}],
    "batch": 16,
    "bn_group": 4,
    "queue": 40,
    "momentum": 0.9,
    "temperature": 0.2,
    "optimizer": {"lr": 0.1, "weight_decay": 1e-3},
    "schedule": {"epochs": 1},
    "precision": "fp64",
    "device": "cpu",
    "max_skipped": 1000,
}

MOCO = ("bn_group", "queue", "momentum", "temperature")


def images(batch: int, step: int, size: int = 8) -> tuple[torch.Tensor, torch.Tensor]:
    """Return two fp64 views of a step's global batch."""
    generator = torch.Generator().manual_seed(step)
    base = torch.randn(batch, 3, size, size, generator=generator, dtype=torch.float64)
    noise = torch.randn(2, *base.shape, generator=generator, dtype=torch.float64)
    views = (base + 0.3 * noise).unbind(0)
    return tuple(view.contiguous(memory_format=torch.channels_last) for view in views)


def recipe_of(changes: dict) -> Recipe:
    """Return the tiny recipe with changes; of another objective, without the keys of MoCo."""
    other = changes.get("objective", {}).get("name", "moco") != "moco"
    defaults = {k: v for k, v in DEFAULTS.items() if not other or k not in MOCO}
    if changes.get("objective", {}).get("name") == "memory_bank":
        defaults["views"] = [{}]
    return recipe_from(defaults | changes)


IDS = 3 * np.arange(40)
"""Of the samples that take part."""


def ids(batch: int, step: int) -> Ids:
    """Return the ids of a step's global batch, the first of which comes twice."""
    drawn = IDS[(7 * np.arange(batch) + 5 * step) % len(IDS)]
    drawn[batch - 2] = drawn[0]
    return drawn


def kept(objective: Objective) -> dict[str, object]:
    """Return what an objective keeps beside the encoders."""
    if isinstance(objective, Moco):
        return {"queue": objective.queue.keys.clone(), "pointer": int(objective.queue.pointer)}
    return {"bank": objective.bank.clone()} if isinstance(objective, MemoryBank) else {}


def main(out: Path, spec: dict) -> None:
    recipe = recipe_of(spec.get("recipe", {}))
    nan_step, nan_rank = spec.get("nan", (-1, -1))
    with init_distributed("cpu", timeout_s=60) as (world, device):
        moco = Engine(recipe, world, device, IDS)
        set_learning_rate(moco.optimizer, recipe.optimizer.lr)
        log = []
        for step in range(spec["steps"]):
            share = world.share(recipe.batch)
            q, k = (view[share] for view in images(recipe.batch, step))
            if (step, world.rank) == (nan_step, nan_rank):
                k[0, 0, 0, 0] = torch.nan
            outcome = moco.step(q, k, step, ids(recipe.batch, step)[share])
            gradients = {n: p.grad.clone() for n, p in moco.encoder_q.named_parameters()}
            weights = {}
            if spec["steps"] - step <= 3:  # 80 MB a step
                encoders = (moco.encoder_q, *moco.objective.networks)
                for name, encoder in zip(("query", "key"), encoders, strict=False):
                    weights[name] = {n: t.clone() for n, t in encoder.state_dict().items()}
            log.append(
                {
                    "loss": world.gather(outcome.loss.clone()),
                    "gradients": gradients,
                    "ok": outcome.ok.clone(),
                    **kept(moco.objective),
                    **weights,
                }
            )
        moco.all_reduce_buffers()
        if world.is_main:
            torch.save({"log": log, "state": moco.state()}, out)


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(sys.argv[2]))
