"""Attention against sums written out, in float64."""

import pytest
import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import UsageError
from fastmoco.models.attention import AttentionPool
from fastmoco.models.encoder import Encoder


@pytest.mark.parametrize("kind", ["dot", "parametrized"])
def test_the_mean_is_that_of_sums_written_out(kind: str) -> None:
    torch.manual_seed(0)
    pool = AttentionPool(5, 7, kind).double()
    local, summary = torch.randn(3, 5, 4, 6).double(), torch.randn(3, 7).double()
    mean, maps = pool(local, summary)
    for n in range(3):
        vectors = [pool.project.weight @ local[n, :, y, x] for y in range(4) for x in range(6)]
        if kind == "dot":
            scores = torch.stack([(v * summary[n]).sum() / 7**0.5 for v in vectors])
        else:
            scores = torch.stack([(pool.score * (v + summary[n]).tanh()).sum() for v in vectors])
        weights = scores.exp() / scores.exp().sum()
        expected = sum(w * v for w, v in zip(weights, vectors, strict=True))
        torch.testing.assert_close(mean[n], expected, rtol=1e-10, atol=1e-12)
        torch.testing.assert_close(maps[n].flatten(), weights, rtol=1e-10, atol=1e-12)


def test_without_a_score_it_is_the_mean_over_positions_and_all_of_it_learns() -> None:
    spec = EncoderSpec(arch="resnet10", attention="parametrized", image_size=64)
    encoder, plain = Encoder(spec), Encoder(EncoderSpec(arch="resnet10"))
    assert encoder.features == 2 * plain.features
    own = {n for n in encoder.backbone.state_dict() if not n.startswith("attend.")}
    assert own == set(plain.backbone.state_dict())
    images = torch.randn(4, 3, 64, 64)
    encoder(images).square().mean().backward()
    assert all(p.grad is not None and p.grad.any() for p in encoder.parameters())
    for pool in encoder.backbone.attend.values():
        torch.nn.init.zeros_(pool.score)
    encoder.eval()
    seen: list[torch.Tensor] = []
    encoder.backbone.layer2.register_forward_hook(lambda *given: seen.append(given[-1]))
    features = encoder.backbone(images)
    expected = encoder.backbone.attend["stage2"].project(seen[0].mean(dim=(2, 3)))
    torch.testing.assert_close(features[:, : plain.features], expected, rtol=1e-4, atol=1e-5)
    for weights in encoder.backbone.maps(images):
        torch.testing.assert_close(weights.sum(dim=(1, 2)), torch.ones(4))


def test_other_networks_are_refused() -> None:
    pytest.importorskip("timm")
    with pytest.raises(UsageError, match=r"timm:resnet50d is none of: set encoder.attention=none"):
        Encoder(EncoderSpec(arch="timm:resnet50d", attention="dot"))
