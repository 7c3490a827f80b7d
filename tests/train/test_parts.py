"""Loss, momentum update, shuffle and learning rate against their plain forms."""

import itertools
import math

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastmoco.config.recipe import Schedule
from fastmoco.core.distributed import World
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.momentum import momentum_update
from fastmoco.train.objectives.shuffle_bn import Shuffle, permutation
from fastmoco.train.optimizers import learning_rate


def test_info_nce_equals_cross_entropy_over_the_concatenated_logits():
    torch.manual_seed(0)
    q, k, queue = (normalize(torch.randn(n, 16, dtype=torch.float64), dim=1) for n in (6, 6, 50))
    q.requires_grad_()
    ours, positive, negative = info_nce(q, k, queue, 0.07)
    (gradient,) = torch.autograd.grad(ours.mean(), q, retain_graph=True)
    logits = torch.cat([(q * k).sum(1, keepdim=True), q @ queue.T], dim=1) / 0.07
    theirs = cross_entropy(logits, torch.zeros(6, dtype=torch.long), reduction="none")
    (expected,) = torch.autograd.grad(theirs.mean(), q)
    assert torch.allclose(ours, theirs, rtol=0, atol=1e-12)
    assert torch.allclose(gradient, expected, rtol=0, atol=1e-12)
    ours = torch.cat([positive[:, None], negative], 1)
    assert torch.allclose(ours, logits, rtol=0, atol=1e-12)


def test_momentum_update_equals_the_paper_and_can_be_switched_off():
    torch.manual_seed(0)
    keys = [torch.randn(3, 4, dtype=torch.float64), torch.randn(5, dtype=torch.float64)]
    queries = [torch.randn_like(k) for k in keys]
    expected = [0.99 * k + 0.01 * q for k, q in zip(keys, queries, strict=True)]
    momentum_update(keys, queries, 0.99, torch.tensor(True))
    for key, want in zip(keys, expected, strict=True):
        assert torch.allclose(key, want, rtol=0, atol=1e-15)
    before = [k.clone() for k in keys]
    momentum_update(keys, queries, 0.99, torch.tensor(False))
    assert all(torch.equal(k, b) for k, b in zip(keys, before, strict=True))


def test_shuffle_and_unshuffle_restore_the_order():
    shuffle = Shuffle(3, 5, 24, World(), torch.device("cpu"))
    rows = torch.arange(24.0).view(24, 1, 1, 1).expand(24, 3, 2, 2)
    scattered = shuffle.scatter([rows])[:, 0, 0, 0]
    assert sorted(scattered.tolist()) == list(range(24))
    assert scattered.tolist() != list(range(24))
    assert torch.equal(shuffle.gather(scattered[None, :, None])[0, :, 0], torch.arange(24.0))


def test_each_step_shuffles_anew():
    orders = {tuple(permutation(3, step, 24, 1).tolist()) for step in range(20)}
    assert len(orders) == 20


def test_a_block_keeps_its_rows_to_itself():
    """Two machines that shuffle among their own ranks; one row a block: nobody moves."""
    halves = permutation(3, step=2, batch=24, blocks=2)
    assert sorted(halves[:12]) == list(range(12)) and sorted(halves[12:]) == list(range(12, 24))
    assert halves[:12].tolist() != list(range(12))
    assert (halves[12:] - 12).tolist() != halves[:12].tolist()
    assert permutation(3, step=2, batch=24, blocks=24).tolist() == list(range(24))


def test_published_cifar_schedule():
    """lr = 0.06 (1 + cos(pi e / 200)) / 2, set once per epoch, e from 1."""
    schedule = Schedule(name="cosine", epochs=200, update="epoch", first_epoch=1)
    for epoch in range(200):
        expected = 0.06 * (1 + math.cos(math.pi * (epoch + 1) / 200)) / 2
        for step in (0, 50, 96):
            assert learning_rate(schedule, 0.06, epoch * 97 + step, 97) == pytest.approx(expected)


def test_the_same_schedule_in_steps():
    by_epochs = Schedule(epochs=10, update="step", warmup_epochs=2)
    by_steps = Schedule(steps=50, warmup_steps=10)
    for step in range(50):
        rate = learning_rate(by_epochs, 0.3, step, 5)
        assert learning_rate(by_steps, 0.3, step, 5) == pytest.approx(rate)
    drops = Schedule(name="step", steps=50, milestones=(20, 40))
    assert learning_rate(drops, 1.0, 19, 7) == 1.0
    assert learning_rate(drops, 1.0, 20, 7) == pytest.approx(0.1)


def test_step_schedule_with_warmup():
    schedule = Schedule(name="step", epochs=10, milestones=(4, 8), warmup_epochs=2)
    rates = [learning_rate(schedule, 1.0, step, 5) for step in range(50)]
    assert rates[:10] == pytest.approx(np.linspace(0.1, 1.0, 10))
    assert rates[10:20] == [1.0] * 10
    assert rates[20:40] == pytest.approx([0.1] * 20)
    assert rates[40:] == pytest.approx([0.01] * 10)


def test_cosine_by_steps_starts_high_and_ends_low():
    schedule = Schedule(name="cosine", epochs=4, update="step", warmup_epochs=1)
    rates = [learning_rate(schedule, 2.0, step, 10) for step in range(40)]
    assert rates[9] == pytest.approx(2.0)
    assert rates[10] == pytest.approx(2.0)
    assert all(a > b for a, b in itertools.pairwise(rates[10:]))
    assert rates[-1] < 0.02


def test_a_warmup_that_ends_inside_an_epoch_is_followed_by_the_full_rate():
    schedule = Schedule(epochs=4, warmup_epochs=1.5)
    rates = [learning_rate(schedule, 1.0, step, 4) for step in range(16)]
    assert rates[5] == pytest.approx(1.0) and rates[6:8] == [1.0, 1.0]


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 4, "steps": 4},
        {},
        {"epochs": 4, "warmup_epochs": 4},
        {"steps": 10, "warmup_steps": 50},
        {"epochs": 4, "milestones": [2]},
        {"epochs": 4, "update": "step", "first_epoch": 1},
    ],
    ids=str,
)
def test_a_schedule_that_contradicts_itself_is_refused(wrong):
    with pytest.raises(ValueError):
        Schedule(**wrong)
