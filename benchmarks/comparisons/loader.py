"""Drawing two views of every image: ours against the loaders that people train MoCo with.

Every arm reads the same images, draws two views with the augmentation of MoCo v2, and hands over
normalized fp32 batches as torch tensors. Ours reads them from a shard set, which is packed before
and not measured; `baselines.loaders` has the others.
"""

import os
from collections.abc import Generator
from dataclasses import asdict, dataclass, replace
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Literal

import torch
from harness.arm import Section
from harness.compare import Arm, OnRow, compare, measure
from harness.images import names_of, repeated, scratch_beside, subject_of, warm
from harness.report import Report
from harness.view_timing import Views, measured

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe, View
from fastmoco.errors import UsageError

TOLERANCE = 5.0  # levels: the arms draw other numbers, and blur and resize differ
OURS = {
    "dali": {"executor": "dali"},
    "cached": {"pixels": "cached"},  # decoded before the section
}
"""Ours in other settings than the usual one, by the name that they are compared under."""
RIVALS = {
    **dict.fromkeys(OURS, "fastmoco"),
    "imagefolder": "torchvision",
    "webdataset": "webdataset",
    "lightly": "lightly",
    "dali-operators": "nvidia.dali",
    "ffcv": "ffcv",
    "ffcv-raw": "ffcv",
}
NEEDS = {"ffcv": ", which compiles against libopencv-dev and libturbojpeg0-dev (and pkg-config)"}
_CONVERTED = {"webdataset", "ffcv", "ffcv-raw"}


@dataclass(frozen=True)
class Settings:
    """What every arm does.

    Attributes:
        size: side of the views, pixels.
        short_side: of the images in our set; the rivals read the originals. None: the same bytes.
        batch: images a batch.
        batches: in the measured section.
        repeat: how many times each image occurs.
        workers: of the rivals' DataLoader; 0: the fastest of 1, 2, ... cores + 1, tried before.
        rivals: names out of `RIVALS`.
        bound: measure our loader without colors and blur too.
    """

    size: int = 224
    short_side: int | None = None
    batch: int = 256
    batches: int = 10
    repeat: int = 1
    workers: int = 0
    rivals: tuple[str, ...] = ()
    bound: bool = False


def bench_loader(
    source: Path,
    settings: Settings,
    pairs: int,
    against_itself: bool = False,
    on_row: OnRow | None = None,
) -> Report:
    """Measure how fast two views of every image of a folder are drawn.

    Scratch files lie beside the folder while it runs.

    Raises:
        UsageError: no such folder or rival, or nothing can be written beside it.
        DataError: it holds no images.
        ArmFailed: an arm failed.
    """
    _require(settings.rivals)
    names = names_of(source)
    with scratch_beside(source) as scratch:
        root = repeated(source, names, settings.repeat, scratch)
        warm(root)
        _pack(root, scratch / "set", settings.short_side)
        _convert(root, scratch, settings.rivals)
        settings = replace(settings, workers=settings.workers or best_workers(root, settings))
        subject = {**subject_of(source, names, settings.repeat), **asdict(settings)}
        arms = _arms(root, scratch, settings)
        return compare(
            arms,
            pairs,
            on_row=on_row,
            against_itself=against_itself,
            tolerance=TOLERANCE,
            subject=subject,
        )


def _require(wanted: tuple[str, ...]) -> None:
    for name in wanted:
        if name not in RIVALS:
            raise UsageError(f"There is no rival {name!r}; there are {', '.join(RIVALS)}.")
        if find_spec(RIVALS[name].partition(".")[0]) is None:
            needs = NEEDS.get(name.removesuffix("-raw"), "")
            raise UsageError(f"{name} needs `pip install {RIVALS[name]}`{needs}.")


def _pack(root: Path, out: Path, short_side: int | None) -> None:
    from fastmoco.pack.options import PackOptions
    from fastmoco.pack.packer import pack

    pack(root, out, PackOptions(short_side=short_side))


def _convert(root: Path, scratch: Path, rivals: tuple[str, ...]) -> None:
    """Write what rivals read instead of the folder, each as `scratch / NAME`."""
    if not _CONVERTED.intersection(rivals):
        return
    same = scratch / "webdataset"
    _pack(root, same, None)
    for name in {"ffcv", "ffcv-raw"}.intersection(rivals):
        from baselines import ffcv_loader as beton

        beton.write(same, scratch / name, raw=name == "ffcv-raw")


def _arms(root: Path, scratch: Path, settings: Settings) -> dict[str, Arm]:
    work = {"size": settings.size, "batch": settings.batch, "batches": settings.batches}
    own = {"root": str(scratch / "set"), **work}
    arms = {"fastmoco": Arm.of(f"{__name__}:ours", **own)}
    if settings.bound:
        crops = Arm.of(f"{__name__}:ours", **own, plain=True)
        arms["fastmoco, crops alone"] = replace(crops, bound=True)
    for name in settings.rivals:
        if name in OURS:
            arms[f"fastmoco, {name}"] = Arm.of(f"{__name__}:ours", **own, **OURS[name])
            continue
        function = f"baselines.loaders:{name.replace('-', '_')}"
        data = scratch / name if name in _CONVERTED else root
        arms[name] = Arm.of(function, root=str(data), **work, workers=settings.workers)
    return arms


def best_workers(root: Path, settings: Settings) -> int:
    """Return the number of DataLoader workers at which the official recipe is fastest here."""
    cores = len(os.sched_getaffinity(0))
    if not settings.rivals:
        return cores
    work = {"size": settings.size, "batch": settings.batch, "batches": max(2, cores)}
    seconds = {}
    for workers in range(1, cores + 2):
        arm = Arm.of("baselines.loaders:imagefolder", root=str(root), **work, workers=workers)
        seconds[workers] = measure("imagefolder", arm).seconds_per_image
    return min(seconds, key=lambda workers: seconds[workers])


def ours(
    section: Section,
    root: str,
    size: int,
    batch: int,
    batches: int,
    plain: bool = False,
    executor: Literal["dali", "fused"] = "fused",
    pixels: Literal["cached", "decoded"] = "decoded",
) -> dict[str, Any]:
    """Draw with this program on all cores."""
    import_module(f"fastmoco.load.{executor}_executor")  # which is not what is measured
    from fastmoco.core.distributed import World
    from fastmoco.dataset.shard_set import ConcatShardSets
    from fastmoco.load.executor import get_settings
    from fastmoco.load.loader import Loader

    recipe = recipe_of(size, batch, plain)
    changes = {"executor": executor, "pixels": pixels}
    runtime = recipe.runtime.model_copy(update=changes)

    def open_batches() -> Generator[Views]:
        data = ConcatShardSets.open([Path(root)])
        settings = get_settings(runtime, World(), torch.device("cpu"))
        for drawn in Loader.of(recipe, data, settings).batches():
            yield drawn.views

    return measured(section, open_batches, batches)


def recipe_of(size: int, batch: int, plain: bool = False) -> Recipe:
    """Return the shipped recipe of MoCo v2 for these sizes; plain: crops and flips alone."""
    recipe = load_recipe("moco_v2_imagenet_r50", ["runtime.device=cpu"])
    views = (View(scale=recipe.views[0].scale),) * 2 if plain else recipe.views
    encoder = recipe.encoder.model_copy(update={"image_size": size})
    return recipe.model_copy(update={"encoder": encoder, "batch": batch, "views": views})
