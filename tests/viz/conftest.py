"""A small run with everything that a report can show, and names that try to break out of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from recipes import recipe_from

from fastmoco.config.encoder import EncoderSpec
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.models.encoder import Encoder
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz.report import report

CLASSES = ("<script>alert(1)<b>", '"q" & $x^$', "猫 ü", "plain")
STEP = 12


@pytest.fixture(scope="session")
def sets(
    make_images: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Path]:
    """Two labelled sets of the four classes, of 40 and 24 images."""
    root = tmp_path_factory.mktemp("sets")
    for name, per_class, size in (("train", 10, (40, 32)), ("test", 6, (32, 48))):
        source = make_images(root / "source" / name, CLASSES, per_class, size, "png")
        pack(source, root / name, PackOptions(seed=per_class))
    return {name: root / name for name in ("train", "test")}


@pytest.fixture(scope="session")
def make_run(sets: dict[str, Path]) -> Callable[..., RunFolder]:
    """`make_run(root, checkpoint=True, **recipe)`: a run folder with no metrics yet."""
    torch.manual_seed(0)
    encoder = Encoder(
        EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8)
    ).eval()

    def make(root: Path, checkpoint: bool = True, **changes: Any) -> RunFolder:
        values = {
            "name": "tiny <i>run</i>",
            "data": [str(sets["train"])],
            "out": str(root),
            "monitor": {
                "bank": str(sets["train"]),
                "queries": str(sets["test"]),
                **{"feature": "backbone", "k": 7, "t": 0.2},
            },
            "arch": "resnet10",
            "stem": "small-stride2",
            "dim": 8,
            "image_size": 16,
            "views": [{}, {}],
            "batch": 8,
            "bn_group": 4,
            "queue": 64,
            "optimizer": {"lr": 0.1},
            "schedule": {"epochs": 2},
            "precision": "fp32",
            "device": "cpu",
            "executor": "fused",
            "threads": 1,
        }
        run = RunFolder(root)
        run.checkpoints.mkdir(parents=True)
        run.describe(recipe_from(values | changes), {"torch": "1 & 2", "cores": 2})
        if checkpoint:
            run.save({"encoder_q": encoder.state_dict()}, STEP, {}, keep=2)
        return run

    return make


@pytest.fixture(scope="session")
def full_run(
    make_run: Callable[..., RunFolder], tmp_path_factory: pytest.TempPathFactory
) -> RunFolder:
    """A run with metrics, a status and two evaluations. Read it, never write to it."""
    run = make_run(tmp_path_factory.mktemp("run") / "run")
    numbers = {"lr": 0.1, "pretext_top1": 0.1, "images_per_s": 9.0, "data_wait_percent": 1.0}
    for step in (5, 10, 12):
        run.log({"kind": "step", "step": step, "epoch": step / 5, "loss": 5.0 - step} | numbers)
    for epoch in (0, 1, 2):
        run.log({"kind": "epoch", "step": 5 * epoch, "epoch": epoch, "knn_top1": 30.0 + epoch})
    run.finish(0, "finished epoch 2")
    Evaluation.open(run.root, device="cpu").knn("backbone", 5, 0.1)
    best = {"lr": 0.3, "top1": 61.25, "top5": 99.5}
    row = '{"kind": "probe", "step": 12, "best": %s, "protocol": {"epochs": 3, "lrs": [0.3, 1]}}'
    with (run.root / "evaluations.jsonl").open("a") as stream:
        stream.write(row % str(best).replace("'", '"') + '\n{"kind": "cut sho')
    return run


@pytest.fixture(scope="session")
def page(full_run: RunFolder, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The report of the full run."""
    return report(full_run.root, tmp_path_factory.mktemp("report"), device="cpu")
