"""End-to-end and SimCLR against their formulas, sample by sample, on one and two ranks."""

import importlib.util
import math
from pathlib import Path

import pytest
import torch
from torch.nn.functional import cross_entropy, normalize

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.train.engine import Engine, build_encoder
from fastmoco.train.objectives.losses import info_nce_in_batch, without

_SPEC = importlib.util.spec_from_file_location("naive", Path(__file__).parents[1] / "naive.py")
naive = importlib.util.module_from_spec(_SPEC)
_SPEC.loader.exec_module(naive)

STEPS = 5
SLOWLY = {"optimizer": {"lr": 0.03, "weight_decay": 1e-3}}  # or rounding grows tenfold each step


def end_to_end(q: torch.Tensor, k: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return (n,) or (2 n,) losses: each query against all keys of the batch."""
    losses = []
    for queries, keys in [(q, k), (k, q)][: 1 + recipe.objective.symmetric]:
        for i in range(len(queries)):
            logits = torch.stack([queries[i] @ key for key in keys]) / recipe.objective.temperature
            losses.append(cross_entropy(logits[None], torch.tensor([i])))
    return torch.stack(losses)


def simclr(first: torch.Tensor, second: torch.Tensor, recipe: Recipe) -> torch.Tensor:
    """Return (n,): of each image the mean of l(i, j) and l(j, i) (Chen et al. 2020, eq. 1)."""
    z, n = torch.cat([first, second]), len(first)

    def loss(i: int, j: int) -> torch.Tensor:
        similar = {k: torch.exp(z[i] @ z[k] / recipe.objective.temperature) for k in range(2 * n)}
        return -torch.log(similar[j] / sum(similar[k] for k in range(2 * n) if k != i))

    return torch.stack([(loss(i, i + n) + loss(i + n, i)) / 2 for i in range(n)])


class Naive:
    """One network, one process, plain SGD."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe = recipe
        weights = build_encoder(recipe).to(torch.float64).state_dict()
        self.net = naive.network(recipe, weights)
        options = {"lr": recipe.optimizer.lr, "weight_decay": recipe.optimizer.weight_decay}
        self.sgd = torch.optim.SGD(self.net.parameters(), momentum=0.9, foreach=False, **options)

    def step(self, x_1: torch.Tensor, x_2: torch.Tensor, step: int) -> torch.Tensor:
        objective, n = self.recipe.objective, len(x_1)
        if objective.bn == "whole":
            z_1, z_2 = normalize(self.net(torch.cat([x_1, x_2])), dim=1).chunk(2)
        else:
            order = naive.shuffled_order(self.recipe, step)
            images = torch.cat([x_1, x_2[order]])
            z = normalize(naive.by_groups(self.net, images, objective.bn_group), dim=1)
            z_1, z_2 = z[:n], z[n:][order.argsort()]
        loss = {"end_to_end": end_to_end, "simclr": simclr}[objective.name](z_1, z_2, self.recipe)
        self.sgd.zero_grad()
        (loss.sum() / n).backward()
        self.sgd.step()
        return loss.detach()


GROUPS = {"bn": "groups", "bn_group": 4}


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
@pytest.mark.parametrize(
    "objective",
    [
        {"name": "end_to_end", "temperature": 0.2, **GROUPS},
        {"name": "end_to_end", "temperature": 0.2, **GROUPS, "symmetric": True},
        {"name": "end_to_end", "temperature": 0.2, **GROUPS, "shuffle": "off"},
        {"name": "end_to_end", "temperature": 0.2, "bn": "whole"},
        {"name": "simclr", "temperature": 0.5},
        {"name": "simclr", "temperature": 0.5, **GROUPS},
    ],
    ids=lambda o: " ".join(map(str, o.values())),
)
def test_steps_equal_the_formula(run_ranks, worker, ranks, objective):
    changes = SLOWLY | {"objective": objective}
    recipe = worker.recipe_of(changes)
    ran = run_ranks(ranks, steps=STEPS, recipe=changes)
    theirs = Naive(recipe)
    for step, row in enumerate(ran["log"]):
        loss = theirs.step(*worker.images(recipe.batch, step), step)
        ours = row["loss"].view(ranks, -1, recipe.batch // ranks).transpose(0, 1).flatten()
        assert torch.allclose(ours, loss, rtol=0, atol=1e-9), step
    want = theirs.net.state_dict()
    for name, weight in ran["state"]["encoder_q"].items():
        if weight.is_floating_point():
            plain = want[naive.plain_name(name)]
            assert torch.allclose(weight, plain, rtol=0, atol=1e-9), name


def test_nt_xent_is_that_of_the_paper_and_its_gradient_too():
    torch.manual_seed(0)
    first, second = (normalize(torch.randn(6, 16, dtype=torch.float64), dim=1) for _ in "ab")
    views = [first.requires_grad_(), second.requires_grad_()]
    z = torch.cat(views)
    logits = (z @ z.T / 0.5).fill_diagonal_(-math.inf)
    theirs = cross_entropy(logits, torch.arange(12).roll(6), reduction="none")
    ours = [
        info_nce_in_batch(q, k, 0, 0.5, more=q)[0] for q, k in ((first, second), (second, first))
    ]
    assert torch.allclose(torch.cat(ours), theirs, rtol=0, atol=1e-12)
    gradients = [torch.autograd.grad(loss, views) for loss in (sum(map(sum, ours)), theirs.sum())]
    assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(*gradients, strict=True))


def test_a_column_of_each_row_is_left_out():
    matrix = torch.arange(12).view(3, 4)
    assert without(matrix, torch.tensor([3, 0, 2])).tolist() == [[0, 1, 2], [5, 6, 7], [8, 9, 11]]


def test_the_pretext_accuracy_is_found_among_the_candidates(worker):
    """Where all logits are equal, the loss is the logarithm of their number."""
    for name, rows in (("end_to_end", 16), ("simclr", 32)):
        recipe = worker.recipe_of({"objective": {"name": name, "temperature": 1e6, **GROUPS}})
        engine = Engine(recipe, World(), torch.device("cpu"))
        out = engine.step(*worker.images(recipe.batch, 0), 0)
        assert out.negative.shape == (rows, recipe.candidates - 1) and len(out.positive) == rows
        assert float(out.loss.mean()) == pytest.approx(math.log(recipe.candidates), abs=1e-4)
