"""The MoCo step: Algorithm 1 of He et al. 2020, fused, guarded, on any number of ranks."""

import copy
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.malloc import keep_freed_memory
from fastmoco.core.precision import LossScale, Precision
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder, set_bn_group
from fastmoco.train.guard import Guard, RunningStatistics, finite
from fastmoco.train.objectives.losses import info_nce
from fastmoco.train.objectives.momentum import momentum_update
from fastmoco.train.objectives.queue import KeyQueue
from fastmoco.train.objectives.shuffle_bn import Shuffle
from fastmoco.train.optimizers import build_optimizer, step_if


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device for whoever wants to read it.

    A symmetric step has two queries a sample; of a step in parts, only `loss` is of all of them.

    Attributes:
        loss: (n,) InfoNCE of each query of this rank.
        positive, negative: (n,), (n, K) similarities over T.
        q: (n, dim) queries of unit length.
        grad_norm: 0-d norm of the averaged gradients, before clipping.
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

    def __init__(self, recipe: Recipe, ranks: World, device: torch.device) -> None:
        check_bn_group(recipe, ranks.size, ranks.size // ranks.local_size)
        keep_freed_memory(device)
        self.recipe, self.ranks, self.device = recipe, ranks, device
        self._precision = Precision(recipe.runtime.precision, device.type)
        weights = self._precision.weights
        self.encoder_q = build_encoder(recipe, ranks).to(device, weights)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.statistics = RunningStatistics([self.encoder_q, self.encoder_k])
        self.queue = KeyQueue(recipe.objective.queue, recipe.encoder.dim, recipe.seed, weights).to(
            device
        )
        self.guard = Guard(recipe.runtime.max_skipped).to(device)
        self.scale = LossScale(self._precision).to(device)
        self.optimizer = build_optimizer(recipe, list(self.encoder_q.parameters()))
        if recipe.runtime.compile:
            self.encoder_q.compile()
            self.encoder_k.compile()
        if device.type == "cuda":
            # All batches have one shape: the fastest convolution is looked for once.
            torch.backends.cudnn.benchmark = not recipe.runtime.deterministic
        self._query = ranks.wrap(self.encoder_q)
        self._params_q: list[torch.Tensor] = list(self.encoder_q.parameters())
        self._params_k: list[torch.Tensor] = list(self.encoder_k.parameters())
        self.train()

    def step(self, query_view: torch.Tensor, key_view: torch.Tensor, step: int) -> StepOutput:
        """Take one step; weights, momentum, queue and statistics move together or not at all.

        Args:
            query_view, key_view: (n, 3, H, W) channels-last, this rank's slice of the batch.
            step: of the run; seeds the shuffle.
        """
        queries, positives = [query_view], [key_view]
        if self.recipe.objective.symmetric:
            queries, positives = [query_view, key_view], [key_view, query_view]
        saved = self.statistics.saved()
        shuffle = self._shuffle(step)
        images = shuffle.scatter([view.to(self._precision.wire) for view in positives])
        keys = shuffle.gather(self._keys(images).view(len(positives), -1, self.recipe.encoder.dim))
        self.optimizer.zero_grad()
        loss, positive, negative, q = self._backward(queries, shuffle.own(keys))

        gradients = [p.grad for p in self._params_q if p.grad is not None]
        self.scale.unscale_(gradients)
        ok, grad_norm = finite(gradients)
        if self.recipe.optimizer.clip:
            torch._foreach_mul_(gradients, (self.recipe.optimizer.clip / grad_norm).clamp(max=1))
        step_if(self.optimizer, ok)
        # After the optimizer this equals the paper's update before the keys, from step 2 on; at
        # step 1 both encoders are equal and the paper's update does nothing.
        momentum_update(self._params_k, self._params_q, self.recipe.objective.momentum, ok)
        self.queue.enqueue(keys.flatten(0, 1), ok)
        self.statistics.restore_unless(ok, saved)
        self.scale.update(ok)
        self.guard.count(ok)
        return StepOutput(loss, positive, negative, q, grad_norm, ok)

    def _shuffle(self, step: int) -> Shuffle:
        recipe = self.recipe
        return Shuffle(
            recipe.seed,
            step,
            recipe.batch,
            self.ranks,
            self.device,
            recipe.objective.shuffle,
            recipe.objective.exchange,
        )

    @torch.no_grad()
    def _keys(self, images: torch.Tensor) -> torch.Tensor:
        """Return the (n, dim) keys of (n, 3, H, W) images in shuffled order."""
        parts = self.recipe.runtime.accumulate
        shares = images.chunk(parts)
        keys = []
        for part in self.statistics.over(parts):
            with self._precision.autocast():
                keys.append(self._unit(self.encoder_k(shares[part])))
        return torch.cat(keys)

    def _backward(
        self, views: Sequence[torch.Tensor], keys: torch.Tensor
    ) -> tuple[torch.Tensor, ...]:
        """Add up the gradients of the loss of this rank's samples, part by part.

        Args:
            views: V times (n, 3, H, W) images.
            keys: (V, n, dim) their positive keys.

        Returns:
            The losses of all queries; positive and negative logits and queries of the last part.
        """
        parts, count = self.recipe.runtime.accumulate, keys[0].shape[0]
        losses = []
        for part in self.statistics.over(parts):
            rows = slice(part * count // parts, (part + 1) * count // parts)
            images = torch.cat([v[rows] for v in views]) if len(views) > 1 else views[0][rows]
            last = part == parts - 1
            with nullcontext() if last else self.ranks.no_sync(self._query):
                with self._precision.autocast():
                    projected = self._query(images.to(self._precision.weights))
                q = self._unit(projected)
                positives = keys[:, rows].flatten(0, 1)
                loss, positive, negative = info_nce(
                    q, positives, self.queue.keys, self.recipe.objective.temperature
                )
                objective = loss.mean() * (len(views) / parts)  # the sum of both directions
                self.scale.scaled(objective).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
        return torch.cat(losses), positive.detach(), negative.detach(), q.detach()

    def _unit(self, projected: torch.Tensor) -> torch.Tensor:
        return nn.functional.normalize(projected.to(self._precision.weights), dim=1)

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
            "scale": self.scale.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `state` returned."""
        self.encoder_q.load_state_dict(state["encoder_q"])
        self.encoder_k.load_state_dict(state["encoder_k"])
        self.queue.load_state_dict(state["queue"])
        self.guard.load_state_dict(state["guard"])
        scale = state.get("scale")  # 1 in another precision, none in older checkpoints
        if self.scale.active and scale and float(scale["scale"]) > 1:
            self.scale.load_state_dict(scale)
        options = [group | {"params": None} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given | {"params": group["params"]})  # the recipe's, not the checkpoint's


def build_encoder(recipe: Recipe, ranks: World = World()) -> Encoder:
    """Return an encoder with the initial weights of the recipe's seed, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = Encoder(recipe.encoder)
    if recipe.objective.bn == "groups":
        set_bn_group(encoder, recipe.objective.bn_group)
    else:
        set_bn_group(encoder, 0, ranks)
    return encoder


def check_bn_group(recipe: Recipe, ranks: int, machines: int = 1) -> None:
    """Check that a rank holds a whole number of BatchNorm groups in each part of a step.

    Raises:
        UsageError: it does not, or a shuffle on each machine would change no group's company.
    """
    group = recipe.objective.bn_group if recipe.objective.bn == "groups" else 1
    if recipe.objective.shuffle == "node" and recipe.batch // machines == group:
        raise UsageError(
            "objective.shuffle: node with one bn_group per machine hides nothing from the network: "
            "set objective.shuffle=global, or a smaller bn_group."
        )
    if recipe.batch % (ranks * group):
        fitting = [n for n in range(1, ranks + 1) if recipe.batch % (n * group) == 0]
        raise UsageError(
            f"batch {recipe.batch} on {ranks} ranks is {recipe.batch / ranks:g} images each, not a "
            f"whole number of objective.bn_group {group}: start {fitting[-1]} ranks, or change one."
        )
    if recipe.batch % (ranks * group * recipe.runtime.accumulate):
        groups = recipe.batch // (ranks * group)
        divisors = [n for n in range(1, groups + 1) if groups % n == 0]
        raise UsageError(
            f"runtime.accumulate {recipe.runtime.accumulate} does not divide the {groups} groups "
            f"of {group} that a rank holds: choose one of {divisors}."
        )
