"""The seam: an objective is one class and one line, and the engine trains it like any other."""

from collections.abc import Sequence
from typing import Any

import pytest
import torch
from recipes import recipe_from

from fastmoco.config import objectives as config
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.core.rng import Ids
from fastmoco.models.encoder import Encoder
from fastmoco.train.engine import Engine
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.objectives import OBJECTIVES
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.objective import Objective, Views, unit


class FrozenConfig(config.Moco):
    """The section of a toy objective."""


class Frozen(Objective):
    """Tell the other view of an image among the batch, as an untrained encoder sees it."""

    def __init__(
        self, recipe: Recipe, encoder: Encoder, precision: Precision, world: World, ids: Ids
    ) -> None:
        super().__init__(recipe, encoder, precision, world, ids)
        torch.manual_seed(0)
        self._encoder = Encoder(recipe.encoder).to(precision.weights)
        self.followed: list[bool] = []

    @torch.no_grad()
    def prepare(
        self, views: Views, step: int, ids: Ids, statistics: RunningStatistics
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        keys = self._encoder(views[1].to(self._precision.weights))
        return views[:1], unit(keys, self._precision)

    def compare(
        self, q: torch.Tensor, given: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        return info_nce(q, given[rows], given.roll(1, 0), 0.5)

    def follow(self, q: torch.Tensor, given: torch.Tensor, ok: torch.Tensor) -> None:
        self.followed.append(bool(ok))

    def state(self) -> dict[str, Any]:
        return {"followed": len(self.followed)}

    def load(self, state: dict[str, Any]) -> None:
        self.followed = [True] * state["followed"]

    def numbers(self) -> dict[str, float]:
        return {"followed": len(self.followed)}


def test_a_new_objective_trains(worker: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(OBJECTIVES, FrozenConfig, Frozen)
    recipe = recipe_from(worker.DEFAULTS).model_copy(update={"objective": FrozenConfig(bn_group=4)})
    engine = Engine(recipe, World(), torch.device("cpu"))
    views = worker.images(recipe.batch, 0)
    losses = [float(engine.step(*views, step).loss.mean()) for step in range(8)]
    assert losses[-1] < losses[0] - 0.1
    assert engine.objective.numbers() == {"followed": 8} and engine.state()["followed"] == 8
    bad = views[0].clone()
    bad[0, 0, 0, 0] = torch.nan
    before = [p.clone() for p in engine.encoder_q.parameters()]
    assert not engine.step(bad, views[1], 8).ok
    after = engine.encoder_q.parameters()
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
