"""The same step on a GPU: what the CPU gives, and never a wait for the device."""

import copy

import pytest
import torch
from recipes import recipe_from
from states import tensors
from waits import no_waits

from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine
from fastmoco.train.snapshot import snapshot

pytestmark = pytest.mark.gpu
GPU = torch.device("cuda")


@pytest.fixture(autouse=True)
def no_tf32(monkeypatch: pytest.MonkeyPatch) -> None:
    """Keep fp32 products fp32, or the CPU's numbers could not be expected."""
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    monkeypatch.setattr(torch.backends.cuda.matmul, "allow_tf32", False)


def engine(worker, device: torch.device, **options: object) -> Engine:
    values = worker.DEFAULTS | {"batch": 32, "bn_group": 16, "compile": False} | options
    return Engine(recipe_from(values), World(), device)


def test_a_step_equals_that_of_the_cpu(worker):
    ours, theirs = (engine(worker, d, precision="fp32") for d in (GPU, torch.device("cpu")))
    for step in range(3):
        views = [view.float() for view in worker.images(32, step, size=16)]
        there = theirs.step(*views, step)
        here = ours.step(*(view.to(GPU) for view in views), step)
        assert torch.allclose(here.loss.cpu(), there.loss, rtol=0, atol=1e-2)
    assert int(ours.objective.queue.pointer) == int(theirs.objective.queue.pointer)


def test_a_compiled_step_equals_a_plain_one(worker):
    plain, compiled = (engine(worker, GPU, precision="fp32", compile=c) for c in (False, "auto"))
    views = [view.float().to(GPU) for view in worker.images(32, 0, size=16)]
    a, b = (moco.step(*views, 0) for moco in (plain, compiled))
    assert torch.allclose(a.loss, b.loss, rtol=0, atol=1e-3)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize("name", ["sgd", "lars", "adam", "adamw"])
@pytest.mark.parametrize("more", [{}, {"symmetric": True, "accumulate": 2, "clip": 1.0}], ids=str)
def test_a_step_never_waits(worker, precision, name, more):
    optimizer = {"lr": 0.01, "name": name}
    moco = engine(worker, GPU, precision=precision, optimizer=optimizer, **more)
    views = [view.float().to(GPU) for view in worker.images(32, 0, size=16)]
    moco.step(*views, 0)  # makes what is made once
    with no_waits():
        moco.step(*views, 1)


def test_a_snapshot_is_of_its_step_and_never_waits(worker):
    moco = engine(worker, GPU, precision="bf16")
    views = [view.float().to(GPU) for view in worker.images(32, 0, size=16)]
    moco.step(*views, 0)
    before = tensors(copy.deepcopy(moco.state()))
    with no_waits():
        finished = snapshot(moco.state(), GPU)
        moco.step(*views, 1)
    ours = tensors(finished())
    assert all(torch.equal(ours[name], before[name].cpu()) for name in before)


def test_a_bad_step_leaves_all_as_it_was(worker):
    moco = engine(worker, GPU, precision="bf16")
    views = [view.float().to(GPU) for view in worker.images(32, 0, size=16)]
    moco.step(*views, 0)
    before = [p.clone() for p in (*moco.encoder_q.parameters(), moco.objective.queue.keys)]
    views[1][0] = torch.nan
    assert not moco.step(*views, 1).ok
    after = (*moco.encoder_q.parameters(), moco.objective.queue.keys)
    assert all(torch.equal(a, b) for a, b in zip(after, before, strict=True))
