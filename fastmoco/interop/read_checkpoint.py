"""Tensors out of a file that somebody else wrote: nothing in it is ever executed."""

import pickle
import re
import warnings
import zipfile
from argparse import Namespace
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.models.encoder import METADATA

# What wrappers of torch put into names, anywhere in them.
_WRAPPERS = ("module", "_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_DEEPEST = 32  # containers within containers
_MOST = 1_000_000  # containers and tensors
_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


@dataclass(frozen=True)
class Weights:
    """What a file holds.

    Attributes:
        tensors: by dotted names, which begin with those of the containers; without what wrappers
            of torch put into them.
        spec: what our own export says of the network; None: it is of another program.
    """

    tensors: dict[str, torch.Tensor]
    spec: EncoderSpec | None = None


def read_weights(path: Path) -> Weights:
    """Read a safetensors file or a checkpoint of torch, onto the CPU.

    Raises:
        UsageError: there is no such file.
        CheckpointError: it is damaged, holds no tensors, or would have to run code to be read.
    """
    if not path.is_file():
        raise UsageError(f"There is no file {path}.")
    found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    if not found.tensors:
        raise CheckpointError(f"{path} holds no tensors: name the file with the weights.")
    return found


def _safetensors(path: Path) -> Weights:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as stream:
            tensors = {name: stream.get_tensor(name) for name in stream.keys()}  # noqa: SIM118
            spec = _spec((stream.metadata() or {}).get(METADATA))
    except (SafetensorError, OSError, ValueError) as error:
        raise CheckpointError(f"{path} is no whole safetensors file: fetch it again.") from error
    return Weights(_unwrapped(tensors), spec)


def _pickled(path: Path) -> Weights:
    try:
        _refuse_bombs(path)
        # What training scripts keep their options in: names and values, no code.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of torch, about kinds of tensors that are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
        tensors = dict(_flat(content, path))
        spec = _spec(_said(content))
    except CheckpointError:
        raise
    except pickle.UnpicklingError as error:
        raise CheckpointError(_refused(path, str(error))) from error
    except Exception as error:  # a cut or overwritten file fails in a dozen ways
        raise CheckpointError(
            f"{path} is damaged, or no checkpoint of torch ({type(error).__name__}): "
            "fetch it again."
        ) from error
    if not isinstance(content, Mapping | list | tuple):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, no state dict.")
    return Weights(_unwrapped(tensors), spec)


def _refuse_bombs(path: Path) -> None:
    """Refuse what unpacks to more bytes than the file has: torch compresses nothing."""
    if not zipfile.is_zipfile(path):
        return  # the form of before torch 1.6: plain bytes
    with zipfile.ZipFile(path) as archive:
        parts = archive.infolist()
    packed = any(part.compress_type != zipfile.ZIP_STORED for part in parts)
    if packed or sum(part.file_size for part in parts) > path.stat().st_size:
        raise CheckpointError(
            f"{path} is a compressed archive, as torch writes none: unpack it, and name the "
            "checkpoint in it."
        )


def _flat(content: Any, path: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield the tensors of nested containers in their order, each container once."""
    seen: set[int] = set()
    waiting: list[tuple[str, Any, int]] = [("", content, 0)]
    while waiting:
        name, value, depth = waiting.pop()
        if isinstance(value, torch.Tensor):
            yield name, value
            continue
        if isinstance(value, Mapping):
            items = [(str(key), item) for key, item in value.items()]
        elif isinstance(value, list | tuple):
            items = [(str(number), item) for number, item in enumerate(value)]
        else:
            continue
        if id(value) in seen:
            continue
        seen.add(id(value))
        if depth == _DEEPEST or len(seen) > _MOST:
            raise CheckpointError(
                f"{path} nests its tensors too deeply: name a file of the weights alone."
            )
        waiting += [
            (f"{name}.{key}" if name else key, item, depth + 1) for key, item in reversed(items)
        ]


def _spec(said: str | None) -> EncoderSpec | None:
    return EncoderSpec.model_validate_json(said) if said else None


def _said(content: Any) -> str | None:
    """Return what our own export says in the metadata of a state dict."""
    metadata = getattr(content, "_metadata", None)
    root = metadata.get("") if isinstance(metadata, Mapping) else None
    return root.get(METADATA) if isinstance(root, Mapping) else None


def without_wrappers(name: str) -> str:
    """Return a dotted name without what wrappers of torch put into it."""
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


def _unwrapped(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Drop what wrappers put into names, unless two would become one."""
    found: dict[str, torch.Tensor] = {}
    for name, tensor in tensors.items():
        short = without_wrappers(name)
        found[name if short in found else short] = tensor
    return found


def _refused(path: Path, message: str) -> str:
    """Say which part of a pickle would run code, and how its owner gets the tensors out."""
    found = re.search(r"(?:GLOBAL|global) ([\w.]+)", message)
    if not found:
        return f"{path} is damaged, or no checkpoint of torch: fetch it again."
    quoted = re.sub(r'([\\"$`])', r"\\\1", repr(str(path)))
    return (
        f"{path} holds more than tensors ({found[1]}), and reading that could run code: refused.\n"
        "If you trust its origin, save the tensors alone, where its program is installed, and "
        'import plain.pth: python -c "import torch; '
        "f = lambda x: f(x.state_dict()) if hasattr(x, 'state_dict') else "
        "{str(k): f(v) for k, v in x.items()} if isinstance(x, dict) else "
        "[f(v) for v in x] if isinstance(x, (list, tuple)) else "
        "torch.as_tensor(x) if torch.is_tensor(x) or getattr(getattr(x, 'dtype', 0), 'kind', '-') "
        "in 'fiub' else None; "
        f"x = torch.load({quoted}, map_location='cpu', weights_only=False); "
        "torch.save(f(x), open('plain.pth', 'xb'))\""
    )


def unfit(tensor: torch.Tensor, floating: bool) -> str | None:
    """Say why a tensor of a stranger is not to be copied; None: it may be."""
    if tensor.layout != torch.strided or tensor.device.type != "cpu" or tensor.is_quantized:
        return f"is no plain tensor ({tensor.layout}, {tensor.dtype}, {tensor.device})"
    if floating and tensor.dtype not in _FLOATS:
        return f"holds {tensor.dtype}, wanted floating-point numbers"
    if tensor.nbytes > tensor.untyped_storage().nbytes():
        return "shows more values than the file stores"
    return None


def copied(key: str, tensor: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """Return a copy of its own: a view would take all of its storage along into a checkpoint.

    Raises:
        CheckpointError: a value is not finite, or a variance negative.
    """
    copy = tensor.to(dtype, copy=True, memory_format=torch.contiguous_format)
    bad = int((~copy.isfinite()).sum())
    if bad:
        raise CheckpointError(
            f"{key} holds {bad} values that are not finite numbers, of {copy.numel()}: the run had "
            "diverged, or they overflowed. Take an earlier checkpoint."
        )
    if key.endswith("running_var") and (copy < 0).any():
        raise CheckpointError(f"{key} holds a negative variance: it is damaged.")
    return copy
