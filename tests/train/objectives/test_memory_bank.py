"""The memory bank against its formulas, image by image, on one and two ranks."""

import importlib.util
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.rng import Permutation, Stream
from fastmoco.errors import UsageError
from fastmoco.train.engine import Engine, build_encoder
from fastmoco.train.objectives.memory_bank import places_in
from fastmoco.train.objectives.queue import random_units

_SPEC = importlib.util.spec_from_file_location("naive", Path(__file__).parents[1] / "naive.py")
naive = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(naive)

STEPS = 6
SECTION = {"name": "memory_bank", "queue": 24, "temperature": 0.2, "bn_group": 4}


class Naive:
    """One network, a dictionary of features, plain SGD."""

    def __init__(self, recipe: Recipe, ids: list[int]) -> None:
        self.recipe, self.ids = recipe, ids
        self.net = naive.network(recipe, build_encoder(recipe).to(torch.float64).state_dict())
        rows = random_units(len(ids), recipe.encoder.dim, recipe.seed, torch.float64)
        self.bank = dict(zip(ids, rows, strict=True))
        options = {"lr": recipe.optimizer.lr, "weight_decay": recipe.optimizer.weight_decay}
        self.sgd = torch.optim.SGD(self.net.parameters(), momentum=0.9, foreach=False, **options)

    def step(self, x: torch.Tensor, ids: list[int], step: int) -> torch.Tensor:
        wanted = self.recipe.objective
        order = Permutation(len(self.ids), self.recipe.seed, Stream.NEGATIVES, step)
        drawn = [self.ids[row] for row in order(np.arange(wanted.queue + 1))]
        queries = normalize(naive.by_groups(self.net, x, wanted.bn_group), dim=1)
        losses = []
        for q, own in zip(queries, ids, strict=True):
            others = [other for other in drawn if other != own][: wanted.queue]
            features = torch.stack([self.bank[i] for i in [own, *others]])
            logits = features @ q / wanted.temperature
            losses.append(cross_entropy(logits[None], torch.tensor([0])))
        loss = torch.stack(losses)
        self.sgd.zero_grad()
        loss.mean().backward()
        self.sgd.step()
        b, before = wanted.bank_momentum, dict(self.bank)
        for q, own in zip(queries.detach(), ids, strict=True):  # the last of an image counts
            self.bank[own] = normalize(b * before[own] + (1 - b) * q, dim=0)
        return loss.detach()


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(
    ("ranks", "changes"),
    [
        (1, {}),
        (2, {}),
        (1, {"accumulate": 2}),
        (2, {"objective": SECTION | {"queue": 39, "bank_momentum": 0.9}}),
    ],
    ids=str,
)
def test_steps_equal_the_formula(run_ranks, worker, ranks, changes):
    changes = {"objective": SECTION} | changes
    recipe = worker.recipe_of(changes)
    ran = run_ranks(ranks, steps=STEPS, recipe=changes)
    theirs = Naive(recipe, worker.IDS.tolist())
    for step, row in enumerate(ran["log"]):
        x, _ = worker.images(recipe.batch, step)
        loss = theirs.step(x, worker.ids(recipe.batch, step).tolist(), step)
        assert torch.allclose(row["loss"], loss, rtol=0, atol=1e-9), step
        bank = torch.stack(list(theirs.bank.values()))
        assert torch.allclose(row["bank"], bank, rtol=0, atol=1e-9), step
    want = theirs.net.state_dict()
    for name, weight in ran["state"]["encoder_q"].items():
        if weight.is_floating_point():
            plain = want[naive.plain_name(name)]
            assert torch.allclose(weight, plain, rtol=0, atol=1e-9), name


def test_a_query_never_meets_its_own_row_among_the_negatives(worker):
    recipe = worker.recipe_of({"objective": SECTION | {"queue": 39}})  # all others are drawn
    engine = Engine(recipe, World(), torch.device("cpu"), worker.IDS)
    ids = worker.ids(recipe.batch, 0)
    bank = engine.objective.bank.clone()
    out = engine.step(*worker.images(recipe.batch, 0), 0, ids)
    for q, row, positive, negative in zip(out.q, ids // 3, out.positive, out.negative, strict=True):
        similar = bank @ q / 0.2
        assert positive == pytest.approx(float(similar[row]))
        others = torch.cat([similar[:row], similar[row + 1 :]]).sort().values
        assert torch.allclose(negative.sort().values, others)


def test_each_step_draws_others_and_the_next_seed_too():
    drawn = {
        tuple(Permutation(1000, seed, Stream.NEGATIVES, step)(np.arange(8)).tolist())
        for seed in (0, 1)
        for step in range(10)
    }
    assert len(drawn) == 20


def test_places():
    drawn = np.array([7, 2, 9, 4, 0])
    assert places_in(drawn, np.array([9, 7, 3, 0, 11])).tolist() == [2, 0, 4, 4, 4]


def test_a_bank_smaller_than_its_negatives_is_refused(worker):
    recipe = worker.recipe_of({"objective": SECTION | {"queue": 40}})
    with pytest.raises(UsageError, match=r"bank of 40 images has 39 others to draw: choose fewer"):
        Engine(recipe, World(), torch.device("cpu"), worker.IDS)
