"""Momentum Contrast: Algorithm 1 of He et al. 2020."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.core.rng import Ids
from fastmoco.models.encoder import Encoder
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.momentum import momentum_update
from fastmoco.train.objectives.objective import Objective, Views, unit
from fastmoco.train.objectives.queue import KeyQueue
from fastmoco.train.objectives.shuffle_bn import make_shuffle


class Moco(Objective):
    """A key encoder that follows the query encoder, and a queue of its keys.

    Keys are (V, batch, dim), of the whole batch in plan order: on every rank the same are enqueued.
    """

    def __init__(
        self, recipe: Recipe, encoder: Encoder, precision: Precision, world: World, ids: Ids
    ) -> None:
        super().__init__(recipe, encoder, precision, world, ids)
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        size, dim = self._wanted.queue, recipe.encoder.dim
        self.queue = KeyQueue(size, dim, recipe.seed, precision.weights).to(self._device)
        self._params_q: list[torch.Tensor] = list(encoder.parameters())
        self._params_k: list[torch.Tensor] = list(self.encoder_k.parameters())
        self.networks = (self.encoder_k,)

    def prepare(
        self, views: Views, step: int, ids: Ids, statistics: RunningStatistics
    ) -> tuple[Sequence[torch.Tensor], torch.Tensor]:
        """Return the query view, of the symmetric loss both; and the keys."""
        shown = views if self._wanted.symmetric else views[:1]
        return shown, self._keys(views, step, statistics)

    @torch.no_grad()
    def _keys(self, views: Views, step: int, statistics: RunningStatistics) -> torch.Tensor:
        """Return (V, batch, dim) keys, each made in other company than its query."""
        parts = self._recipe.runtime.accumulate
        shown = views[::-1] if self._wanted.symmetric else views[1:]
        shuffle = make_shuffle(self._recipe, step, self._world, self._device)
        shares = shuffle.scatter([view.to(self._precision.comm_dtype) for view in shown]).chunk(
            parts
        )
        keys = []
        for part in statistics.over(parts):
            with self._precision.autocast():
                keys.append(unit(self.encoder_k(shares[part]), self._precision))
        return shuffle.gather(torch.cat(keys).view(len(shown), -1, self._recipe.encoder.dim))

    def compare(
        self, q: torch.Tensor, given: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return InfoNCE of the queries against their keys and the queue."""
        own = given[:, self._world.share(given.shape[1])]
        positives = own[:, rows].flatten(0, 1)
        return info_nce(q, positives, self.queue.keys, self._wanted.temperature)

    def follow(self, q: torch.Tensor, given: torch.Tensor, ok: torch.Tensor) -> None:
        """Move the key encoder, then enqueue the keys."""
        # After the optimizer this equals the paper's update before the keys, from step 2 on; at
        # step 1 both encoders are equal and the paper's update does nothing.
        momentum_update(self._params_k, self._params_q, self._wanted.momentum, ok)
        self.queue.enqueue(given.flatten(0, 1), ok)

    def state(self) -> dict[str, Any]:
        """Return key encoder and queue."""
        return {"encoder_k": self.encoder_k.state_dict(), "queue": self.queue.state_dict()}

    def load(self, state: dict[str, Any]) -> None:
        """Take over key encoder and queue."""
        self.encoder_k.load_state_dict(state["encoder_k"])
        self.queue.load_state_dict(state["queue"])

    def numbers(self) -> dict[str, float]:
        """Return how full the queue is, and the age of its oldest key in steps."""
        filled = int(self.queue.filled)
        age = filled / self._recipe.encoded_per_step
        return {"queue_filled": filled, "queue_age_steps": age}
