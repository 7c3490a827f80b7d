"""Shuffling BN: keys are normalized in other company than queries.

Without it the network cheats: the statistics of a BatchNorm group tell which samples share it, and
query and positive key would always share theirs (MoCo, section 3.3). The permutation of a step is
a function of (seed, step), so no rank has to tell it to the others.
"""

from collections.abc import Sequence
from typing import Literal

import numpy as np
import numpy.typing as npt
import torch

from fastmoco.config.objectives import Shuffled
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.rng import Stream, raw_words
from fastmoco.train.objectives.objective import to_device

Scope = Literal["global", "node", "off"]
Exchange = Literal["all_to_all", "all_gather"]
Rows = npt.NDArray[np.int64]


def permutation(seed: int, step: int, batch: int, blocks: int) -> Rows:
    """Return which row of the global batch comes to each place, rows of a block among themselves.

    Args:
        seed, step: of the run.
        batch: rows of the global batch.
        blocks: equal contiguous blocks of it: 1: everyone changes places with everyone; as many as
            rows: nobody moves.
    """
    words = raw_words(seed, Stream.SHUFFLE_BN, step, batch)
    within = np.argsort(words.reshape(blocks, -1), axis=1, kind="stable")
    size = batch // blocks
    return (within + size * np.arange(blocks)[:, None]).ravel()


class Shuffle:
    """The permutation of one step's global batch, and the way of its rows between the ranks.

    Args:
        seed: of the run.
        step: of the run.
        batch: rows of the global batch.
        world: each holds a contiguous, equal slice of it.
        device: where the rows live.
        scope: who changes places, see `Recipe.shuffle`.
        exchange: how the rows travel, see `Recipe.exchange`.
    """

    def __init__(
        self,
        seed: int,
        step: int,
        batch: int,
        world: World,
        device: torch.device,
        scope: Scope = "global",
        exchange: Exchange = "all_to_all",
    ) -> None:
        self._world, self._device = world, device
        self._peers = world.node if scope == "node" else world
        self._exchange = exchange if self._peers.size > 1 else "all_gather"  # alone: one copy
        self._moves = scope != "off"
        blocks = {"global": 1, "node": world.size // self._peers.size, "off": batch}[scope]
        self._order = permutation(seed, step, batch, blocks)
        self._inverse = self._to_device(np.argsort(self._order))
        self._own = world.share(batch)

    def _to_device(self, rows: Rows) -> torch.Tensor:
        return to_device(rows, self._device)

    def scatter(self, views: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return this rank's slice of the shuffled batch, one view after the other.

        Args:
            views: V times (n, C, H, W) channels-last rows of this rank, in plan order; they travel
                together.

        Returns:
            (V * n, C, H, W), channels-last.
        """
        if not self._moves:
            return torch.cat(list(views)) if len(views) > 1 else views[0]
        # channels-last memory seen as plain contiguous rows
        nhwc = [view.permute(0, 2, 3, 1) for view in views]
        rows = torch.stack(nhwc, dim=1) if len(nhwc) > 1 else nhwc[0].unsqueeze(1)
        moved = self._all_to_all(rows) if self._exchange == "all_to_all" else self._all_gather(rows)
        return moved.transpose(0, 1).flatten(0, 1).permute(0, 3, 1, 2)

    def _all_gather(self, rows: torch.Tensor) -> torch.Tensor:
        """Fetch every row of the peers, keep those of this rank's places."""
        wanted = self._order[self._own] - self._first_of_peers
        return self._peers.gather(rows)[self._to_device(wanted)]

    def _all_to_all(self, rows: torch.Tensor) -> torch.Tensor:
        """Send each row to the rank that has its place, and no other."""
        share, me = len(rows), self._peers.rank
        first = self._first_of_peers
        # [place of a peer's slice, its row] of all peers' slices, counted from the peers' first row
        wanted = (self._order[first : first + share * self._peers.size] - first).reshape(-1, share)
        owners = wanted // share
        leaving = wanted[owners == me] - me * share  # by destination, in its order
        sent = (owners == me).sum(axis=1)
        received = np.bincount(owners[me], minlength=self._peers.size)
        arriving = np.argsort(owners[me], kind="stable")  # by source, in our order
        arrived = self._peers.exchange(
            rows[self._to_device(leaving)], sent.tolist(), received.tolist()
        )
        return arrived[self._to_device(np.argsort(arriving))]

    @property
    def _first_of_peers(self) -> int:
        """The row of the global batch that the first of the peers starts with."""
        share = self._own.stop - self._own.start
        return int(self._own.start - self._peers.rank * share)

    def gather(self, keys: torch.Tensor) -> torch.Tensor:
        """Return the keys of the whole batch, back in plan order.

        Args:
            keys: (V, n, dim), those of this rank's places.

        Returns:
            (V, batch, dim).
        """
        rows = self._world.gather(keys.transpose(0, 1).flatten(1))[self._inverse]
        return rows.view(len(rows), len(keys), -1).transpose(0, 1)


def make_shuffle(recipe: Recipe, step: int, world: World, device: torch.device) -> Shuffle:
    """Return the shuffle of a step, whose objective asks for one."""
    wanted = recipe.objective
    assert isinstance(wanted, Shuffled)
    scope: Scope = wanted.shuffle if wanted.shuffled_views else "off"
    return Shuffle(recipe.seed, step, recipe.batch, world, device, scope, wanted.exchange)
