"""What a checkpoint writes is the state of its step, whatever the steps after it do."""

import copy

import torch
from recipes import recipe_from
from states import tensors

from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine
from fastmoco.train.snapshot import snapshot


def test_a_snapshot_stays_as_it_was(worker):
    device = torch.device("cpu")
    moco = Engine(recipe_from(worker.DEFAULTS), World(), device)
    views = [view.float() for view in worker.images(moco.recipe.batch, 0)]
    moco.step(*views, 0)
    before = tensors(copy.deepcopy(moco.state()))
    finished = snapshot(moco.state(), device)
    moco.step(*views, 1)
    ours, after = tensors(finished()), tensors(moco.state())
    assert ours.keys() == before.keys() and len(ours) > 100
    assert all(torch.equal(ours[name], before[name]) for name in before)
    assert all(ours[name].stride() == before[name].stride() for name in before)
    assert sum(not torch.equal(after[name], before[name]) for name in before) > 50
