"""A trained encoder for another program: written aside, loaded there, compared, then renamed."""

from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.core.files import new_file, new_folder
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop.formats import TARGETS, Target
from fastmoco.models.encoder import Encoder

# Other kernels round otherwise; a wrong weight or a missing statistic changes far more.
_TOLERANCE = 1e-4


@dataclass(frozen=True)
class Exported:
    """What an export says of itself.

    Attributes:
        checked: how it was compared.
        note: the code or the settings that load it.
    """

    checked: str
    note: str


def export(encoder: Encoder, spec: EncoderSpec, out: Path, to: str) -> Exported:
    """Write an encoder for the program `to`; the result is whole and compared, or absent.

    Args:
        encoder: fp32 on the CPU, in evaluation mode.
        spec: that it was built from.
        out: must not exist.
        to: a key of `TARGETS`.

    Raises:
        UsageError: the program cannot hold the network, a package is missing, or `out` exists.
        CheckpointError: what the program loads gives other features.
    """
    target = TARGETS[to]
    if reason := target.refusal(spec):
        others = [name for name, one in TARGETS.items() if not one.refusal(spec)]
        raise UsageError(f"{reason}: export to one of {', '.join(others)}.")
    if target.suffix and out.suffix != target.suffix:
        raise UsageError(f"{out} must end in {target.suffix}.")
    if out.exists():
        raise UsageError(f"{out} exists: choose another name.")
    if missing := [name for name in target.needs if not find_spec(name)]:
        raise UsageError(f"{', '.join(missing)} missing: pip install 'fastmoco[exchange]'.")
    with (new_folder if target.folder else new_file)(out) as aside, torch.inference_mode():
        target.write(encoder, spec, aside)
        checked = _compare(target, encoder, spec, aside)
    return Exported(checked, target.note(spec, out))


def _compare(target: Target, encoder: Encoder, spec: EncoderSpec, written: Path) -> str:
    """Hold the features of what was written, as its library loads it, against ours."""
    if target.library is None:
        return "not loaded for a check: no package of the index reads it"
    if not find_spec(target.library):
        return f"not loaded for a check: {target.library} is not installed"
    side, generator = spec.image_size, torch.Generator().manual_seed(0)
    images = torch.randn(2, spec.channels, side, side, generator=generator)
    ours = encoder.backbone(images)
    theirs = target.features(spec, written, images)
    difference = float((ours - theirs).abs().max())
    # A NaN is no match either.
    if not difference <= _TOLERANCE * max(1.0, float(ours.abs().max())):
        raise CheckpointError(
            f"{target.library} computes other features from it (they differ by {difference:.2g}): "
            "nothing was written. Please report this."
        )
    return f"loaded in {target.library}, features differ by {difference:.1e} at the most"
