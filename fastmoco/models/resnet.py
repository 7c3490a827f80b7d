"""torchvision's ResNets with grouped BatchNorm, a choice of stem, and MoCo's projection heads."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torchvision.models import resnet as torchvision_resnet

from fastmoco.distributed import Ranks
from fastmoco.errors import UsageError

# torchvision has none this small; the demo needs one.
_SMALL: dict[str, tuple[Any, list[int]]] = {
    "resnet10": (torchvision_resnet.BasicBlock, [1, 1, 1, 1]),
}


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over consecutive groups of `group` rows of the batch.

    Which samples are normalised together belongs to the algorithm ("shuffling BN", He et al. 2020,
    section 3.3), so it must not change with the number of ranks that share a batch. A rank holds a
    whole number of groups. The running statistics move once a call, by the mean over the groups.

    Attributes:
        group: rows normalised together; 0: the whole batch, as plain BatchNorm does.
        together: ranks whose batches are one in training, when `group` is 0.
    """

    group: int = 0
    together: Ranks = Ranks()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalise (n, C, H, W); n is a multiple of `group` in training."""
        if self.training and self.together.size > 1:
            return self._across_ranks(input)
        if not self.training or not self.group or len(input) == self.group:
            return self._normalise(input, self.running_mean, self.running_var)
        assert self.running_mean is not None and self.running_var is not None
        parts = torch.split(input, self.group)
        means = self.running_mean.repeat(len(parts), 1)
        variances = self.running_var.repeat(len(parts), 1)
        output = [self._normalise(*part) for part in zip(parts, means, variances, strict=True)]
        torch.mean(means, dim=0, out=self.running_mean)
        torch.mean(variances, dim=0, out=self.running_var)
        return torch.cat(output)

    def _across_ranks(self, x: torch.Tensor) -> torch.Tensor:
        """Normalise by the statistics of all ranks (torch's SyncBatchNorm has no CPU path)."""
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        mean = self.together.mean_of(wide.mean(dim=(0, 2, 3)))
        centred = wide - mean[:, None, None]
        var = self.together.mean_of(centred.square().mean(dim=(0, 2, 3)))
        count = x.numel() // x.shape[1] * self.together.size
        self._follow(mean, var * count / (count - 1))
        scale = self.weight * torch.rsqrt(var + self.eps)
        return (centred * scale[:, None, None] + self.bias[:, None, None]).to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: torch.Tensor, var: torch.Tensor) -> None:
        assert self.running_mean is not None and self.running_var is not None
        self.running_mean.lerp_(mean.to(self.running_mean), self.momentum or 0.0)
        self.running_var.lerp_(var.to(self.running_var), self.momentum or 0.0)

    def _normalise(
        self, x: torch.Tensor, mean: torch.Tensor | None, var: torch.Tensor | None
    ) -> torch.Tensor:
        # The momentum is fixed, so `num_batches_tracked` is never read and is left at 0.
        momentum = self.momentum or 0.0
        return F.batch_norm(x, mean, var, self.weight, self.bias, self.training, momentum, self.eps)


class Encoder(nn.Module):
    """A backbone and its head.

    Attributes:
        backbone: a torchvision ResNet without its classifier; (n, 3, H, W) to (n, features).
        head: (n, features) to (n, dim), not normalised; "none" hands the features on, and `dim`
            is their number.
        features, dim: widths of the two outputs.
    """

    def __init__(self, arch: str, stem: str, head: str, dim: int) -> None:
        super().__init__()
        self.backbone = _backbone(arch, stem)
        self.features = int(self.backbone.fc.in_features)
        self.backbone.fc = nn.Identity()
        self.dim = dim
        self.head = _head(head, self.features, dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (n, dim) projections of (n, 3, H, W) images."""
        projected: torch.Tensor = self.head(self.backbone(images))
        return projected


def set_bn_group(module: nn.Module, group: int, together: Ranks = Ranks()) -> None:
    """Make every BatchNorm of a module normalise `group` rows together.

    Args:
        module: to change.
        group: rows; 0: the whole batch.
        together: with 0: the ranks whose batches are one.
    """
    for norm in batch_norms(module):
        norm.group, norm.together = group, together


def batch_norms(module: nn.Module) -> list[GroupBatchNorm2d]:
    """Return the BatchNorm layers of a module."""
    return [m for m in module.modules() if isinstance(m, GroupBatchNorm2d)]


def _backbone(arch: str, stem: str) -> Any:
    if arch in _SMALL:
        net = torchvision_resnet.ResNet(*_SMALL[arch], norm_layer=GroupBatchNorm2d)
    else:
        build = getattr(torchvision_resnet, arch, None)
        if not (arch.startswith(("resnet", "resnext", "wide_resnet")) and callable(build)):
            raise UsageError(
                f"There is no ResNet {arch!r}: use one of torchvision's, such as resnet18 or "
                f"resnet50, or {', '.join(_SMALL)}."
            )
        net = build(weights=None, norm_layer=GroupBatchNorm2d)
    if stem != "imagenet":
        # 7x7 stride 2 and a pool would leave little of a small image (He et al. 2016, section 4.2).
        stride = 2 if stem == "small-stride2" else 1
        net.conv1 = nn.Conv2d(3, 64, 3, stride, 1, bias=False)
        net.maxpool = nn.Identity()
    return net


def _head(kind: str, features: int, dim: int) -> nn.Module:
    """Return the head of MoCo v1 ("linear"), of MoCo v2 ("mlp", Chen et al. 2020), or none."""
    if kind == "none":
        if dim != features:
            raise UsageError(f"head none hands on {features} features: set dim={features}.")
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))
