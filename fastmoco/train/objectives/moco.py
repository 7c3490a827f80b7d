"""Momentum Contrast: Algorithm 1 of He et al. 2020."""

import copy
from collections.abc import Sequence
from typing import Any

import torch

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.models.encoder import Encoder
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.momentum import momentum_update
from fastmoco.train.objectives.objective import Views, unit
from fastmoco.train.objectives.queue import KeyQueue
from fastmoco.train.objectives.shuffle_bn import Shuffle


class Moco:
    """A key encoder that follows the query encoder, and a queue of its keys.

    Keys are (V, batch, dim), of the whole batch in plan order: on every rank the same are enqueued.
    """

    def __init__(
        self, recipe: Recipe, encoder: Encoder, precision: Precision, world: World
    ) -> None:
        self._recipe, self._precision, self._world = recipe, precision, world
        self._device = next(encoder.parameters()).device
        self.encoder_k = copy.deepcopy(encoder).requires_grad_(False)
        size, dim = recipe.objective.queue, recipe.encoder.dim
        self.queue = KeyQueue(size, dim, recipe.seed, precision.weights).to(self._device)
        self._params_q: list[torch.Tensor] = list(encoder.parameters())
        self._params_k: list[torch.Tensor] = list(self.encoder_k.parameters())

    @property
    def networks(self) -> Sequence[Encoder]:
        """The key encoder."""
        return (self.encoder_k,)

    def queries(self, views: Views) -> Sequence[torch.Tensor]:
        """Return the query view; of the symmetric loss, both."""
        return views if self._recipe.objective.symmetric else views[:1]

    @torch.no_grad()
    def keys(self, views: Views, step: int, statistics: RunningStatistics) -> torch.Tensor:
        """Return (V, batch, dim) keys, each made in other company than its query."""
        objective, parts = self._recipe.objective, self._recipe.runtime.accumulate
        shown = views[::-1] if objective.symmetric else views[1:]
        shuffle = self._shuffle(step)
        shares = shuffle.scatter([view.to(self._precision.comm_dtype) for view in shown]).chunk(
            parts
        )
        keys = []
        for part in statistics.over(parts):
            with self._precision.autocast():
                keys.append(unit(self.encoder_k(shares[part]), self._precision))
        return shuffle.gather(torch.cat(keys).view(len(shown), -1, self._recipe.encoder.dim))

    def compare(
        self, q: torch.Tensor, keys: torch.Tensor, rows: slice
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return InfoNCE of the queries against their keys and the queue."""
        own = keys[:, self._world.share(keys.shape[1])]
        positives = own[:, rows].flatten(0, 1)
        return info_nce(q, positives, self.queue.keys, self._recipe.objective.temperature)

    def follow(self, keys: torch.Tensor, ok: torch.Tensor) -> None:
        """Move the key encoder, then enqueue the keys."""
        # After the optimizer this equals the paper's update before the keys, from step 2 on; at
        # step 1 both encoders are equal and the paper's update does nothing.
        momentum_update(self._params_k, self._params_q, self._recipe.objective.momentum, ok)
        self.queue.enqueue(keys.flatten(0, 1), ok)

    def _shuffle(self, step: int) -> Shuffle:
        recipe = self._recipe
        return Shuffle(
            recipe.seed,
            step,
            recipe.batch,
            self._world,
            self._device,
            recipe.objective.shuffle,
            recipe.objective.exchange,
        )

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
        age = filled / self._recipe.keys_per_step
        return {"queue_filled": filled, "queue_age_steps": age}
