"""The MoCo step: Algorithm 1 of He et al. 2020, fused, guarded, on any number of ranks."""

import copy
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmoco.config import Recipe
from fastmoco.distributed import Ranks
from fastmoco.errors import UsageError
from fastmoco.models.resnet import Encoder, set_bn_group
from fastmoco.train.guard import Guard, RunningStatistics, finite
from fastmoco.train.loss import info_nce
from fastmoco.train.momentum import momentum_update
from fastmoco.train.optim import build_optimizer
from fastmoco.train.queue import KeyQueue
from fastmoco.train.shuffle import Shuffle


@dataclass(frozen=True)
class Outcome:
    """What a step leaves on the device for whoever wants to read it.

    Attributes:
        loss: (n,) InfoNCE of each sample of this rank.
        positive, negative: (n,), (n, K) similarities over T.
        q: (n, dim) queries of unit length.
        grad_norm: 0-d norm of the averaged gradients.
        ok: 0-d bool, False where the step was skipped.
    """

    loss: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    q: torch.Tensor
    grad_norm: torch.Tensor
    ok: torch.Tensor


class MoCo:
    """Two encoders, a queue, and the step that trains them.

    Args:
        recipe: of the run.
        ranks: that share each global batch.
        device: where everything lives.

    Raises:
        UsageError: a rank would not hold a whole number of `bn_group`.
    """

    def __init__(self, recipe: Recipe, ranks: Ranks, device: torch.device) -> None:
        check_bn_group(recipe, ranks.size)
        self.recipe, self.ranks, self.device = recipe, ranks, device
        self._dtype = torch.float64 if recipe.precision == "fp64" else torch.float32
        self.encoder_q = build_encoder(recipe).to(device, self._dtype)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.statistics = RunningStatistics([self.encoder_q, self.encoder_k])
        self.queue = KeyQueue(recipe.queue, recipe.dim, recipe.seed, self._dtype).to(device)
        self.guard = Guard(recipe.max_skipped).to(device)
        self.optimizer = build_optimizer(recipe.optimizer, self.encoder_q.parameters())
        self._query = ranks.wrap(self.encoder_q)
        self._params_q: list[torch.Tensor] = list(self.encoder_q.parameters())
        self._params_k: list[torch.Tensor] = list(self.encoder_k.parameters())
        self.train()

    def step(self, query_view: torch.Tensor, key_view: torch.Tensor, step: int) -> Outcome:
        """Take one step; weights, momentum, queue and statistics move together or not at all.

        Args:
            query_view, key_view: (n, 3, H, W) channels-last, this rank's slice of the batch.
            step: of the run; seeds the shuffle.
        """
        saved = self.statistics.saved()
        shuffle = Shuffle(self.recipe.seed, step, self.recipe.batch, self.ranks, self.device)
        with self._autocast():
            q = self._query(query_view.to(self._dtype))
            with torch.no_grad():
                k = self.encoder_k(shuffle.scatter(key_view.to(self._wire_dtype)))
        q, k = self._unit(q), self._unit(k)
        keys = shuffle.gather(k)  # of all ranks: serves the un-shuffle and the queue
        loss, positive, negative = info_nce(
            q, shuffle.own(keys), self.queue.keys, self.recipe.temperature
        )
        self.optimizer.zero_grad()
        loss.mean().backward()  # type: ignore[no-untyped-call]

        ok, grad_norm = finite(self._params_q)
        self.optimizer.found_inf = (~ok).float()  # type: ignore[attr-defined]
        self.optimizer.step()
        # After the optimizer this equals the paper's update before the keys, from step 2 on; at
        # step 1 both encoders are equal and the paper's update does nothing.
        momentum_update(self._params_k, self._params_q, self.recipe.momentum, ok)
        self.queue.enqueue(keys, ok)
        self.statistics.restore_unless(ok, saved)
        self.guard.count(ok)
        return Outcome(
            loss.detach(), positive.detach(), negative.detach(), q.detach(), grad_norm, ok
        )

    def _autocast(self) -> AbstractContextManager[Any]:
        enabled = self.recipe.precision == "bf16"
        return torch.autocast(self.device.type, torch.bfloat16, enabled=enabled)

    @property
    def _wire_dtype(self) -> torch.dtype:
        """What the key view is cast to before ranks exchange it: what the network computes in."""
        return torch.bfloat16 if self.recipe.precision == "bf16" else self._dtype

    def _unit(self, projected: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(projected.to(self._dtype), dim=1)

    def train(self) -> None:
        """Put both encoders into training mode; BatchNorm of the key encoder stays in it too."""
        self.encoder_q.train()
        self.encoder_k.train()

    def settle(self) -> None:
        """Average the running statistics over the ranks: before they are read or saved."""
        self.ranks.mean_(self.statistics.flat)

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors under bare names."""
        return {
            "encoder_q": self.encoder_q.state_dict(),
            "encoder_k": self.encoder_k.state_dict(),
            "queue": self.queue.state_dict(),
            "guard": self.guard.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `state` returned."""
        self.encoder_q.load_state_dict(state["encoder_q"])
        self.encoder_k.load_state_dict(state["encoder_k"])
        self.queue.load_state_dict(state["queue"])
        self.guard.load_state_dict(state["guard"])
        self.optimizer.load_state_dict(state["optimizer"])


def build_encoder(recipe: Recipe) -> Encoder:
    """Return an encoder with the initial weights of the recipe's seed, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = Encoder(recipe.arch, recipe.stem, recipe.head, recipe.dim)
    set_bn_group(encoder, recipe.bn_group)
    return encoder


def check_bn_group(recipe: Recipe, ranks: int) -> None:
    """Check that a rank holds a whole number of BatchNorm groups.

    Raises:
        UsageError: it does not.
    """
    if recipe.batch % (ranks * recipe.bn_group):
        fitting = [n for n in range(1, ranks + 1) if recipe.batch % (n * recipe.bn_group) == 0]
        raise UsageError(
            f"batch {recipe.batch} on {ranks} ranks is {recipe.batch / ranks:g} images each, not a "
            f"whole number of bn_group {recipe.bn_group}: start {fitting[-1]} ranks, or change one."
        )
