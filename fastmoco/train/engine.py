"""The step that every objective shares: guarded, fused, on any number of ranks."""

import os
import shutil
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from fastmoco.config.objectives import Shuffled
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.malloc import keep_freed_memory
from fastmoco.core.precision import LossScale, Precision
from fastmoco.core.rng import Ids
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder, batch_norms, set_bn_group
from fastmoco.train.guard import Guard, RunningStatistics, finite
from fastmoco.train.objectives import OBJECTIVES
from fastmoco.train.objectives.objective import Objective, unit
from fastmoco.train.optimizers import build_optimizer, step_if

NO_IDS: Ids = np.empty(0, np.int64)


@dataclass(frozen=True)
class StepOutput:
    """What a step leaves on the device for whoever wants to read it.

    A symmetric step has two queries a sample; of a step in parts, only `loss` is of all of them.

    Attributes:
        loss: (n,) of each query of this rank.
        positive, negative: (n,), (n, K) similarities over T.
        q: (n, dim) outputs of unit length.
        grad_norm: 0-d norm of the averaged gradients, before clipping.
        ok: 0-d bool, False where the step was skipped.
    """

    loss: torch.Tensor
    positive: torch.Tensor
    negative: torch.Tensor
    q: torch.Tensor
    grad_norm: torch.Tensor
    ok: torch.Tensor


class Engine:
    """The query encoder, its objective, and the step that trains them.

    Args:
        recipe: of the run.
        world: that share each global batch.
        device: where everything lives.
        ids: (N,) int64 of the samples that take part, ascending; only a memory bank needs them.
        initial: weights to start from, of all or some of the query encoder's tensors.

    Raises:
        UsageError: a rank would not hold a whole number of `bn_group`.
    """

    def __init__(
        self,
        recipe: Recipe,
        world: World,
        device: torch.device,
        ids: Ids = NO_IDS,
        initial: Mapping[str, torch.Tensor] | None = None,
    ) -> None:
        check_bn_group(recipe, world.size, world.size // world.local_size)
        keep_freed_memory(device)
        encoder = build_encoder(recipe, world)
        recipe = without_idle_shuffle(recipe, encoder)
        self.recipe, self.world, self.device = recipe, world, device
        self._precision = Precision.of(recipe.runtime.precision, device.type)
        if initial:
            encoder.load_state_dict(encoder.state_dict() | dict(initial))
        self.encoder_q = encoder.to(device, self._precision.weights)
        make = OBJECTIVES[type(recipe.objective)]
        self.objective: Objective = make(recipe, encoder, self._precision, world, ids)
        networks = [encoder, *self.objective.networks]
        self.statistics = RunningStatistics(networks)
        self.guard = Guard(recipe.runtime.max_skipped).to(device)
        self.scale = LossScale(self._precision).to(device)
        self.optimizer = build_optimizer(recipe, list(encoder.parameters()))
        if should_compile(recipe, world, device):
            for network in networks:
                network.compile(dynamic=False)
        if device.type == "cuda":
            # All batches have one shape: the fastest convolution is looked for once.
            torch.backends.cudnn.benchmark = not recipe.runtime.deterministic
        self._query = world.wrap(encoder)
        self._params: list[torch.Tensor] = list(encoder.parameters())
        self.train()

    def step(
        self, query_view: torch.Tensor, key_view: torch.Tensor, step: int, ids: Ids = NO_IDS
    ) -> StepOutput:
        """Take one step; all that it moves moves together or not at all.

        Args:
            query_view, key_view: (n, 3, H, W) channels-last, this rank's slice of the batch; the
                same twice for an objective that draws one view.
            step: of the run; seeds the shuffle.
            ids: (n,) int64 of the samples; only a memory bank needs them.
        """
        saved = self.statistics.saved()
        shown, given = self.objective.prepare((query_view, key_view), step, ids, self.statistics)
        self.optimizer.zero_grad()
        loss, positive, negative, outputs = self._backward(shown, given)

        gradients = [p.grad for p in self._params if p.grad is not None]
        self.scale.unscale_(gradients)
        ok, grad_norm = finite(gradients)
        if self.recipe.optimizer.clip:
            torch._foreach_mul_(gradients, (self.recipe.optimizer.clip / grad_norm).clamp(max=1))
        step_if(self.optimizer, ok)
        self.objective.follow(torch.cat(outputs), given, ok)
        self.statistics.restore_unless(ok, saved)
        self.scale.update(ok)
        self.guard.count(ok)
        return StepOutput(loss, positive, negative, outputs[-1], grad_norm, ok)

    def _backward(
        self, views: Sequence[torch.Tensor], given: Any
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, list[torch.Tensor]]:
        """Add up the gradients of the loss of this rank's samples, part by part.

        Args:
            views: V times (n, 3, H, W) images.
            given: what the objective needs beside them.

        Returns:
            The losses of all queries; positive and negative logits of the last part; the unit
            outputs of each part.
        """
        parts, count = self.recipe.runtime.accumulate, len(views[0])
        losses, outputs = [], []
        for part in self.statistics.over(parts):
            rows = slice(part * count // parts, (part + 1) * count // parts)
            images = torch.cat([v[rows] for v in views]) if len(views) > 1 else views[0][rows]
            last = part == parts - 1
            with nullcontext() if last else self.world.no_sync(self._query):
                with self._precision.autocast():
                    projected = self._query(images.to(self._precision.weights))
                q = unit(projected, self._precision)
                loss, positive, negative = self.objective.compare(q, given, rows)
                directions = len(loss) // (rows.stop - rows.start)  # their losses are added up
                total = loss.mean() * (directions / parts)
                self.scale.scaled(total).backward()  # type: ignore[no-untyped-call]
            losses.append(loss.detach())
            outputs.append(q.detach())
        return torch.cat(losses), positive.detach(), negative.detach(), outputs

    def train(self) -> None:
        """Put all networks into training mode; BatchNorm of a key encoder stays in it too."""
        for network in (self.encoder_q, *self.objective.networks):
            network.train()

    def all_reduce_buffers(self) -> None:
        """Average the running statistics over the ranks: before they are read or saved."""
        self.world.mean_(self.statistics.flat)

    def state(self) -> dict[str, Any]:
        """Return everything that a resumed run needs, as tensors under bare names."""
        return {
            "encoder_q": self.encoder_q.state_dict(),
            **self.objective.state(),
            "guard": self.guard.state_dict(),
            "scale": self.scale.state_dict(),
            "optimizer": self.optimizer.state_dict(),
        }

    def load(self, state: dict[str, Any]) -> None:
        """Take over a state that `state` returned."""
        self.encoder_q.load_state_dict(state["encoder_q"])
        self.objective.load(state)
        self.guard.load_state_dict(state["guard"])
        scale = state.get("scale")  # 1 in another precision, none in older checkpoints
        if self.scale.active and scale and float(scale["scale"]) > 1:
            self.scale.load_state_dict(scale)
        options = [group | {"params": None} for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, given in zip(self.optimizer.param_groups, options, strict=True):
            group.update(given | {"params": group["params"]})  # the recipe's, not the checkpoint's


def build_encoder(recipe: Recipe, world: World = World()) -> Encoder:
    """Return an encoder with the initial weights of the recipe's seed, equal on all ranks."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(recipe.seed)
        encoder = Encoder(recipe.encoder)
    if recipe.objective.bn == "groups":
        set_bn_group(encoder, recipe.objective.bn_group)
    else:
        set_bn_group(encoder, 0, world)
    return encoder


def without_idle_shuffle(recipe: Recipe, encoder: Encoder) -> Recipe:
    """Return the recipe without the shuffle of a network that has no BatchNorm to hide from."""
    if batch_norms(encoder) or not recipe.objective.shuffled_views:
        return recipe
    objective = recipe.objective.model_copy(update={"shuffle": "off"})
    return recipe.model_copy(update={"objective": objective})


def should_compile(recipe: Recipe, world: World, device: torch.device) -> bool:
    """Say whether torch.compile does more good than harm, where the recipe leaves it open.

    On a GPU it does 1.8 times the images per second, for a minute at the start.
    """
    if recipe.runtime.compile != "auto":
        return recipe.runtime.compile
    # A compiler times its kernels and may choose others at the next start; it stops at collectives.
    exact = recipe.runtime.deterministic
    in_one_graph = recipe.objective.bn == "groups" or world.size == 1
    # Those that Triton looks for.
    has_compiler = "CC" in os.environ or shutil.which("gcc") or shutil.which("clang")
    return device.type == "cuda" and in_one_graph and not exact and bool(has_compiler)


def check_bn_group(recipe: Recipe, ranks: int, machines: int = 1) -> None:
    """Check that a rank holds a whole number of BatchNorm groups in each part of a step.

    Raises:
        UsageError: it does not, or a shuffle on each machine would change no group's company.
    """
    group = recipe.objective.bn_group if recipe.objective.bn == "groups" else 1
    by_node = isinstance(recipe.objective, Shuffled) and recipe.objective.shuffle == "node"
    if by_node and recipe.objective.shuffled_views and recipe.batch // machines == group:
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
