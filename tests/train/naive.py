"""Algorithm 1 of the MoCo paper, written as it reads: no fusing, one "GPU" after the other.

Momentum update before the keys, the logits concatenated into (1 + K), cross-entropy with label 0,
the queue a Python list, plain torch SGD, plain torchvision BatchNorm: every group of samples that
shares statistics goes through the network by itself, as on a GPU of its own.
"""

import copy

import numpy as np
import torch
from torch import nn
from torchvision.models import resnet

from fastmoco.config.recipe import Recipe


def network(recipe: Recipe, weights: dict[str, torch.Tensor]) -> nn.Module:
    """Return a plain torchvision ResNet-10 with a linear head and the given weights."""
    net = resnet.ResNet(resnet.BasicBlock, [1, 1, 1, 1], num_classes=recipe.encoder.dim)
    net.conv1 = nn.Conv2d(3, 64, 3, 2, 1, bias=False)
    net.maxpool = nn.Identity()
    net.load_state_dict({plain_name(n): t.clone() for n, t in weights.items()})
    return net.to(torch.float64)


def plain_name(name: str) -> str:
    """Return what torchvision calls a weight of ours."""
    return name.replace("backbone.", "").replace("head.", "fc.")


def shuffled_order(recipe: Recipe, step: int, nodes: int = 1) -> torch.Tensor:
    """Return which row of the batch comes to each place of the keys' batch."""
    if recipe.objective.shuffle == "off":
        return torch.arange(recipe.batch)
    numbers = np.random.Philox(key=np.array([recipe.seed, 2**63 + step], np.uint64))
    numbers = numbers.random_raw(recipe.batch)
    size = recipe.batch // nodes
    starts = range(0, recipe.batch, size)
    parts = [at + np.argsort(numbers[at : at + size], kind="stable") for at in starts]
    return torch.from_numpy(np.concatenate(parts))


class NaiveMoCo:
    """The paper's state: two networks and a queue."""

    def __init__(
        self,
        recipe: Recipe,
        weights: dict[str, torch.Tensor],
        queue: torch.Tensor,
        nodes: int = 1,
    ):
        self.recipe, self.nodes = recipe, nodes
        self.f_q = network(recipe, weights)
        self.f_k = copy.deepcopy(self.f_q)
        self.queue = list(queue.clone())
        self.pointer = 0
        self.sgd = torch.optim.SGD(
            self.f_q.parameters(),
            lr=recipe.optimizer.lr,
            momentum=0.9,  # the default of the recipe
            weight_decay=recipe.optimizer.weight_decay,
            foreach=False,
        )

    def momentum_update(self) -> None:
        m = self.recipe.objective.momentum
        for k, q in zip(self.f_k.parameters(), self.f_q.parameters(), strict=True):
            k.data = m * k.data + (1 - m) * q.data

    def step(self, x_1: torch.Tensor, x_2: torch.Tensor, step: int) -> torch.Tensor:
        """Return the losses: (batch,), or (2 batch,) of both directions."""
        self.momentum_update()
        both = self.recipe.objective.symmetric
        x_q, x_k = [x_1, x_2][: 1 + both], [x_2, x_1][: 1 + both]
        order = shuffled_order(self.recipe, step, self.nodes)
        q = nn.functional.normalize(by_groups(self.f_q, torch.cat(x_q), self.group), dim=1)
        with torch.no_grad():
            shuffled = by_groups(self.f_k, torch.cat([x[order] for x in x_k]), self.group)
            k = torch.empty_like(shuffled)
            places = torch.cat([order + i * len(x_1) for i in range(len(x_k))])
            k[places] = nn.functional.normalize(shuffled, dim=1)
        positive = torch.einsum("nc,nc->n", q, k)[:, None]
        negative = torch.einsum("nc,kc->nk", q, torch.stack(self.queue))
        logits = torch.cat([positive, negative], dim=1) / self.recipe.objective.temperature
        labels = torch.zeros(len(logits), dtype=torch.long)
        loss = nn.functional.cross_entropy(logits, labels, reduction="none")
        self.sgd.zero_grad()
        sum(direction.mean() for direction in loss.split(len(x_1))).backward()
        self.sgd.step()
        for key in k:
            self.queue[self.pointer] = key
            self.pointer = (self.pointer + 1) % len(self.queue)
        return loss.detach()

    @property
    def group(self) -> int:
        objective = self.recipe.objective
        return objective.bn_group if objective.bn == "groups" else self.recipe.batch


def by_groups(net: nn.Module, x: torch.Tensor, size: int) -> torch.Tensor:
    """Run each group by itself; the running statistics end as the mean over the groups."""
    norms = [m for m in net.modules() if isinstance(m, nn.BatchNorm2d)]
    before = [(m.running_mean, m.running_var) for m in norms]
    out, after = [], []
    for group in x.split(size):
        for norm, (mean, var) in zip(norms, before, strict=True):
            norm.running_mean, norm.running_var = mean.clone(), var.clone()
        out.append(net(group))
        after.append([(m.running_mean, m.running_var) for m in norms])
    for norm, statistics in zip(norms, zip(*after, strict=True), strict=True):
        means, variances = zip(*statistics, strict=True)
        norm.running_mean = torch.stack(means).mean(dim=0)
        norm.running_var = torch.stack(variances).mean(dim=0)
    return torch.cat(out)
