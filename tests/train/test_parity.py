"""The engine against the paper's algorithm written naively (design: 1e-9 over 20 fp64 steps)."""

import importlib.util
from pathlib import Path

import pytest
import torch
from recipes import recipe_from

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine, build_encoder
from fastmoco.train.objectives.queue import KeyQueue
from fastmoco.train.optimizers import set_learning_rate

_SPEC = importlib.util.spec_from_file_location("naive", Path(__file__).with_name("naive.py"))
naive = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(naive)

STEPS = 20
SOME = 7  # of a variant: its queue of 40 or 48 wraps twice in as many


def largest_difference(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor]) -> float:
    assert {naive.plain_name(name) for name in ours} <= set(theirs)
    gaps = [
        (t - theirs[naive.plain_name(n)]).abs().max()
        for n, t in ours.items()
        if t.is_floating_point()
    ]
    return float(max(gaps))


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "nodes", "steps", "options"),
    [
        # 16 rows a step into a queue that wraps unevenly, evenly, or is overrun by one batch
        (1, 1, STEPS, {"queue": 40}),
        (1, 1, SOME, {"queue": 12}),
        (2, 1, STEPS, {"queue": 40}),
        (2, 1, SOME, {"queue": 40, "exchange": "all_gather"}),
        (1, 1, SOME, {"queue": 40, "symmetric": True}),
        (2, 1, SOME, {"queue": 48, "symmetric": True}),
        (1, 1, SOME, {"accumulate": 4, "symmetric": True}),
        (2, 1, SOME, {"accumulate": 2}),
        (4, 2, SOME, {"shuffle": "node"}),
        (1, 1, SOME, {"shuffle": "off"}),
        (2, 1, SOME, {"bn": "whole"}),
    ],
    ids=str,
)
def test_steps_equal_algorithm_1(run_ranks, worker, ranks, nodes, steps, options):
    recipe = recipe_from(worker.DEFAULTS | options)
    ours = run_ranks(ranks, nodes, steps=steps, recipe=options)["log"]
    start = build_encoder(recipe).to(torch.float64).state_dict()
    keys = KeyQueue(recipe.objective.queue, recipe.encoder.dim, recipe.seed, torch.float64).keys
    theirs = naive.NaiveMoCo(recipe, start, keys, nodes)
    for step, row in enumerate(ours):
        loss = theirs.step(*worker.images(recipe.batch, step), step)
        assert torch.allclose(in_plan_order(row["loss"], ranks, recipe), loss, rtol=0, atol=1e-9)
        gradients = {n: p.grad for n, p in theirs.f_q.named_parameters()}
        assert largest_difference(row["gradients"], gradients) < 1e-9, step
        assert torch.allclose(row["queue"], torch.stack(theirs.queue), rtol=0, atol=1e-9), step
        assert row["pointer"] == theirs.pointer
    theirs.momentum_update()  # ours moves the key encoder at the end of a step
    # Of groups, a rank knows its own statistics until they are averaged: tested below.
    keys_of = {n: t for n, t in row["key"].items() if ranks == 1 or "running" not in n}
    assert largest_difference(keys_of, theirs.f_k.state_dict()) < 1e-9


def in_plan_order(loss: torch.Tensor, ranks: int, recipe: Recipe) -> torch.Tensor:
    """Return gathered losses, of ranks x parts x views, as those of the views one after another."""
    views = 1 + recipe.objective.symmetric
    return loss.view(ranks, recipe.runtime.accumulate, views, -1).permute(2, 0, 1, 3).flatten()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("symmetric", [False, True])
def test_all_to_all_is_all_gather_bit_for_bit(run_ranks, symmetric):
    logs = [
        run_ranks(2, steps=3, recipe={"exchange": how, "symmetric": symmetric})["log"]
        for how in ("all_to_all", "all_gather")
    ]
    for a, b in zip(*logs, strict=True):
        assert torch.equal(a["loss"], b["loss"]) and torch.equal(a["queue"], b["queue"])
        assert all(torch.equal(a["query"][name], b["query"][name]) for name in a["query"])


@pytest.mark.slow
@pytest.mark.dist
def test_running_statistics_of_two_ranks_settle_to_those_of_one(run_ranks):
    one, two = (run_ranks(ranks, steps=3)["state"] for ranks in (1, 2))
    for encoder in ("encoder_q", "encoder_k"):
        for name, tensor in one[encoder].items():
            assert torch.allclose(tensor, two[encoder][name], rtol=0, atol=1e-9), name


def test_one_fp32_step_equals_algorithm_1(worker):
    # Groups of 16 and images of 32 pixels: BatchNorm over few values, as above, magnifies the
    # rounding of fp32 tenfold.
    options = {"precision": "fp32", "batch": 32, "bn_group": 16, "optimizer": {"lr": 0.03}}
    recipe = recipe_from(worker.DEFAULTS | options)
    moco = Engine(recipe, World(), torch.device("cpu"))
    theirs = naive.NaiveMoCo(
        recipe, moco.encoder_q.state_dict(), moco.objective.queue.keys.double()
    )
    set_learning_rate(moco.optimizer, recipe.optimizer.lr)
    views = worker.images(recipe.batch, 0, size=32)
    ours = moco.step(*(view.float() for view in views), 0)
    loss = theirs.step(*views, 0)
    assert torch.allclose(ours.loss.double(), loss, rtol=0, atol=1e-5)
    assert largest_difference(moco.encoder_q.state_dict(), theirs.f_q.state_dict()) < 1e-5


def test_without_the_shuffle_the_keys_differ(worker, monkeypatch):
    """The parity above would also hold for two wrong programs that both forget to shuffle."""
    recipe = recipe_from(worker.DEFAULTS)

    def keys_of_a_step() -> torch.Tensor:
        moco = Engine(recipe, World(), torch.device("cpu"))
        moco.step(*worker.images(recipe.batch, 0), 0)
        return moco.objective.queue.keys[: recipe.batch]

    shuffled = keys_of_a_step()
    monkeypatch.setattr(
        "fastmoco.train.objectives.shuffle_bn.Shuffle.scatter", lambda self, views: views[0]
    )
    monkeypatch.setattr(
        "fastmoco.train.objectives.shuffle_bn.Shuffle.gather", lambda self, keys: keys
    )
    assert (shuffled - keys_of_a_step()).abs().max() > 1e-3
