"""The official MoCo step, written plainly from the paper and the structure of its published code.

What a user of that code runs: fp32, NCHW, plain BatchNorm, a Python loop for the momentum update, a
queue of (dim, K) that is cloned for the logits, logits of (1 + K) in one tensor under
cross-entropy, a list all-gather for each exchange, and DistributedDataParallel around the whole
model with its default settings, so that each forward broadcasts the queue. The optimizer is
`torch.optim.SGD` with its defaults. Accuracy and logging are left out.

It is the rival of `benchmarks/compare.py step`, and shows that the counters of the tests count.
"""

import copy
from contextlib import AbstractContextManager
from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torchvision.models import resnet

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.train.engine import build_encoder
from fastmoco.train.objectives.queue import KeyQueue


class OfficialModel(nn.Module):
    """Both encoders and the queue, as one module.

    Args:
        recipe: its `arch`, `head`, `dim`, `queue`, `momentum`, `temperature` and `seed` count.
            Weights and queue start as those of our engine.
        world: that share each global batch; one needs no process group.
    """

    def __init__(self, recipe: Recipe, world: World) -> None:
        super().__init__()
        self.m, self.t, self.world = recipe.objective.momentum, recipe.objective.temperature, world
        self.encoder_q = plain_encoder(recipe)
        self.encoder_k = copy.deepcopy(self.encoder_q).requires_grad_(False)
        self.queue: torch.Tensor
        self.queue_ptr: torch.Tensor
        keys = KeyQueue(recipe.objective.queue, recipe.encoder.dim, recipe.seed).keys
        self.register_buffer("queue", keys.T.contiguous())
        self.register_buffer("queue_ptr", torch.zeros(1, dtype=torch.long))

    def forward(
        self, query_view: torch.Tensor, key_view: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return (n, 1 + K) logits and their (n,) labels; (n, 3, H, W) views of this rank."""
        q = F.normalize(self.encoder_q(query_view), dim=1)
        with torch.no_grad():
            self.update_key_encoder()
            shuffled, back = self._shuffle(key_view)
            k = self._unshuffle(F.normalize(self.encoder_k(shuffled), dim=1), back)
        positive = torch.einsum("nc,nc->n", q, k).unsqueeze(1)
        negative = torch.einsum("nc,ck->nk", q, self.queue.clone().detach())
        logits = torch.cat([positive, negative], 1) / self.t
        self._enqueue(k)
        return logits, torch.zeros(len(logits), dtype=torch.long, device=logits.device)

    @torch.no_grad()
    def update_key_encoder(self) -> None:
        """Move the key parameters, one after the other."""
        for k, q in zip(self.encoder_k.parameters(), self.encoder_q.parameters(), strict=True):
            k.data = k.data * self.m + q.data * (1 - self.m)

    def _shuffle(self, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Return this rank's rows of the shuffled global batch, and the way back."""
        everything = self._gather(images)
        order = torch.randperm(len(everything), device=images.device)
        if self.world.size > 1:
            dist.broadcast(order, src=0)
        own = order.view(self.world.size, -1)[self.world.rank]
        return everything[own], torch.argsort(order)

    def _unshuffle(self, keys: torch.Tensor, back: torch.Tensor) -> torch.Tensor:
        own = back.view(self.world.size, -1)[self.world.rank]
        return self._gather(keys)[own]

    @torch.no_grad()
    def _enqueue(self, keys: torch.Tensor) -> None:
        keys = self._gather(keys)
        first = int(self.queue_ptr)
        self.queue[:, first : first + len(keys)] = keys.T  # K is a whole number of batches
        self.queue_ptr[0] = (first + len(keys)) % self.queue.shape[1]

    def _gather(self, rows: torch.Tensor) -> torch.Tensor:
        if self.world.size == 1:
            return rows
        parts = [torch.ones_like(rows) for _ in range(self.world.size)]
        dist.all_gather(parts, rows)
        return torch.cat(parts)


class OfficialMoCo:
    """The official step behind the interface of our engine.

    Args:
        recipe: of the run; `precision` counts for a tuned one only.
        world: that share each global batch.
        device: where everything lives.
        tuned: with the two changes of a line each that anyone would make: channels-last, and
            autocast at the recipe's precision.
    """

    def __init__(
        self, recipe: Recipe, world: World, device: torch.device, tuned: bool = False
    ) -> None:
        self._device, self._bf16 = device, tuned and recipe.runtime.precision == "bf16"
        self.model = OfficialModel(recipe, world).to(device).train()
        if tuned:
            self.model.to(memory_format=torch.channels_last)
        self._forward = DistributedDataParallel(self.model) if world.size > 1 else self.model
        options = recipe.optimizer
        self.optimizer = torch.optim.SGD(
            self.model.encoder_q.parameters(),
            recipe.lr,
            **options.options(),
            weight_decay=options.weight_decay,
        )

    def step(self, query_view: torch.Tensor, key_view: torch.Tensor, step: int) -> torch.Tensor:
        """Take one step and return its loss (0-d).

        Args:
            query_view, key_view: (n, 3, H, W) fp32, this rank's slice of the batch.
            step: not used: its shuffle has a state.
        """
        with self._autocast():
            logits, labels = self._forward(query_view, key_view)
            loss = F.cross_entropy(logits, labels)
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        return loss.detach()

    def _autocast(self) -> AbstractContextManager[Any]:
        return torch.autocast(self._device.type, torch.bfloat16, enabled=self._bf16)


def plain_encoder(recipe: Recipe) -> nn.Module:
    """Return torchvision's network with MoCo's head for a classifier and our initial weights."""
    net: Any = getattr(resnet, recipe.encoder.arch)(num_classes=recipe.encoder.dim)
    if recipe.encoder.head == "mlp":
        width = net.fc.in_features
        net.fc = nn.Sequential(nn.Linear(width, width), nn.ReLU(), net.fc)
    ours = build_encoder(recipe).state_dict()
    renamed = {n.removeprefix("backbone.").replace("head.", "fc."): t for n, t in ours.items()}
    net.load_state_dict(renamed)
    return cast(nn.Module, net)
