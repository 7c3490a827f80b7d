"""Encoders whose statistics have moved, files of others made from them, and a way to call."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from torch import nn

from fastmoco.config.encoder import EncoderSpec, Head, Stem
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

Tensors = dict[str, torch.Tensor]
Run = Callable[..., tuple[int, str, str]]


def build(arch: str, stem: Stem, head: Head, dim: int) -> Encoder:
    """An encoder in which every tensor counts, in evaluation mode: nothing is 0, 1 or a constant.

    Draws instead of training: the activations keep their size, whatever the depth.
    """
    torch.manual_seed(7)
    encoder = Encoder(EncoderSpec(arch=arch, stem=stem, head=head, dim=dim))
    with torch.no_grad():
        for name, tensor in encoder.state_dict().items():
            if name.endswith("num_batches_tracked"):
                tensor.fill_(41)
            elif name.endswith("running_var") or (".bn" in name and name.endswith("weight")):
                tensor.uniform_(0.5, 1.0)
            elif tensor.dim() == 1:
                tensor.uniform_(-0.1, 0.1)
    return encoder.eval()


def spec_for(encoder: Encoder, arch: str, stem: Stem, head: Head, size: int = 32) -> EncoderSpec:
    return EncoderSpec(arch=arch, stem=stem, head=head, dim=encoder.dim, image_size=size)


@pytest.fixture(scope="session")
def r50() -> Encoder:
    return build("resnet50", "imagenet", "mlp", 128)


@pytest.fixture(scope="session")
def r18() -> Encoder:
    return build("resnet18", "imagenet", "linear", 16)


@pytest.fixture(scope="session")
def r10() -> Encoder:
    return build("resnet10", "imagenet", "linear", 16)


@pytest.fixture(scope="session")
def r10_mlp() -> Encoder:
    return build("resnet10", "imagenet", "mlp", 16)


@pytest.fixture(scope="session")
def small() -> Encoder:
    return build("resnet18", "small", "linear", 16)


@pytest.fixture(scope="session")
def trained() -> Encoder:
    return build("resnet10", "small-stride2", "linear", 8)


@pytest.fixture
def make_run(tmp_path: Path, trained: Encoder) -> Callable[[], RunFolder]:
    """A run folder with one checkpoint, of `trained` at step 12."""

    def make() -> RunFolder:
        folder = RunFolder(tmp_path / "run")
        folder.root.mkdir()
        spec = spec_for(trained, "resnet10", "small-stride2", "linear", size=16)
        folder.describe_encoder(spec, {})
        folder.save({"encoder_q": trained.state_dict()}, 12, {}, keep=2)
        return folder

    return make


def same(found: Tensors, wanted: Tensors) -> None:
    """Hold two state dicts to the same names, shapes, dtypes and bits."""
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def saved(content: object, path: Path) -> Path:
    torch.save(content, path)
    return path


def parts(encoder: Encoder) -> tuple[Tensors, Tensors]:
    return encoder.backbone.state_dict(), encoder.head.state_dict()


def prefixed(prefix: str, tensors: Tensors) -> Tensors:
    return {prefix + name: tensor for name, tensor in tensors.items()}


def other(tensors: Tensors) -> Tensors:
    """The same names with other values, as of the momentum encoder beside it."""
    return {name: tensor + 1 for name, tensor in tensors.items()}


def named(encoder: Encoder) -> nn.Module:
    """The encoder's backbone as torchvision's own module, for whatever takes its children."""
    net = torchvision.models.ResNet(torchvision.models.resnet.BasicBlock, [1, 1, 1, 1])
    net.fc = nn.Identity()
    net.load_state_dict(encoder.backbone.state_dict())
    return net


def moco(encoder: Encoder) -> Any:
    """A checkpoint of the official code: both encoders, the queue, the optimizer."""
    backbone, head = parts(encoder)
    query = backbone | prefixed("fc.", head)
    state = prefixed("module.encoder_q.", query) | prefixed("module.encoder_k.", other(query))
    state |= {"module.queue": torch.zeros(16, 64), "module.queue_ptr": torch.zeros(1).long()}
    momentum = {"state": {0: {"momentum_buffer": torch.zeros(3)}}, "param_groups": [{"lr": 0.03}]}
    return {"epoch": 200, "arch": "resnet10", "state_dict": state, "optimizer": momentum}
