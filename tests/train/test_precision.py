"""fp16's loss scale, and clipping."""

import shutil
from functools import partial

import pytest
import torch
from recipes import recipe_from

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Runtime
from fastmoco.core.distributed import World
from fastmoco.core.precision import LossScale, Precision
from fastmoco.errors import DivergedError
from fastmoco.evaluate.features import frozen_preprocessing
from fastmoco.pretrain import resolve
from fastmoco.train.engine import Engine, should_compile

CPU = torch.device("cpu")
YES, NO = torch.tensor(True), torch.tensor(False)


def engine(worker, **options: object) -> Engine:
    return Engine(recipe_from(worker.DEFAULTS | options), World(), CPU)


@pytest.mark.parametrize(
    ("instructions", "on_gpu", "asked", "expected"),
    [
        (set(), False, "auto", "fp32"),
        ({"_is_avx512_bf16_supported"}, False, "auto", "bf16"),
        ({"_is_amx_tile_supported"}, False, "auto", "bf16"),
        (set(), False, "bf16", "bf16"),  # a user's word counts
        ({"is_bf16_supported"}, True, "auto", "bf16"),
        (set(), True, "auto", "fp16"),  # a V100, a T4
    ],
)
def test_a_run_notes_a_precision_that_its_device_has(
    instructions, on_gpu, asked, expected, small_set, monkeypatch
):
    for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, name, lambda name=name: name in instructions, raising=False)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: on_gpu)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation: bool(instructions)
    )
    recipe = load_recipe("demo", [f"runtime.precision={asked}"])
    assert resolve(recipe, small_set).runtime.precision == expected
    device = torch.device("cuda" if on_gpu else "cpu")
    shown = frozen_preprocessing(EncoderSpec(), Runtime(precision="bf16"), device)
    assert shown.precision == ("bf16" if instructions else "fp32")


def test_the_scale_halves_grows_back_and_has_a_floor():
    scale = LossScale(Precision("fp16", "cpu"))
    scale.update(NO)
    assert float(scale.scale) == 2**15
    for _ in range(scale._PATIENCE - 1):
        scale.update(YES)
    assert float(scale.scale) == 2**15
    scale.update(YES)
    assert float(scale.scale) == 2**16 and int(scale.good) == 0
    for _ in range(200):
        scale.update(NO)
    assert float(scale.scale) == scale.FLOOR


def test_other_precisions_are_left_alone():
    scale = LossScale(Precision("bf16", "cpu"))
    scale.update(NO)
    assert float(scale.scale) == 1.0
    loss = torch.tensor(3.0)
    assert scale.scaled(loss) is loss


def test_fp16_trains_like_fp32(worker):
    """The scale cancels: a step in fp16 moves the weights as fp32 does, to fp16's rounding."""
    halves, whole = (engine(worker, precision=p, bn_group=8) for p in ("fp16", "fp32"))
    before = [p.detach().clone() for p in whole.encoder_q.parameters()]
    views = [view.float() for view in worker.images(16, 0, size=16)]
    outcomes = [moco.step(*views, 0) for moco in (halves, whole)]
    assert all(o.ok for o in outcomes)
    assert float(outcomes[0].grad_norm) == pytest.approx(float(outcomes[1].grad_norm), rel=0.05)
    pairs = zip(halves.encoder_q.parameters(), whole.encoder_q.parameters(), before, strict=True)
    moves = [(a.detach() - c, b.detach() - c) for a, b, c in pairs]
    a, b = (torch.cat([m.flatten() for m in side]) for side in zip(*moves, strict=True))
    assert torch.cosine_similarity(a, b, dim=0) > 0.99


def test_a_collapse_of_fp16_ends_the_run_in_words(worker):
    moco = engine(worker, precision="fp16", max_skipped=20)
    views = [view.float() for view in worker.images(16, 0)]
    views[0][:] = torch.inf
    for step in range(30):
        moco.step(*views, step)
    assert float(moco.scale.scale) == LossScale.FLOOR
    with pytest.raises(DivergedError, match=r"30 steps in a row.*precision=bf16 if it is fp16"):
        moco.guard.check()


def test_clipping_shortens_the_step_and_reports_the_norm_before(worker):
    free, clipped = engine(worker), engine(worker, clip=0.01)
    outcomes = [moco.step(*worker.images(16, 0), 0) for moco in (free, clipped)]
    assert float(outcomes[0].grad_norm) == float(outcomes[1].grad_norm) > 0.1
    gradients = [p.grad.flatten() for p in clipped.encoder_q.parameters()]
    assert float(torch.cat(gradients).norm()) == pytest.approx(0.01, rel=1e-3)
    whole = torch.cat([p.grad.flatten() for p in free.encoder_q.parameters()])
    assert torch.cosine_similarity(torch.cat(gradients), whole, dim=0) == pytest.approx(1.0)


def test_parts_of_a_step_leave_the_running_statistics_of_the_whole(worker):
    whole, parts = engine(worker), engine(worker, accumulate=4)
    for step in range(2):
        for moco in (whole, parts):
            moco.step(*worker.images(16, step), step)
    assert torch.allclose(whole.statistics.flat, parts.statistics.flat, rtol=0, atol=1e-12)


def test_a_compiled_step_equals_a_plain_one(worker, monkeypatch):
    """Captured and differentiated as for a GPU; run without the minutes of a C++ compiler."""
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    plain, compiled = engine(worker, bn_group=8), engine(worker, bn_group=8, compile=True)
    assert plain.encoder_q.state_dict().keys() == compiled.encoder_q.state_dict().keys()
    a, b = (moco.step(*worker.images(16, 0), 0) for moco in (plain, compiled))
    assert torch.allclose(a.loss, b.loss, rtol=0, atol=1e-9)
    assert torch.allclose(a.grad_norm, b.grad_norm, rtol=1e-9)


@pytest.mark.parametrize(
    ("compile", "device", "bn", "ranks", "deterministic", "expected"),
    [
        ("auto", "cuda", "groups", 2, False, True),
        ("auto", "cuda", "whole", 1, False, True),
        ("auto", "cuda", "whole", 2, False, False),
        ("auto", "cuda", "groups", 1, True, False),
        ("auto", "cpu", "groups", 1, False, False),
        (True, "cpu", "whole", 2, True, True),
        (False, "cuda", "groups", 1, False, False),
    ],
)
def test_auto_compiles_where_it_is_one_graph_on_a_gpu(
    worker, monkeypatch, compile, device, bn, ranks, deterministic, expected
):
    recipe = recipe_from(
        {**worker.DEFAULTS, "bn": bn, "compile": compile, "deterministic": deterministic}
    )
    monkeypatch.setenv("CC", "cc")
    assert should_compile(recipe, World(0, ranks), torch.device(device)) is expected
    monkeypatch.delenv("CC")
    monkeypatch.setattr(shutil, "which", lambda name: None)
    without = expected if compile != "auto" else False
    assert should_compile(recipe, World(0, ranks), torch.device(device)) is without
