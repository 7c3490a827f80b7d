"""`compare.py step`: the rival does the same work, and every arm says so. Nothing is timed."""

import json

import pytest
import torch
from baselines.reference_moco import OfficialMoCo
from compare import app
from comparisons import step as bench
from harness.arm import Section
from harness.compare import Arm, measure
from typer.testing import CliRunner

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.errors import UsageError
from fastmoco.train.engine import Engine

CPU = torch.device("cpu")
WORK = {"arch": "resnet18", "size": 64, "batch": 16, "queue": 48, "steps": 1, "device": "cpu"}


def recipe_in(precision: str) -> Recipe:
    sizes = {"size": 32, "batch": 8, "queue": 16} if precision == "fp64" else {"queue": 32}
    recipe = bench.Settings(**WORK | sizes).recipe()
    # A smaller rate than MoCo's: fp32 rounding grows slower than tenfold a step.
    optimizer = recipe.optimizer.model_copy(update={"lr": 0.003})
    runtime = recipe.runtime.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"runtime": runtime, "optimizer": optimizer})


def losses_of_both(precision: str, m_of_rival: float, steps: int = 3) -> list[tuple[float, float]]:
    """Return our loss and the rival's of each step; three wrap the queue of two batches."""
    recipe = recipe_in(precision)
    dtype = torch.float64 if precision == "fp64" else torch.float32
    ours, theirs = Engine(recipe, World(), CPU), OfficialMoCo(recipe, World(), CPU)
    theirs.model.to(dtype).queue.copy_(ours.objective.queue.keys.T)
    theirs.model.m = m_of_rival
    found = []
    for step, views in enumerate(bench.synthetic(recipe.batch, recipe.encoder.image_size, steps)):
        q, k = (view.to(dtype) for view in views)
        last = (view.contiguous(memory_format=torch.channels_last) for view in (q, k))
        found.append((float(ours.step(*last, step).loss.mean()), float(theirs.step(q, k, step))))
    return found


@pytest.mark.parametrize(("precision", "tolerance"), [("fp64", 1e-9), ("fp32", 3e-4)])
def test_the_rival_is_the_same_algorithm(precision, tolerance):
    pairs = losses_of_both(precision, recipe_in(precision).objective.momentum)
    assert [ours for ours, _ in pairs] == pytest.approx([one for _, one in pairs], abs=tolerance)
    assert len({round(ours, 2) for ours, _ in pairs}) == 3, "it trains"


def test_the_parity_sees_another_momentum():
    ours, theirs = losses_of_both("fp64", m_of_rival=0.9, steps=2)[-1]
    assert abs(ours - theirs) > 1e-6


def test_the_rival_stays_in_fp32_and_nchw_unless_it_is_tuned():
    recipe = recipe_in("bf16")
    (views,) = bench.synthetic(recipe.batch, recipe.encoder.image_size, 1)
    for tuned in (False, True):
        seen = []
        rival = OfficialMoCo(recipe, World(), CPU, tuned)
        layer = rival.model.encoder_q.layer1[0].conv1
        layer.register_forward_hook(lambda _, __, output, seen=seen: seen.append(output))
        layout = torch.channels_last if tuned else torch.contiguous_format
        rival.step(*(view.contiguous(memory_format=layout) for view in views), 0)
        assert seen[0].dtype == (torch.bfloat16 if tuned else torch.float32)
        assert seen[0].is_contiguous(memory_format=layout)


def test_every_arm_proves_the_same_work():
    found = {
        engine: bench.arm(Section(), engine, **WORK, precision="bf16")
        for engine in ("ours", "official", "tuned")
    }
    losses = {engine: one["check"]["losses"] for engine, one in found.items()}
    assert all(one["images"] == WORK["steps"] * WORK["batch"] for one in found.values())
    assert losses["official"] == pytest.approx(losses["ours"], abs=bench.TOLERANCE)
    assert losses["tuned"] == pytest.approx(losses["ours"], abs=bench.TOLERANCE)
    assert losses["tuned"] != losses["official"] != losses["ours"], "three programs"


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_share_the_batch():
    options = WORK | {"batch": 32, "queue": 64, "ranks": 2}
    ours, theirs = (
        measure(engine, Arm.of("comparisons.step:arm", engine=engine, **options), seconds=240)
        for engine in ("ours", "official")
    )
    assert ours.images == theirs.images == 32
    assert ours.check["losses"] == pytest.approx(theirs.check["losses"], abs=3 * bench.TOLERANCE)


@pytest.mark.slow
def test_bench_step_from_the_command_line(tmp_path):
    out = tmp_path / "rows.jsonl"
    options = "--size 64 --batch 16 --queue 48 --steps 2 --precision fp32 --pairs 1 --device cpu"
    done = CliRunner().invoke(app, ["step", *options.split(), "--tuned", "--out", str(out)])
    assert done.exception is None, done.output
    *rows, report = map(json.loads, out.read_text().splitlines())
    assert [r["arm"] for r in rows] == ["fastmoco", "official", "official, fp32, channels-last"]
    assert all(row["images"] == 32 and row["details"]["ms_per_step"] > 0 for row in rows)
    assert report["same_work"] and report["subject"]["arch"] == "resnet18"
    each = report["medians"]["official"]
    assert each["ms_per_batch"] == pytest.approx(16e3 / each["images_per_s"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"queue": 50}, "queue 50 one of the batch"),
        ({"ranks": 3}, "batch 16 must be a multiple of ranks 3"),
        ({"precision": "fp8"}, "precision"),
    ],
)
def test_settings_that_do_not_fit_are_refused(options, said):
    with pytest.raises(UsageError, match=said):
        bench.bench_step(bench.Settings(**WORK | options), pairs=1)
