"""What `finetune --save` wrote, read back: a network whose head gives the logits of classes."""

import json
import pickle
from pathlib import Path

import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.models.encoder import Encoder
from fastmoco.runs.load_encoder import check_filled, check_finite
from fastmoco.runs.run_folder import RunFolder


def load_saved(folder: Path, device: torch.device) -> tuple[Encoder, EncoderSpec, list[str]]:
    """Return a fine-tuned network in evaluation mode, its spec, and the class of each logit.

    Raises:
        UsageError: the folder is none that `finetune --save` wrote.
        CheckpointError: the weights are damaged, or do not fill the network.
        DivergedError: a weight is not a finite number.
    """
    try:
        classes = [str(name) for name in json.loads((folder / "classes.json").read_text())]
        spec = RunFolder(folder).spec()
    except (OSError, ValueError, TypeError, UsageError) as error:
        raise UsageError(
            f"{folder} is none that `fastmoco finetune --save` wrote ({error})."
        ) from error
    path = folder / "weights.pt"
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, pickle.UnpicklingError) as error:
        raise CheckpointError(f"{path} cannot be read: fine-tune anew.") from error
    network = Encoder(spec)
    check_filled(network, weights, str(path))
    check_finite(weights, str(path))
    if spec.dim != len(classes):
        raise CheckpointError(
            f"{folder} names {len(classes)} classes, its network has {spec.dim} logits."
        )
    network.load_state_dict(weights)
    return network.to(device).eval().requires_grad_(False), spec, classes
