"""A step with a non-finite number leaves nothing behind."""

import copy

import pytest
import torch
from recipes import recipe_from

from fastmoco.core.distributed import World
from fastmoco.errors import DivergedError
from fastmoco.train.engine import Engine
from fastmoco.train.guard import Guard


def flat(state: dict, prefix: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor of a nested state by its path."""
    found = {}
    for key, value in state.items() if isinstance(state, dict) else enumerate(state):
        name = f"{prefix}.{key}"
        if isinstance(value, torch.Tensor):
            found[name] = value.clone()
        elif isinstance(value, dict | list):
            found |= flat(value, name)
    return found


@pytest.fixture
def moco(worker):
    return Engine(recipe_from(worker.DEFAULTS), World(), torch.device("cpu"))


@pytest.mark.parametrize("view", [0, 1])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_bad_view_leaves_the_full_state_as_before(moco, worker, view, value, steps_before):
    for step in range(steps_before):
        moco.step(*worker.images(16, step), step)
    before = flat(copy.deepcopy(moco.state()))
    views = worker.images(16, 99)
    views[view][3, 1, 2, 2] = value
    assert not moco.step(*views, 99).ok
    after = flat(moco.state())
    assert after.keys() == before.keys()
    changed = [n for n in before if not torch.equal(before[n], after[n]) and "guard" not in n]
    assert not changed
    assert int(moco.guard.skipped) == 1


def test_a_good_step_changes_every_part_of_the_state(moco, worker):
    """Else the test above would pass for an engine that never moves."""
    before = flat(copy.deepcopy(moco.state()))
    assert moco.step(*worker.images(16, 0), 0).ok
    after = flat(moco.state())
    still = {n for n in before if torch.equal(before[n], after[n])}
    idle = ("num_batches_tracked", "guard", "scale")  # the scale is fp16's
    assert all(any(part in n for part in idle) for n in still)


def test_a_run_with_a_skipped_first_step_goes_on_like_one_without(worker):
    recipe = recipe_from(worker.DEFAULTS)
    clean, dirty = (Engine(recipe, World(), torch.device("cpu")) for _ in "ab")
    bad = worker.images(16, 7)
    bad[0].fill_(torch.nan)
    dirty.step(*bad, 0)
    for step in (1, 2):
        for moco in (clean, dirty):
            moco.step(*worker.images(16, step), step)
    ours, theirs = flat(dirty.state()), flat(clean.state())
    assert all(torch.equal(ours[n], theirs[n]) for n in ours if "guard" not in n)


@pytest.mark.slow
@pytest.mark.dist
def test_nan_on_one_rank_skips_the_step_on_both(run_ranks):
    log = run_ranks(2, steps=3, nan=[1, 1])["log"]
    assert [bool(row["ok"]) for row in log] == [True, False, True]
    for part in ("query", "key"):
        assert all(torch.equal(log[0][part][n], log[1][part][n]) for n in log[0][part])
    assert torch.equal(log[0]["queue"], log[1]["queue"])
    assert log[0]["pointer"] == log[1]["pointer"]


def test_too_many_in_a_row_is_an_error_and_scattered_ones_are_not():
    guard = Guard(limit=3)
    for ok in [False, True, False, False, True]:
        guard.count(torch.tensor(ok))
    assert guard.check() == 3
    for _ in range(3):
        guard.count(torch.tensor(False))
    guard.count(torch.tensor(True))  # the streak is seen even if it ended before the check
    with pytest.raises(DivergedError, match="3 steps in a row"):
        guard.check()


def test_options_come_from_the_recipe_and_not_from_the_checkpoint(worker):
    """A run that goes on with another rate or decay has these, and the old momentum buffers."""
    begun = Engine(recipe_from(worker.DEFAULTS), World(), torch.device("cpu"))
    begun.step(*worker.images(16, 0), 0)
    other = worker.DEFAULTS | {"optimizer": {"lr": 0.1, "momentum": 0.5, "weight_decay": 0.25}}
    resumed = Engine(recipe_from(other), World(), torch.device("cpu"))
    resumed.load(begun.state())
    (group,) = resumed.optimizer.param_groups
    assert (group["momentum"], group["weight_decay"]) == (0.5, 0.25)
    buffers = [
        [moco.optimizer.state[p]["momentum_buffer"] for p in moco.encoder_q.parameters()]
        for moco in (begun, resumed)
    ]
    assert all(torch.equal(a, b) for a, b in zip(*buffers, strict=True))


def test_a_loss_scale_does_not_cross_precisions(worker):
    half, whole = (
        Engine(recipe_from(worker.DEFAULTS | {"precision": p}), World(), torch.device("cpu"))
        for p in ("fp16", "bf16")
    )
    half.load(whole.state())
    assert float(half.scale.scale) == 2**16
    half.scale.scale.fill_(8)
    whole.load(half.state())
    assert float(whole.scale.scale) == 1
