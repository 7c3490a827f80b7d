"""A trained encoder that must not change: loaded in full or not at all, and watched."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from torch import nn

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import CheckpointError, DivergedError
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder


def load_encoder(run: RunFolder, device: torch.device) -> tuple[Encoder, EncoderSpec, int]:
    """Return the query encoder of a run's newest checkpoint, its spec and its step.

    Raises:
        CheckpointError: no checkpoint, or its weights are not those of the run's network.
        DivergedError: a weight is not a finite number.
    """
    spec = run.spec()
    found = run.latest()
    if found is None:
        raise CheckpointError(
            f"{run.root} has no checkpoint yet: let `fastmoco pretrain` save one."
        )
    state, step = found
    encoder = Encoder(spec)
    check_filled(encoder, state["encoder_q"], f"The checkpoint of {run.root}")
    check_finite(state["encoder_q"], f"the checkpoint of step {step} in {run.root}")
    encoder.load_state_dict(state["encoder_q"])
    return encoder.to(device).eval().requires_grad_(False), spec, step


def check_finite(weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that are not finite: they would give a number too.

    Raises:
        DivergedError: naming the first such tensor.
    """
    for name, tensor in weights.items():
        if not tensor.isfinite().all():
            raise DivergedError(
                f"The values of {name} in {where} are not all finite numbers: it diverged. Lower "
                "the learning rate, or go back to weights of before."
            )


def check_filled(encoder: Encoder, weights: Mapping[str, torch.Tensor], where: str) -> None:
    """Refuse weights that do not fill the network: random ones would give a result too.

    Raises:
        CheckpointError: naming some of the tensors that differ.
    """
    wanted = {name: tuple(tensor.shape) for name, tensor in encoder.state_dict().items()}
    found = {name: tuple(tensor.shape) for name, tensor in weights.items()}
    odd = sorted(
        name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name)
    )
    if odd:
        raise CheckpointError(
            f"{where} does not fit the network of encoder.json in {len(odd)} of "
            f"{len(wanted)} tensors, such as {', '.join(odd[:3])}."
        )


@contextmanager
def unchanged(module: nn.Module) -> Iterator[None]:
    """Assert that a block leaves every weight and statistic of a module as it was."""
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    yield
    after = module.state_dict()
    changed = [name for name in before if not torch.equal(before[name], after[name])]
    assert not changed, f"the frozen encoder changed under the probe: {changed[:3]}"
