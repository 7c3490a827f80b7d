"""Tensors out of a file that somebody else wrote: nothing in it is ever executed."""

import pickle
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastmoco.config import Side, Stem, Triple
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.strict import Strict

# What training programs wrap a state dict in, beside their optimizers.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
METADATA = "fastmoco"
"""Key of a safetensors file's metadata under which our exports say what network they are of."""


class About(Strict):
    """What our own export says of a network; None is not known, as in the files of others."""

    arch: str | None = None
    stem: Stem | None = None
    head: str | None = None
    dim: int | None = None
    image_size: Side | None = None
    mean: Triple | None = None
    std: Triple | None = None


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: by dotted names, without wrappers.
        about: what its writer says of the network.
    """

    tensors: dict[str, torch.Tensor]
    about: About = field(default_factory=About)


def read_weights(path: Path) -> Weights:
    """Read a safetensors file or a checkpoint of torch, onto the CPU.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is damaged, holds no tensors, or would have to run code to be read.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    found = _safetensors(path) if path.suffix == ".safetensors" else Weights(_pickled(path))
    if not found.tensors:
        raise CheckpointError(f"{path} holds no tensors: name the file with the weights.")
    return found


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            about = About.model_validate_json((stream.metadata() or {}).get(METADATA, "{}"))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: fetch it again.") from error
    return Weights(tensors, about)


def _pickled(path: Path) -> dict[str, torch.Tensor]:
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, str(error))) from error
    except Exception as error:  # a cut or overwritten file fails in a dozen ways
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint of torch ({type(error).__name__}): "
            "fetch it again."
        ) from error
    while isinstance(content, Mapping):
        inner = next((content[key] for key in _WRAPPERS if _is_mapping(content, key)), None)
        if inner is None:
            return _without_module(dict(_flat(content, "")))
        content = inner
    raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict.")


def _is_mapping(content: Mapping[Any, Any], key: str) -> bool:
    return isinstance(content.get(key), Mapping)


def _refused(path: Path, message: str) -> str:
    """Say which part of a pickle would run code, and how its owner gets the tensors out."""
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", message)
    if not found:
        return f"{path} is damaged, or no checkpoint of torch: fetch it again."
    return (
        f"{path} holds more than tensors ({found[1]}), and reading that could run code: refused.\n"
        'If you trust its origin, save the tensors alone: python -c "import torch; '
        f"torch.save(torch.load('{path.name}', weights_only=False)['state_dict'], 'plain.pth')\""
    )


def _flat(content: Mapping[Any, Any], prefix: str) -> Iterator[tuple[str, torch.Tensor]]:
    for key, value in content.items():
        if isinstance(value, torch.Tensor):
            yield f"{prefix}{key}", value
        elif isinstance(value, Mapping):
            yield from _flat(value, f"{prefix}{key}.")


def _without_module(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what DistributedDataParallel puts before every name; some files lack it."""
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}
