"""From somebody's checkpoint to a run folder that `fastmoco probe` and `fastmoco knn` read."""

from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

from fastmoco.config.encoder import EncoderSpec, Stem
from fastmoco.core.files import hash_file, new_folder, write_json
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.interop.detect import Match, match
from fastmoco.interop.read_checkpoint import read_weights
from fastmoco.runs.run_folder import ORIGIN, RunFolder


@dataclass(frozen=True)
class Imported:
    """What became of a file.

    Attributes:
        spec: of the run folder.
        source: where in the file the backbone was, and by whose names.
        notes: sentences that its user must know.
    """

    spec: EncoderSpec
    source: str
    notes: tuple[str, ...]


def import_weights(
    file: Path,
    out: Path,
    prefix: str | None = None,
    stem: Stem | None = None,
    image_size: int | None = None,
    arch: str | None = None,
) -> Imported:
    """Make a run folder, at step 0, of the weights of another program.

    Args:
        file: safetensors, or a checkpoint of torch that holds tensors and plain values only.
        out: the run folder; must not exist.
        prefix: before the names of the backbone's tensors; None: that of the network that they
            fill, and of the trained one where its moving average is there too.
        stem: of the network; None: what our own export says, else by the first convolution.
        image_size: that the network is shown, pixels; None: what our own export says, else 224,
            or 32 after a 3x3 stem.
        arch: of the network; None: what our own export says, else a ResNet of torchvision, found.

    Raises:
        UsageError: no such file, no such network, or `out` exists.
        CheckpointError: the file is damaged, unsafe, or does not fill a network in full with
            finite numbers.
    """
    if out.exists():
        raise UsageError(f"{out} exists: choose another folder.")
    weights = read_weights(file)
    said = weights.spec
    known, arch = stem or (said.stem if said else None), arch or (said.arch if said else None)
    try:
        found = match(weights.tensors, prefix, known, arch)
    except CheckpointError as error:
        raise CheckpointError(f"{file}: {error}") from error
    spec = _spec(found, weights.spec, image_size)
    notes = _notes(found, spec, known_stem=bool(known))
    origin = {
        "file": file.name,
        "sha256": hash_file(file),
        "prefix": found.prefix,
        "names": found.naming.name,
        "notes": notes,
    }
    with new_folder(out) as folder:
        run = RunFolder(folder)
        run.describe_encoder(spec, {name: version(name) for name in ("fastmoco", "torch")})
        run.save({"encoder_q": found.weights}, step=0, fingerprint={}, keep=1)
        write_json(folder / ORIGIN, origin)
    behind = f"behind {found.prefix}, " if found.prefix else ""
    return Imported(spec, f"{behind}by the names of {found.naming.name}", notes)


def _spec(found: Match, said: EncoderSpec | None, image_size: int | None) -> EncoderSpec:
    """Return what was found, with the images that our own export or else its stem tells."""
    values = said.model_dump() if said else {"image_size": 224 if found.stem == "imagenet" else 32}
    if found.channels == 1 and not said:
        values |= {"mean": (0.449,), "std": (0.226,)}  # ImageNet's, the mean over its channels
    values |= {"arch": found.arch, "stem": found.stem, "channels": found.channels}
    values |= {"head": found.head, "dim": found.dim}
    return EncoderSpec(**values | ({"image_size": image_size} if image_size else {}))


def _notes(found: Match, spec: EncoderSpec, known_stem: bool) -> tuple[str, ...]:
    notes = [
        f"Images are shown at {spec.image_size} px, mean {spec.mean}, std {spec.std}: "
        "if the weights were trained with others, put those into encoder.json.",
        *found.notes,
    ]
    if found.stem == "small" and not known_stem:
        notes.append(
            "A 3x3 stem was taken to have stride 1, padding 1 and no max-pool, which no file "
            "says: --stem small-stride2 is for stride 2. solo-learn pads by 2: features differ at "
            "the borders, and a number from here is not quite theirs."
        )
    return tuple(notes)
