"""The published CIFAR-10 run, for as many epochs as there is time, beside its curve."""

import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from PIL import Image

from fastmoco.core.cores import count_cores
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from gpu_phases.run import ENDING_S, STARTING_S, get_rows, started
from gpu_phases.task import Figures, Item, Items, Task, Unavailable

# Epoch: loss and kNN of the MoCo authors' notebook.
PUBLISHED = {
    1: (6.957, 31.98),
    2: (7.250, 33.52),
    3: (7.290, 34.71),
    4: (7.099, 36.98),
    5: (6.862, 37.95),
    8: (6.370, 44.18),
    10: (5.991, 48.03),
    20: (4.341, 61.38),
    50: (3.19, 73.30),
    100: (2.726, 78.06),
    200: (2.272, 82.58),
}


def items(task: Task) -> Items:
    """Return the run, whose rows go by the names of its epochs."""
    return {"epoch/cifar10_r18": Item(lambda: train(task), least=STARTING_S)}


def train(task: Task) -> Iterator[Figures]:
    """Train, and yield each epoch as it ends.

    Raises:
        Unavailable: there is no CIFAR-10.
    """
    sets = _sets(task)
    options = [
        f'data.sets=["{sets}/train"]',
        f"monitor.bank={sets}/train",
        f"monitor.queries={sets}/test",
        f"runtime.device={task.device}",
    ]
    if task.dry:
        options += [
            "encoder.arch=resnet10",
            "encoder.image_size=16",
            "batch=16",
            "objective.bn_group=8",
            "objective.queue=64",
        ]
        options += ["stop_epoch=2"]
    began, out = time.time(), task.work / "cifar10_r18"
    with started("cifar10_r18", out, options) as process:
        for row in get_rows(process, out, task.until - ENDING_S / 2):
            if row["kind"] == "epoch":
                known = not task.dry and row["epoch"] in PUBLISHED
                loss, knn = PUBLISHED[row["epoch"]] if known else ("", "")
                yield {
                    "item": f"epoch/{row['epoch']:g}",
                    "loss": row.get("loss"),
                    "published_loss": loss,
                    "knn_top1": row.get("knn_top1"),
                    "published_knn": knn,
                    "seconds": time.time() - began,
                }


def _sets(task: Task) -> Path:
    """Return the folder of the packed `train` and `test`."""
    if task.cifar is None:
        if not task.dry:
            raise Unavailable("give CIFAR-10 by --cifar SET")
        source = task.work / "toy"
        _toy(source)
    elif (task.cifar / "train" / "manifest.json").is_file():
        return task.cifar
    else:
        source = task.cifar
    pack(source, task.work / "cifar", PackOptions(workers=count_cores(1)))
    return task.work / "cifar"


def _toy(folder: Path) -> None:
    """Make two classes of images that are all alike."""
    for split in ("train", "test"):
        for label, color in (("blue", (20, 40, 200)), ("red", (200, 40, 20))):
            (folder / split / label).mkdir(parents=True)
            for number in range(24):
                noise = np.random.default_rng(number).integers(0, 50, (32, 32, 3))
                image = Image.fromarray((noise + color).clip(0, 255).astype(np.uint8))
                image.save(folder / split / label / f"{number}.jpg")
