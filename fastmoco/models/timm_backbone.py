"""timm's convolutional networks as backbones, with grouped BatchNorm and a choice of stem."""

import copy
from typing import Any

import torch
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from fastmoco.config.encoder import TIMM, EncoderSpec
from fastmoco.core.strict_yaml import near
from fastmoco.errors import UsageError
from fastmoco.models.encoder import GroupBatchNorm2d, batch_norms

TRIED = ("timm:convnextv2_atto", "timm:efficientnet_b0", "timm:resnet50d")


class GroupBatchNormAct2d(GroupBatchNorm2d):
    """Grouped BatchNorm in place of timm's `BatchNormAct2d`, which ends in `drop` and `act`."""

    drop: nn.Module
    act: nn.Module

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize (n, C, H, W), then drop blocks and activate as timm's layer does."""
        activated: torch.Tensor = self.act(self.drop(super().forward(input)))
        return activated


def timm_backbone(spec: EncoderSpec) -> tuple[nn.Module, int]:
    """Return a network of timm without its classifier, and how many features it gives.

    Its tensors keep their names: timm loads them strictly. What drops activations or whole paths is
    turned off, for the order, the views and the shuffle are a run's only random numbers.

    Raises:
        UsageError: timm is missing, has no such network, or this is not one of convolutions that
            ends in global pooling and takes images of that size after that stem.
    """
    net = create(spec)
    _group_batch_norms(net, spec.arch)
    for module in net.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        elif hasattr(module, "drop_prob"):
            module.drop_prob = 0.0
    return net, _width(net, spec)


def create(spec: EncoderSpec) -> Any:
    """Return timm's own network, without classifier and with random weights, and with our stem.

    Raises:
        UsageError: timm is missing, or has no such network or none with such a stem.
    """
    try:
        import timm
    except ImportError as error:
        raise UsageError(
            f"encoder.arch {spec.arch} needs timm: pip install 'fastmoco[timm]'."
        ) from error
    name, known = spec.arch.removeprefix(TIMM), timm.list_models()
    if name not in known:  # hf-hub:... and tags, which would fetch something, are not either
        raise UsageError(
            f"timm {timm.__version__} has no network {name!r}{near(name, known)} "
            "timm.list_models() names them."
        )
    with torch.device("cpu"):  # older ones ask for values as they build, which "meta" has not
        net = timm.create_model(name, pretrained=False, num_classes=0, in_chans=spec.channels)
    for place, module in small_stem(net, spec).items():
        net.set_submodule(place, module)
    return net


def small_stem(net: Any, spec: EncoderSpec) -> dict[str, nn.Module]:
    """Return what a small stem puts in place of what: a 3x3 convolution, and nothing for the pool.

    Raises:
        UsageError: the first layers are not a strided convolution and at most one max-pool.
    """
    if spec.stem == "imagenet":
        return {}
    first = net.pretrained_cfg["first_conv"]
    conv: Any = net.get_submodule(first) if isinstance(first, str) else None
    pools = [name for name, module in net.named_modules() if isinstance(module, nn.MaxPool2d)]
    # A subclass computes otherwise; of several max-pools not all are the stem's.
    halves = type(conv) is nn.Conv2d and conv.stride == (2, 2)
    if not halves or conv.kernel_size not in ((3, 3), (7, 7)) or len(pools) > 1:
        raise UsageError(
            f"encoder.stem {spec.stem}: {spec.arch} begins with {conv or first}, and has "
            f"{len(pools)} max-pools; only one 3x3 or 7x7 convolution of stride 2 and at most one "
            "max-pool can be made small: set encoder.stem=imagenet."
        )
    channels, stride = (conv.in_channels, conv.out_channels), 1 + (spec.stem == "small-stride2")
    small = nn.Conv2d(*channels, 3, stride, 1, bias=conv.bias is not None)
    return {first: small, **{name: nn.Identity() for name in pools}}


def remarks(spec: EncoderSpec, net: nn.Module) -> list[str]:
    """Return the sentences that whoever trains such a network must know."""
    found = []
    if spec.arch.startswith(TIMM) and spec.arch not in TRIED:
        found.append(f"Nobody here has tried {spec.arch}: tried are {', '.join(TRIED)}.")
    if not batch_norms(net):
        found.append(
            f"{spec.arch} has no BatchNorm: shuffling has nothing to hide, and is left out."
        )
    return found


def _group_batch_norms(net: nn.Module, arch: str) -> None:
    """Make every BatchNorm of timm ours: the same module under another class.

    So tensors, names, momentum, activation and hooks stay as they are.
    """
    from timm.layers.norm_act import BatchNormAct2d

    ours = {nn.BatchNorm2d: GroupBatchNorm2d, BatchNormAct2d: GroupBatchNormAct2d}
    for name, norm in net.named_modules():
        if not isinstance(norm, _BatchNorm):
            continue
        kind = ours.get(type(norm))
        if kind is None or norm.momentum is None or not (norm.affine and norm.track_running_stats):
            raise UsageError(
                f"{arch}: no BatchNorm in groups can stand for its {name}, a "
                f"{type(norm).__name__}: choose another network, such as {TRIED[1]}."
            )
        norm.__class__ = kind


def _width(net: nn.Module, spec: EncoderSpec) -> int:
    """Return the number of features that a pass without values gives; check what it pools."""
    from timm.layers.adaptive_avgmax_pool import SelectAdaptivePool2d

    twin, pooled = copy.deepcopy(net).to("meta").eval(), []
    pools = [module for module in twin.modules() if isinstance(module, SelectAdaptivePool2d)]
    for pool in pools:
        pool.register_forward_hook(lambda _, given, out: pooled.append((given[0].shape, out.shape)))
    refusal = UsageError(
        f"{spec.arch} is no network of convolutions that ends in global pooling over their map; "
        "transformers need another recipe (MoCo v3), which is not here: set encoder.arch="
        f"{TRIED[1]}."
    )
    if not pools or any("qkv" in name for name in twin.state_dict()):
        raise refusal
    side = spec.image_size
    try:
        features = twin(torch.empty(1, spec.channels, side, side, device="meta"))
    except (RuntimeError, AssertionError, ValueError) as error:
        raise UsageError(
            f"{spec.arch} takes no images of {side} px ({error}): set another encoder.image_size."
        ) from error
    if features.dim() != 2 or not any(len(a) == 4 and a[1] == b[1] for a, b in pooled):
        raise refusal
    return int(features.shape[1])
