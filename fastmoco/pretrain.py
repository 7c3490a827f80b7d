"""Assembles a run from its recipe: sets, loader, engine, monitor, loop."""

import os
import platform
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastmoco.config import Monitor, Recipe, load_recipe
from fastmoco.display import LiveDisplay
from fastmoco.distributed import Ranks, joined
from fastmoco.errors import DataError, FastmocoError, UsageError
from fastmoco.evaluate.cautions import cautions
from fastmoco.evaluate.embed import Sight, embed, sight_of
from fastmoco.evaluate.knn import Neighbours
from fastmoco.load.loader import Loader
from fastmoco.load.work import settings_of
from fastmoco.models.resnet import Encoder
from fastmoco.run import RunFolder, fingerprint
from fastmoco.shardset import Collection, ShardSet, labelled_pair
from fastmoco.train import loop
from fastmoco.train.moco import MoCo, check_bn_group

_USAGE = "usage: pretrain RECIPE [key=value ...]   (a shipped recipe's name, or a path to a .yaml)"


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...]` as one rank and return the exit code.

    A user's error is one plain line from the rank that met it, never a traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    leads = os.environ.get("RANK", "0") == "0"
    try:
        if not arguments or arguments[0] in {"-h", "--help"}:
            raise UsageError(_USAGE)
        pretrain(load_recipe(arguments[0], arguments[1:]))
    except FastmocoError as error:
        # Every rank meets an error of usage; a damaged image is met by one rank alone.
        if leads or isinstance(error, DataError):
            print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    except KeyboardInterrupt:
        if leads:
            print("interrupted: the same command goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


def pretrain(recipe: Recipe) -> RunFolder:
    """Train a recipe, from its last checkpoint if there is one; every rank calls this.

    Returns:
        The run folder.

    Raises:
        FastmocoError: what went wrong, in words; it is in the folder's status.json too.
    """
    with joined(recipe.device) as (ranks, device):
        check_bn_group(recipe, ranks.size)
        data = Collection.open(recipe.data)
        recipe = resolve(recipe, data.sets[0])
        # Refuses what does not fit, before the run folder is made.
        loader = Loader.of(recipe, data, settings_of(recipe, ranks, device), ranks)
        run = RunFolder(recipe.out)
        if not ranks.leads:
            _train(recipe, loader, run, ranks, device)
            return run
        with run.locked():
            try:
                _train(recipe, loader, run, ranks, device)
            except FastmocoError as error:
                run.finish(error.exit_code, str(error))
                raise
            run.finish(0, f"finished epoch {recipe.last_epoch}")
    return run


def _train(
    recipe: Recipe, loader: Loader, run: RunFolder, ranks: Ranks, device: torch.device
) -> None:
    torch.use_deterministic_algorithms(recipe.deterministic)
    sight = sight_of(recipe, settings_of(recipe, ranks, device))
    marks = fingerprint(recipe, loader.data.set_ids, loader.plan.samples, loader.plan.digest())
    found = run.latest(marks)
    start = found[1] if found else 0
    if ranks.leads:
        run.describe(recipe, versions(ranks, device))
        run.rewind(start)
    monitor = _monitor(recipe.monitor, sight, ranks) if recipe.monitor else None
    last_step = recipe.last_epoch * loader.plan.steps_per_epoch
    with LiveDisplay(recipe, start, last_step, ranks.leads) as display:
        trainer = loop.Trainer(
            recipe, MoCo(recipe, ranks, device), loader, run, marks, display, monitor
        )
        if found:
            trainer.load(found[0])
        trainer.train(start)


def resolve(recipe: Recipe, first: ShardSet) -> Recipe:
    """Return the recipe with the channel statistics of its first set where it names none."""
    mean = recipe.mean or tuple(first.manifest.mean)
    std = recipe.std or tuple(first.manifest.std)
    return recipe.model_copy(update={"mean": mean, "std": std})


def _monitor(monitor: Monitor, sight: Sight, ranks: Ranks) -> loop.Monitor:
    bank, queries = labelled_pair(monitor.bank, monitor.queries, monitor.labels)
    if ranks.leads:
        for caution in cautions(bank, queries):
            print(f"warning: {caution}", file=sys.stderr)
    bank_labels, query_labels = (torch.from_numpy(one.labels) for one in (bank, queries))

    def knn(encoder: Encoder) -> dict[str, float]:
        features, asked = (
            embed(encoder, Collection([one.set]), monitor.feature, sight, ranks, one.ids)
            for one in (bank, queries)
        )
        neighbours = Neighbours(features, bank_labels, len(bank.classes), monitor.k, monitor.t)
        return {"knn_top1": neighbours.accuracy(asked, query_labels, ranks)}

    return knn


def versions(ranks: Ranks, device: torch.device) -> dict[str, Any]:
    """Return what a number depends on beside its recipe."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else platform.processor(),
        "cores": os.cpu_count(),
        "ranks": ranks.size,
        **{name: _version(name) for name in ("fastmoco", "torch", "torchvision", "numpy")},
        "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
    }


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
