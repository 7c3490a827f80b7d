"""Attention over two stages of a ResNet in place of its mean over the last (Jetley et al. 2018)."""

from typing import Any

import torch
from torch import nn
from torchvision.models.resnet import ResNet

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import UsageError


class AttentionPool(nn.Module):
    """The mean of a map's vectors, weighted by how they go with a summary of the image.

    A map's vectors L_i are projected, l_i = P L_i; weights are a = softmax(c) over the positions.
    "dot": c_i = <l_i, g> / sqrt(features): Jetley et al. 2018, section 3.1, but for the root,
    which Vaswani et al. 2017 divide by; without it one place soon takes all of the weight, and
    little is learnt (benchmarks/NOTES.md). "parametrized": c_i =
    <u, tanh(l_i + g)>, additive attention as Bahdanau et al. 2015 have it. Jetley et al. write
    <u, l_i + g>: of that the softmax takes <u, g> away again, and the last stage, which makes g,
    would neither count nor learn.

    Attributes:
        project: P.
        score: (features,) u, learnt; None: of "dot".
    """

    def __init__(self, width: int, features: int, kind: str) -> None:
        super().__init__()
        self.project = nn.Linear(width, features, bias=False)
        score = nn.Parameter(0.01 * torch.randn(features)) if kind == "parametrized" else None
        self.score: nn.Parameter | None
        self.register_parameter("score", score)

    def forward(
        self, local: torch.Tensor, summary: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the weighted mean, and what weighted it.

        Args:
            local: (n, width, h, w).
            summary: (n, features).

        Returns:
            (n, features) and (n, h, w), which sums to 1 over an image; at least fp32.
        """
        vectors = local.flatten(2).transpose(1, 2)  # (n, h w, width)
        if self.score is not None:
            hidden = torch.tanh(self.project(vectors) + summary[:, None])
        # Scores of 8 bits would move weights by percents.
        with torch.autocast(local.device.type, enabled=False):
            wide = torch.promote_types(local.dtype, torch.float32)
            vectors = vectors.to(wide)
            if self.score is None:
                # <P L_i, g> = <L_i, P' g>: one vector an image is projected, not each position.
                asked = summary.to(wide) @ self.project.weight / summary.shape[1] ** 0.5
                scores = torch.einsum("npc,nc->np", vectors, asked)
            else:
                scores = hidden.to(wide) @ self.score
            weights = scores.softmax(dim=1)
            mean = self.project(torch.einsum("np,npc->nc", weights, vectors))
        return mean, weights.view(len(local), *local.shape[2:])


class AttentiveResNet(nn.Module):
    """A ResNet whose features are two weighted means, of its stages 2 and 3, side by side.

    The summary that asks is the mean over stage 4. The tensors of the ResNet keep their names.

    Args:
        net: of torchvision, without its classifier; its layers become those of this module.
        features: width of stage 4.
        spec: of the encoder.

    Raises:
        UsageError: it is another network.
    """

    def __init__(self, net: nn.Module, features: int, spec: EncoderSpec) -> None:
        super().__init__()
        if not isinstance(net, ResNet):
            raise UsageError(
                f"encoder.attention {spec.attention} looks at the stages of torchvision's ResNets "
                f"and of resnet10, which {spec.arch} is none of: set encoder.attention=none, or "
                "encoder.arch=resnet50."
            )
        for name, layer in net.named_children():
            self.add_module(name, layer)
        widths = {"stage2": net.layer3[0], "stage3": net.layer4[0]}  # what a next stage takes
        self.attend = nn.ModuleDict(
            {
                name: AttentionPool(block.conv1.in_channels, features, spec.attention)
                for name, block in widths.items()
            }
        )

    def forward(self, images: torch.Tensor) -> torch.Tensor:
        """Return (n, 2 features) of (n, 3, H, W) images."""
        return torch.cat([mean for mean, _ in self._attend(images)], dim=1)

    def maps(self, images: torch.Tensor) -> list[torch.Tensor]:
        """Return the weights of stages 2 and 3, (n, h, w) each, of (n, 3, H, W) images."""
        return [weights for _, weights in self._attend(images)]

    def _attend(self: Any, images: torch.Tensor) -> list[tuple[torch.Tensor, torch.Tensor]]:
        stem = self.maxpool(self.relu(self.bn1(self.conv1(images))))
        second = self.layer2(self.layer1(stem))
        third = self.layer3(second)
        summary = self.avgpool(self.layer4(third)).flatten(1)
        return [
            self.attend["stage2"](second, summary),
            self.attend["stage3"](third, summary),
        ]
