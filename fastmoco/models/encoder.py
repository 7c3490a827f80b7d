"""Backbones with grouped BatchNorm and a choice of stem, here torchvision's; MoCo's heads."""

import hashlib
import io
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.autograd.function import once_differentiable
from torchvision.models import resnet as torchvision_resnet

from fastmoco.config.encoder import TIMM, EncoderSpec
from fastmoco.core.distributed import World
from fastmoco.errors import UsageError
from fastmoco.models.attention import AttentiveResNet

# torchvision has none this small; the demo needs one.
_SMALL: dict[str, tuple[Any, list[int]]] = {
    "resnet10": (torchvision_resnet.BasicBlock, [1, 1, 1, 1]),
}


class GroupBatchNorm2d(nn.BatchNorm2d):
    """BatchNorm over consecutive groups of `group` rows of the batch.

    Which samples are normalized together belongs to the algorithm ("shuffling BN", He et al. 2020,
    section 3.3), so it must not change with the number of ranks that share a batch. A rank holds a
    whole number of groups. The running statistics move once a call, by the mean over the groups.

    Attributes:
        group: rows normalized together; 0: the whole batch, as plain BatchNorm does.
        together: ranks whose batches are one in training, when `group` is 0.
    """

    group: int = 0
    together: World = World()

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize (n, C, H, W); n is a multiple of `group` in training."""
        # The momentum is fixed, so `num_batches_tracked` is never read and is left at 0.
        momentum = self.momentum or 0.0
        if self.training and self.together.size > 1:
            return self._fusible(input, len(input))
        if not self.training or self.group in (0, len(input)):
            state = self.running_mean, self.running_var, self.weight, self.bias
            return F.batch_norm(input, *state, self.training, momentum, self.eps)
        if torch.compiler.is_compiling():
            return self._fusible(input, self.group)
        normalized: torch.Tensor = _InGroups.apply(
            input,
            self.weight,
            self.bias,
            self.running_mean,
            self.running_var,
            self.group,
            momentum,
            self.eps,
        )
        return normalized

    def _fusible(self, x: torch.Tensor, size: int) -> torch.Tensor:
        """Normalize by plain arithmetic, which a compiler fuses, and which can span ranks.

        (torch's SyncBatchNorm has no CPU path.)
        """
        assert self.running_mean is not None and self.running_var is not None
        wide = x.to(torch.promote_types(x.dtype, torch.float32)).view(-1, size, *x.shape[1:])
        var, own_mean = torch.var_mean(wide, dim=(1, 3, 4), correction=0)  # (groups, C)
        mean = self.together.mean_with_gradient(own_mean)
        # The variance of a union: the mean within its equal parts, and that of their means.
        var = self.together.mean_with_gradient(var + (own_mean - mean).square())
        count = wide[0].numel() // wide.shape[2] * self.together.size
        with torch.no_grad():
            momentum = self.momentum or 0.0
            self.running_mean.lerp_(mean.mean(dim=0).to(self.running_mean), momentum)
            unbiased = var.mean(dim=0) * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var), momentum)
        scale = self.weight * torch.rsqrt(var + self.eps)
        centered = wide - mean[:, None, :, None, None]
        normalized = centered * scale[:, None, :, None, None] + self.bias[:, None, None]
        return normalized.view(x.shape).to(x.dtype)


class _InGroups(torch.autograd.Function):
    """BatchNorm of each group, written into its slice of one output.

    To split and concatenate instead would read and write every activation once more.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor,
        running_mean: torch.Tensor,
        running_var: torch.Tensor,
        size: int,
        momentum: float,
        eps: float,
    ) -> torch.Tensor:
        output = torch.empty_like(x)
        groups = len(x) // size
        # Each group moves its own copy of the running statistics: they move once, by the mean.
        means, variances = running_mean.repeat(groups, 1), running_var.repeat(groups, 1)
        saved_mean, saved_invstd = torch.empty_like(means), torch.empty_like(means)
        rows = [t.unbind() for t in (means, variances, saved_mean, saved_invstd)]
        parts = torch.split(x, size), torch.split(output, size)
        for part, out, mean, var, *saved in zip(*parts, *rows, strict=True):
            torch.native_batch_norm(
                part, weight, bias, mean, var, True, momentum, eps, out=(out, *saved)
            )
        torch.mean(means, dim=0, out=running_mean)
        torch.mean(variances, dim=0, out=running_var)
        ctx.save_for_backward(x, weight, saved_mean, saved_invstd)
        ctx.size, ctx.eps = size, eps
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, weight, mean, invstd = ctx.saved_tensors
        grad_x = torch.empty_like(x)
        parts = [torch.split(t, ctx.size) for t in (grad_x, grad, x)]
        affine = []
        for out, *given, m, s in zip(*parts, mean.unbind(), invstd.unbind(), strict=True):
            found, *of_affine = torch.ops.aten.native_batch_norm_backward(
                *given, weight, None, None, m, s, True, ctx.eps, [True, True, True]
            )
            out.copy_(found)
            affine.append(torch.stack(of_affine))
        grad_weight, grad_bias = torch.stack(affine).sum(dim=0)
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class Encoder(nn.Module):
    """A backbone and its head.

    Attributes:
        backbone: a network without its classifier, or a ResNet that attends; (n, C, H, W) to
            (n, features).
        head: (n, features) to (n, dim), not normalized; "none" hands the features on, and `dim`
            is their number.
        features, dim: widths of the two outputs.
    """

    def __init__(self, spec: EncoderSpec) -> None:
        super().__init__()
        self.backbone, self.features = _backbone(spec)
        self.dim = spec.dim
        self.head = _head(spec.head, self.features, spec.dim)
        self.to(memory_format=torch.channels_last)

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (n, dim) projections of (n, C, H, W) images."""
        projected: torch.Tensor = self.head(self.backbone(images))
        return projected


METADATA = "fastmoco"
"""Key under which our files say what network they are of: in the metadata of a safetensors file, in
`_metadata[""]` of a state dict."""


def saved(state: Mapping[str, torch.Tensor], spec: EncoderSpec) -> bytes:
    """Return what torch.save writes of a state dict, with the spec of its network.

    That stands where load_state_dict does not look, and an import does: no tensor tells the stride
    of a 3x3 stem, or how images are shown. To a full disk torch.save itself raises no OSError.
    """
    described: Any = OrderedDict(state)
    described._metadata = OrderedDict({"": {METADATA: spec.model_dump_json()}})
    content = io.BytesIO()
    torch.save(described, content)
    return content.getvalue()


def set_bn_group(module: nn.Module, group: int, together: World = World()) -> None:
    """Make every BatchNorm of a module normalize `group` rows together.

    Args:
        module: to change.
        group: rows; 0: the whole batch.
        together: with 0: the ranks whose batches are one.
    """
    for norm in batch_norms(module):
        norm.group, norm.together = group, together


def hash_weights(weights: Mapping[str, torch.Tensor]) -> str:
    """Return the SHA-256 of names and values, in hexadecimal."""
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode())
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def batch_norms(module: nn.Module) -> list[GroupBatchNorm2d]:
    """Return the BatchNorm layers of a module."""
    return [m for m in module.modules() if isinstance(m, GroupBatchNorm2d)]


def _backbone(spec: EncoderSpec) -> tuple[Any, int]:
    """Return a network without its classifier, and the number of its features."""
    net: Any
    if spec.arch.startswith(TIMM):
        from fastmoco.models.timm_backbone import timm_backbone  # it needs our BatchNorm

        net, features = timm_backbone(spec)
    else:
        net = _resnet(spec.arch, spec.stem, spec.channels)
        features = int(net.fc.in_features)
        net.fc = nn.Identity()
    if spec.attention == "none":
        return net, features
    return AttentiveResNet(net, features, spec), 2 * features


def _resnet(arch: str, stem: str, channels: int) -> Any:
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
        net.conv1 = nn.Conv2d(channels, 64, 3, stride, 1, bias=False)
        net.maxpool = nn.Identity()
    elif channels != 3:
        net.conv1 = nn.Conv2d(channels, 64, 7, 2, 3, bias=False)
        nn.init.kaiming_normal_(net.conv1.weight, mode="fan_out", nonlinearity="relu")  # as theirs
    return net


def _head(kind: str, features: int, dim: int) -> nn.Module:
    """Return the head of MoCo v1 ("linear"), of MoCo v2 ("mlp", Chen et al. 2020), or none."""
    if kind == "none":
        if dim != features:
            raise UsageError(
                f"encoder.head none hands on {features} features: set encoder.dim={features}."
            )
        return nn.Identity()
    if kind == "linear":
        return nn.Linear(features, dim)
    return nn.Sequential(nn.Linear(features, features), nn.ReLU(), nn.Linear(features, dim))
