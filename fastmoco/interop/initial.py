"""Weights that a run starts from in place of random ones: those of a run or of any known file."""

from dataclasses import dataclass
from pathlib import Path

import torch

from fastmoco.config.encoder import TIMM, EncoderSpec, PerChannel
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop.detect import match
from fastmoco.interop.read_checkpoint import read_weights
from fastmoco.models.encoder import hash_weights
from fastmoco.runs.checkpoints import read_manifest
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder

_CPU = torch.device("cpu")


@dataclass(frozen=True)
class Initial:
    """What a run starts from.

    Attributes:
        weights: state dict of the query encoder: of its backbone, and of its head if it fits.
        sha256: of their names and values.
        notes: sentences that say what was taken, and what was not.
    """

    weights: dict[str, torch.Tensor]
    sha256: str
    notes: tuple[str, ...]


def read_initial(source: Path, spec: EncoderSpec) -> Initial:
    """Read the weights that a recipe's `init` names.

    Args:
        source: a run folder, whose newest checkpoint counts; a checkpoint's folder; or a file that
            `fastmoco import` reads.
        spec: of the encoder that starts from them.

    Raises:
        UsageError: nothing is there, or it is of another network than the recipe's.
        CheckpointError: it is damaged, unsafe, or fills no network in full.
        DivergedError: a weight is not a finite number.
    """
    weights, found, where, images = _read(source, spec)
    if (found.arch, found.stem) != (spec.arch, spec.stem):
        raise UsageError(
            f"init {source} is a {found.arch} with the stem {found.stem}, the recipe has a "
            f"{spec.arch} with the stem {spec.stem}: set encoder.arch={found.arch} "
            f"encoder.stem={found.stem}, or name other weights."
        )
    if found.channels != spec.channels:
        raise UsageError(
            f"init {source} has encoder.channels {found.channels}, the recipe {spec.channels}: "
            "name other weights, or set the recipe's and pack its sets so."
        )
    if found.attention not in ("none", spec.attention):
        raise UsageError(
            f"init {source} has encoder.attention {found.attention}, the recipe {spec.attention}: "
            f"set encoder.attention={found.attention}, or name other weights."
        )
    attends_alike = found.attention == spec.attention  # a head takes features of its own width
    fits = spec.head == "none" or found.dim == spec.dim
    same_head = found.head == spec.head and fits and attends_alike
    if not same_head:
        weights = {name: w for name, w in weights.items() if not name.startswith("head.")}
    taken = "backbone and head" if same_head and spec.head != "none" else "backbone"
    notes = [f"init: {taken} of {where}"]
    if not same_head:
        there, here = _describe_head(found), _describe_head(spec)
        notes.append(f"init: the head is new: {there} there, {here} in the recipe")
    if not attends_alike:
        notes.append(f"init: the attention is new: none there, {spec.attention} in the recipe")
    if images and images != spec.normalization():
        mean, std = (list(values) for values in images)
        notes.append(
            "init: those weights were trained with another normalization: to keep it, set "
            f"'encoder.mean={mean}' 'encoder.std={std}'"
        )
    return Initial(weights, hash_weights(weights), tuple(notes))


def _read(
    source: Path, spec: EncoderSpec
) -> tuple[dict[str, torch.Tensor], EncoderSpec, str, tuple[PerChannel, PerChannel] | None]:
    """Return weights, their network, what to call them, and their images' mean and deviation."""
    if source.is_dir() and not (source / "state.pt").is_file():
        encoder, found, step = load_encoder(RunFolder(source), _CPU)
        return encoder.state_dict(), found, f"{source}, step {step}", found.normalization()
    file, said = source, None
    if source.is_dir():
        if read_manifest(source) is None:
            raise CheckpointError(f"The checkpoint {source} is damaged: name another one.")
        file, said = source / "state.pt", RunFolder(source.resolve().parents[1]).spec()
    if not file.exists():
        raise UsageError(f"init {source} is neither a run folder nor a file of weights.")
    content = read_weights(file)
    said = said or content.spec
    if said and said.attention != "none":
        raise UsageError(f"init {source}: attention is read from a run folder alone: name the run.")
    # No tensor tells a network of timm, nor is it found among torchvision's.
    arch = said.arch if said else spec.arch if spec.arch.startswith(TIMM) else None
    try:
        one = match(content.tensors, None, (said or spec).stem, arch)
    except CheckpointError as error:
        raise CheckpointError(
            f"init {file}: {error} A run folder that `fastmoco import` makes of a file will do too."
        ) from error
    found = EncoderSpec(
        arch=one.arch, stem=one.stem, channels=one.channels, head=one.head, dim=one.dim
    )
    behind = f", behind {one.prefix}" if one.prefix else ""
    return one.weights, found, f"{source}{behind}", said.normalization() if said else None


def _describe_head(spec: EncoderSpec) -> str:
    return "none" if spec.head == "none" else f"{spec.head} of {spec.dim}"
