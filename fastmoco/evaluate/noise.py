"""What makes training on labels harder, so that more is learnt from them."""

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import stochastic_depth

from fastmoco.config.recipe import View
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder

_DROPOUT = 0.5
_DEPTH = 0.2  # share of the samples that skip the last block
_BLUR_FROM = 64  # pixels; below, a blur of sigma 0.1 to 2 leaves nothing to see


def strong(size: int) -> View:
    """Return MoCo v2's view, without blur for small images; `cut_out` comes on top."""
    return View(
        scale=(0.2, 1.0),
        flip=0.5,
        jitter=(0.4, 0.4, 0.4, 0.1),
        jitter_p=0.8,
        grayscale=0.2,
        blur=0.5 if size >= _BLUR_FROM else 0.0,
    )


def cut_out(images: torch.Tensor, noise: np.random.Generator) -> torch.Tensor:
    """Set a square of half the side of each (n, C, S, S) image to 0, around a uniform place.

    DeVries and Taylor 2017; 0 is the mean of normalized images.
    """
    side = images.shape[-1]
    middles = torch.from_numpy(noise.random((len(images), 2)) * side)
    pixels = torch.arange(side, dtype=torch.float64) + 0.5
    near = (pixels - middles[..., None]).abs() < side / 4  # (n, 2, S)
    inside = (near[:, 0, :, None] & near[:, 1, None, :]).to(images.device)
    return images.masked_fill(inside[:, None], 0)


@contextmanager
def noisy(network: Encoder, seed: int) -> Iterator[None]:
    """Drop features and residual branches of a network while it trains.

    As in Xie et al. 2020, "Self-training with Noisy Student Improves ImageNet Classification": half
    of the features before the classifier, and of each sample some blocks, by a rate that rises
    linearly to 0.2 at the last one (Huang et al. 2016, "Deep Networks with Stochastic Depth"). By
    hooks, so that no tensor gets another name; in evaluation mode they change nothing.

    Args:
        network: a ResNet and its classifier.
        seed: of what is dropped; torch's generators are as before afterwards.

    Raises:
        UsageError: it is no ResNet.
    """
    if not hasattr(network.backbone, "layer4"):
        raise UsageError("--noise drops blocks of a ResNet, and this is none: leave --noise out.")
    blocks = [
        block for stage in range(1, 5) for block in getattr(network.backbone, f"layer{stage}")
    ]
    hooks = [network.head.register_forward_pre_hook(_drop_features)]
    for place, block in enumerate(blocks, 1):
        last = block.bn3 if hasattr(block, "bn3") else block.bn2
        hooks.append(last.register_forward_hook(_DropBranch(_DEPTH * place / len(blocks))))
    devices = sorted({p.device.index for p in network.parameters() if p.is_cuda})
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        try:
            yield
        finally:
            for hook in hooks:
                hook.remove()


def _drop_features(head: nn.Module, given: tuple[torch.Tensor]) -> torch.Tensor:
    return F.dropout(given[0], _DROPOUT, head.training)


class _DropBranch:
    def __init__(self, rate: float) -> None:
        self.rate = rate

    def __call__(
        self, norm: nn.Module, given: tuple[torch.Tensor], output: torch.Tensor
    ) -> torch.Tensor:
        kept: torch.Tensor = stochastic_depth(output, self.rate, "row", norm.training)
        return kept
