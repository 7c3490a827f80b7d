"""A frozen encoder: loaded in full or refused by name, and watched while it is used."""

from collections.abc import Callable

import pytest
import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import CheckpointError
from fastmoco.models.encoder import Encoder
from fastmoco.runs.load_encoder import load_encoder, unchanged
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., RunFolder]
CPU = torch.device("cpu")
KEY = "backbone.layer3.0.conv1.weight"


@pytest.fixture
def weights(trained: Encoder) -> dict[str, torch.Tensor]:
    """A copy that a test may change."""
    return {name: tensor.clone() for name, tensor in trained.state_dict().items()}


def test_weights_and_statistics_are_those_of_the_checkpoint(
    make_run: Make, trained: Encoder
) -> None:
    encoder, spec, step = load_encoder(make_run(), CPU)
    assert (spec.arch, step) == ("resnet10", 12)
    assert not encoder.training and not any(p.requires_grad for p in encoder.parameters())
    wanted = trained.state_dict()
    assert wanted["backbone.bn1.running_mean"].abs().max() > 0.01
    for name, tensor in encoder.state_dict().items():
        assert torch.equal(tensor, wanted[name]), name


def test_a_missing_tensor_is_refused_by_name(
    make_run: Make, weights: dict[str, torch.Tensor]
) -> None:
    del weights[KEY]
    with pytest.raises(CheckpointError, match=rf"does not fit .* 1 of \d+ tensors, such as {KEY}"):
        load_encoder(make_run(weights), CPU)


def test_a_missing_statistic_is_refused_too(
    make_run: Make, weights: dict[str, torch.Tensor]
) -> None:
    del weights["backbone.bn1.running_var"]
    with pytest.raises(CheckpointError, match=r"such as backbone\.bn1\.running_var"):
        load_encoder(make_run(weights), CPU)


def test_renamed_tensors_are_refused_by_name(
    make_run: Make, weights: dict[str, torch.Tensor]
) -> None:
    wrapped = {f"module.{name}": tensor for name, tensor in weights.items()}
    with pytest.raises(CheckpointError, match=rf"in {2 * len(weights)} of {len(weights)} tensors"):
        load_encoder(make_run(wrapped), CPU)


def test_a_tensor_of_another_shape_is_refused_by_name(
    make_run: Make, weights: dict[str, torch.Tensor]
) -> None:
    weights[KEY] = weights[KEY][:, :-1]
    with pytest.raises(CheckpointError, match=rf"1 of \d+ tensors, such as {KEY}"):
        load_encoder(make_run(weights), CPU)


def test_weights_of_another_network_are_refused(make_run: Make) -> None:
    with pytest.raises(CheckpointError, match=r"does not fit the network of encoder.json"):
        load_encoder(make_run(arch="resnet18"), CPU)


def test_no_checkpoint_yet(make_run: Make) -> None:
    run = make_run()
    (run.checkpoints / "step-000000012").rename(run.root / "elsewhere")
    with pytest.raises(CheckpointError, match=r"has no checkpoint yet"):
        load_encoder(run, CPU)


def test_use_in_evaluation_mode_changes_nothing(trained: Encoder) -> None:
    with unchanged(trained):
        trained(torch.randn(4, 3, 16, 16))


@pytest.mark.parametrize("name", [KEY, "backbone.bn1.running_mean", "head.bias"])
def test_a_changed_tensor_is_noticed(
    trained: Encoder, weights: dict[str, torch.Tensor], name: str
) -> None:
    encoder = Encoder(EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8))
    encoder.load_state_dict(weights)
    with pytest.raises(AssertionError, match=rf"changed under the probe: \['{name}'\]"):  # noqa: SIM117
        with unchanged(encoder):
            encoder.state_dict()[name][0] += 1e-6


def test_training_mode_is_noticed_by_the_statistics(weights: dict[str, torch.Tensor]) -> None:
    encoder = Encoder(EncoderSpec(arch="resnet10", stem="small-stride2", head="linear", dim=8))
    encoder.load_state_dict(weights)
    with pytest.raises(AssertionError, match=r"running_mean"), unchanged(encoder.train()):
        encoder(torch.randn(4, 3, 16, 16))
