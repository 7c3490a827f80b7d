"""timm's networks as backbones: grouped as passes of their own, and refused in words."""

import copy
import sys

import pytest
import torch
from torch import nn

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder, batch_norms, set_bn_group

NEEDS = "pip install 'fastmoco[timm]'"
timm = pytest.importorskip("timm", reason=NEEDS)


def encoder(arch: str, stem: str = "imagenet", side: int = 64) -> Encoder:
    return Encoder(EncoderSpec(arch=arch, stem=stem, dim=8, image_size=side))


def results(net: nn.Module, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Output of a training pass, gradients by name, and the statistics that it leaves."""
    images = images.clone().requires_grad_()
    output = net(images)
    output.square().sum().backward()
    found = {"output": output.detach(), "images": images.grad}
    found |= {name: p.grad for name, p in net.named_parameters()}
    return found | {n: b.clone() for n, b in net.named_buffers() if "running" in n}


@pytest.mark.parametrize("name", ["resnet18", "efficientnet_b0"])
def test_groups_are_passes_of_their_own(name: str) -> None:
    """In training only BatchNorm mixes rows: timm's network on each group alone is the reference.

    resnet18 has plain BatchNorm, efficientnet_b0 that with an activation.
    """
    torch.manual_seed(0)
    theirs = timm.create_model(name, num_classes=0).double().train()
    for norm in theirs.modules():
        if isinstance(norm, nn.BatchNorm2d):  # some begin with weight 0, and hide their branch
            nn.init.uniform_(norm.weight, 0.5, 1.0)
    ours = encoder(f"timm:{name}").double().train().backbone
    ours.load_state_dict(theirs.state_dict())
    set_bn_group(ours, 3)
    images = torch.randn(6, 3, 64, 64, dtype=torch.float64)
    images[3:] += 2  # groups that differ
    found = results(ours, images)
    first, second = (results(copy.deepcopy(theirs), part) for part in images.split(3))
    assert found.keys() == first.keys() and len(found) > 99
    for key, value in found.items():
        if key in ("output", "images"):
            wanted = torch.cat([first[key], second[key]])
        else:  # gradients add up, statistics move by the mean
            wanted = (first[key] + second[key]) * (0.5 if "running" in key else 1)
        torch.testing.assert_close(value, wanted, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize(
    ("arch", "features", "norms"),
    [
        ("timm:convnextv2_atto", 320, 0),
        ("timm:efficientnet_b0", 1280, 49),
        ("timm:resnet50d", 2048, 55),
        ("timm:mobilenetv3_small_050", 1024, 34),  # its num_features are 288
        ("timm:rexnet_100", 1280, 62),  # drops activations by default
    ],
)
def test_widths_and_norms(arch: str, features: int, norms: int) -> None:
    one = encoder(arch)
    assert one.features == features and len(batch_norms(one)) == norms
    assert not [m for m in one.modules() if type(m) is nn.BatchNorm2d]
    assert not [m for m in one.modules() if getattr(m, "p", 0) or getattr(m, "drop_prob", 0)]
    with torch.no_grad():
        assert one.eval().backbone(torch.zeros(1, 3, 64, 64)).shape == (1, features)


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("small", 32), ("small-stride2", 16)])
def test_the_stem_decides_what_the_first_block_sees(stem: str, side: int) -> None:
    one = encoder("timm:resnet50d", stem, 32).backbone
    seen: list[torch.Size] = []
    one.layer1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
    one.eval()(torch.zeros(1, 3, 32, 32))
    assert seen == [(1, 64, side, side)]


@pytest.mark.parametrize(
    ("arch", "stem", "words"),
    [
        ("timm:vit_tiny_patch16_224", "imagenet", r"transformers need another recipe \(MoCo v3\)"),
        ("timm:davit_tiny", "imagenet", "no network of convolutions"),  # pools a map
        ("timm:mixer_s32_224", "imagenet", "no network of convolutions"),
        ("timm:levit_128s", "imagenet", "BatchNorm in groups can stand for .* a BatchNorm1d"),
        ("timm:inception_v4", "imagenet", "no images of 64 px .* set another encoder.image_size"),
        ("timm:convnextv2_atto", "small", r"stride=\(4, 4\).*: set encoder.stem=imagenet"),
        ("timm:resnet50dd", "imagenet", "no network 'resnet50dd': did you mean 'resnet50d'"),
        ("timm:resnet18.a1_in1k", "imagenet", "no network"),  # names weights
        ("timm:hf-hub:timm/resnet18", "imagenet", "no network"),  # would fetch something
    ],
)
def test_what_is_refused_in_words(arch: str, stem: str, words: str) -> None:
    with pytest.raises(UsageError, match=words):
        encoder(arch, stem)


def test_without_timm_the_command_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(UsageError, match=r"timm:resnet50d needs timm: pip install 'fastmoco\[tim"):
        encoder("timm:resnet50d")
