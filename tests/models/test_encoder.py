"""Grouped BatchNorm against plain BatchNorm, the encoder against torchvision's ResNet."""

import copy

import pytest
import torch
import torchvision
from torch import nn

from fastmoco.config.encoder import EncoderSpec, Stem
from fastmoco.errors import UsageError
from fastmoco.models.encoder import Encoder, GroupBatchNorm2d, batch_norms, set_bn_group

ROWS, CHANNELS = 12, 5


@pytest.fixture
def images() -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    level = torch.arange(ROWS, dtype=torch.float64).view(-1, 1, 1, 1)  # groups differ in level
    return level + torch.randn(ROWS, CHANNELS, 4, 3, dtype=torch.float64, generator=generator)


@pytest.fixture
def plain() -> nn.BatchNorm2d:
    """Plain BatchNorm with statistics and affine weights that are not the initial ones."""
    norm, generator = nn.BatchNorm2d(CHANNELS).double(), torch.Generator().manual_seed(1)
    for tensor in (norm.weight, norm.bias, norm.running_mean, norm.running_var):
        values = torch.rand(CHANNELS, dtype=torch.float64, generator=generator)
        tensor.data.copy_(0.5 + values)
    return norm


def grouped(norm: nn.BatchNorm2d, group: int) -> GroupBatchNorm2d:
    twin = GroupBatchNorm2d(CHANNELS, momentum=norm.momentum).double()
    twin.load_state_dict(norm.state_dict())
    set_bn_group(twin, group)
    return twin


def run(norm: nn.Module, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return output and input gradient of a loss that no normalization cancels."""
    images = images.clone().requires_grad_()
    output = norm(images)
    (output**3).sum().backward()
    assert images.grad is not None
    return output.detach(), images.grad


def near(found: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("group", "compiled"), [(2, False), (3, False), (6, False), (4, True)])
def test_groups_are_normalized_as_batches_of_their_own(
    group: int, compiled: bool, images: torch.Tensor, plain: nn.BatchNorm2d
) -> None:
    norm = grouped(plain, group)
    whole = torch.compile(norm, backend="eager", fullgraph=True) if compiled else norm
    output, gradient = run(whole, images)
    # Each group passes through its own copy; the copies start from the same statistics.
    copies = [copy.deepcopy(plain) for _ in range(ROWS // group)]
    parts = [run(one, x) for one, x in zip(copies, images.split(group), strict=True)]
    near(output, torch.cat([part[0] for part in parts]))
    near(gradient, torch.cat([part[1] for part in parts]))
    for name in ("weight", "bias"):
        near(getattr(norm, name).grad, sum(getattr(one, name).grad for one in copies))
    for name in ("running_mean", "running_var"):
        near(getattr(norm, name), torch.stack([getattr(one, name) for one in copies]).mean(0))


@pytest.mark.parametrize("group", [0, ROWS])
def test_one_group_is_plain_batch_norm(
    group: int, images: torch.Tensor, plain: nn.BatchNorm2d
) -> None:
    norm = grouped(plain, group)
    for found, expected in zip(run(norm, images), run(plain, images), strict=True):
        near(found, expected)
    near(norm.running_mean, plain.running_mean)
    near(norm.running_var, plain.running_var)


def test_several_steps_move_the_statistics_as_the_published_split_does(
    images: torch.Tensor, plain: nn.BatchNorm2d
) -> None:
    """The notebook views 4 splits as channels of one call and averages what it leaves."""
    norm = grouped(plain, 3)
    mean, var = plain.running_mean.repeat(4), plain.running_var.repeat(4)
    for step in range(3):
        batch = images * (1 + step)
        norm(batch)
        parts = batch.view(4, 3, CHANNELS, 4, 3).transpose(0, 1).reshape(3, 4 * CHANNELS, 4, 3)
        torch.nn.functional.batch_norm(parts, mean, var, training=True)
        mean, var = (x.view(4, CHANNELS).mean(0).repeat(4) for x in (mean, var))
    near(norm.running_mean, mean[:CHANNELS])
    near(norm.running_var, var[:CHANNELS])


def test_evaluation_uses_and_keeps_the_statistics(
    images: torch.Tensor, plain: nn.BatchNorm2d
) -> None:
    norm, plain = grouped(plain, 5).eval(), plain.eval()  # 5 does not divide the batch
    before = norm.running_mean.clone()
    near(norm(images), plain(images))
    assert torch.equal(norm.running_mean, before)


def test_groups_keep_channels_last(images: torch.Tensor, plain: nn.BatchNorm2d) -> None:
    fast = images.contiguous(memory_format=torch.channels_last)
    output = grouped(plain, 4)(fast)
    assert output.is_contiguous(memory_format=torch.channels_last)
    near(output, grouped(plain, 4)(images))


@pytest.mark.parametrize(
    ("arch", "features"), [("resnet10", 512), ("resnet18", 512), ("resnet50", 2048)]
)
@pytest.mark.parametrize("head", ["linear", "mlp"])
def test_widths_and_heads(arch: str, features: int, head: str) -> None:
    with torch.device("meta"):
        encoder = Encoder(EncoderSpec(arch=arch, stem="small", head=head, dim=24))
    images = torch.empty(2, 3, 32, 32, device="meta")
    assert encoder.features == features and encoder.dim == 24
    assert encoder.backbone(images).shape == (2, features)
    assert encoder(images).shape == (2, 24)
    kinds = [type(layer).__name__ for layer in encoder.head.modules()]
    assert kinds == (["Linear"] if head == "linear" else ["Sequential", "Linear", "ReLU", "Linear"])


@pytest.mark.parametrize(("stem", "side"), [("imagenet", 8), ("small", 32), ("small-stride2", 16)])
def test_the_stem_decides_what_the_first_block_sees(stem: str, side: int) -> None:
    with torch.device("meta"):
        backbone = Encoder(EncoderSpec(arch="resnet18", stem=stem, head="linear", dim=8)).backbone
    seen: list[torch.Size] = []
    backbone.layer1.register_forward_pre_hook(lambda layer, inputs: seen.append(inputs[0].shape))
    backbone(torch.empty(2, 3, 32, 32, device="meta"))
    assert seen == [(2, 64, side, side)]


@pytest.mark.parametrize("training", [False, True])
def test_the_backbone_is_torchvisions(training: bool) -> None:
    torch.manual_seed(0)
    theirs = torchvision.models.resnet18(weights=None)
    theirs.fc = nn.Identity()
    encoder = Encoder(EncoderSpec(arch="resnet18", stem="imagenet", head="linear", dim=16))
    encoder.backbone.load_state_dict(theirs.state_dict())
    theirs.double().train(training)
    encoder.double().train(training)
    images = torch.rand(4, 3, 48, 48, dtype=torch.float64)
    torch.testing.assert_close(encoder.backbone(images), theirs(images), rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("stem", ["imagenet", "small", "small-stride2"])
def test_one_channel_is_the_mean_of_three_equal_ones(stem: Stem) -> None:
    torch.manual_seed(0)
    gray = Encoder(EncoderSpec(arch="resnet18", stem=stem, channels=1, dim=16)).eval()
    colors = Encoder(EncoderSpec(arch="resnet18", stem=stem, dim=16)).eval()
    state = gray.state_dict()
    first = state["backbone.conv1.weight"]
    assert first.shape[1] == 1 and colors.state_dict()["backbone.conv1.weight"].shape[1] == 3
    if stem == "imagenet":  # He et al. 2015, by the outputs, as torchvision has it
        assert float(first.std()) == pytest.approx((2 / (64 * 49)) ** 0.5, rel=0.1)
    colors.load_state_dict({**state, "backbone.conv1.weight": first.expand(-1, 3, -1, -1) / 3})
    images = torch.rand(4, 1, 48, 48)
    torch.testing.assert_close(
        gray(images), colors(images.expand(-1, 3, -1, -1)), rtol=1e-4, atol=1e-5
    )


def test_every_convolution_is_channels_last() -> None:
    encoder = Encoder(EncoderSpec(arch="resnet10", stem="small", head="mlp", dim=16))
    weights = [m.weight for m in encoder.modules() if isinstance(m, nn.Conv2d)]
    assert len(weights) == 12
    assert all(w.is_contiguous(memory_format=torch.channels_last) for w in weights)


def test_every_batch_norm_takes_the_group() -> None:
    encoder = Encoder(EncoderSpec(arch="resnet10", stem="small", head="linear", dim=16))
    set_bn_group(encoder, 4)
    assert not [m for m in encoder.modules() if type(m) is nn.BatchNorm2d]
    assert [norm.group for norm in batch_norms(encoder)] == [4] * 12


@pytest.mark.parametrize("arch", ["resnet19", "alexnet", "vit_b_16", "resnet", "ResNet", ""])
def test_an_unknown_network_is_refused_in_words(arch: str) -> None:
    with pytest.raises(UsageError, match=r"no ResNet .*: use one of torchvision's.*resnet10\.$"):
        Encoder(EncoderSpec(arch=arch, stem="small", head="linear", dim=16))
