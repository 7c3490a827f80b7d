"""Checkpoints: the state of a run and the manifest that vouches for it, whole or not there."""

import errno
import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, BinaryIO, cast

import torch

from fastmoco.config.loading import shorten_value
from fastmoco.config.recipe import Recipe
from fastmoco.core.files import hash_file, new_folder, sync, write_json
from fastmoco.errors import CheckpointError

CHECKPOINT_VERSION = 1

# What a checkpoint older than these keys of the fingerprint was made with.
_BEFORE = {
    "channels": 3,
    "executor": "dali",
    "objective": "moco",
    "bn": "groups",
    "shuffle": "global",
    "symmetric": False,
    "optimizer": "sgd",
    "attention": "none",
}

Fingerprint = dict[str, Any]
State = dict[str, Any]
Measured = dict[str, float]
"""What the monitor measured at the step of a checkpoint, by name; empty where it did not run."""


def get_fingerprint(
    recipe: Recipe, set_ids: list[str], samples: int, order: str, executor: str
) -> Fingerprint:
    """Return what must not change under a run: it decides what every later step means.

    Args:
        recipe: of the run.
        set_ids: of its sets.
        samples: of an epoch.
        order: digest of their order.
        executor: that draws the views: each has its own rounding, and its own turn of the hue.
    """
    return {
        "sets": set_ids,
        "samples": samples,
        "order": order,
        "executor": executor,
        "optimizer": recipe.optimizer.name,  # the state of one means nothing to another
        **recipe.model_dump(mode="json", include={"views", "batch", "seed"}),
        **recipe.encoder.model_dump(
            mode="json",
            include={"arch", "stem", "attention", "head", "dim", "image_size", "channels"},
        ),
        "objective": recipe.objective.name,
        **recipe.objective.model_dump(
            mode="json", include={"bn", "bn_group", "shuffle", "symmetric", "queue"}
        ),
    }


def write_checkpoint(
    final: Path, state: State, step: int, fingerprint: Fingerprint, measured: Measured
) -> None:
    """Write a checkpoint, whole or not at all, and read it back.

    Raises:
        OSError: it cannot be written, or the disk gives back other bytes.
    """
    with new_folder(final) as folder:
        with (folder / "state.pt").open("wb") as file:
            digest = _save_hashed(state, file)
        sync(folder / "state.pt")
        if hash_file(folder / "state.pt") != digest:
            raise OSError(errno.EIO, "the disk gives back other bytes than were written")
        manifest = {
            "format_version": CHECKPOINT_VERSION,
            "step": step,
            "sha256": digest,
            "fingerprint": fingerprint,
            "measured": measured,
        }
        manifest["own"] = _digest(manifest)
        write_json(folder / "manifest.json", manifest)


def _save_hashed(state: State, file: BinaryIO) -> str:
    """Write a state by torch.save and return the hex SHA-256 of what the file was given.

    Raises:
        OSError: the file does not take it.
    """
    sink = _Sink(file)
    torch.save(state, cast(BinaryIO, sink))
    if sink.error:
        raise sink.error
    return sink.sha256.hexdigest()


class _Sink:
    """Hashes bytes before the disk has touched them, and keeps an error for later.

    torch calls it from C++, which would make a RuntimeError of it.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self.sha256 = hashlib.sha256()
        self.error: OSError | None = None

    def write(self, content: bytes) -> int:
        self.sha256.update(content)
        if self.error is None:
            try:
                self._file.write(content)
            except OSError as error:
                self.error = error
        return len(content)

    def flush(self) -> None:
        """Do nothing: whoever opened the file flushes it."""


def read_manifest(folder: Path) -> dict[str, Any] | None:
    """Return a checkpoint's manifest if its content is what was written, else None.

    Raises:
        CheckpointError: it was written by a newer version.
    """
    try:
        manifest: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
        if (version := int(manifest["format_version"])) > CHECKPOINT_VERSION:
            raise CheckpointError(
                f"{folder} has checkpoint version {version}, this fastmoco reads up to "
                f"{CHECKPOINT_VERSION}: upgrade fastmoco."
            )
        own = manifest.pop("own", None)  # checkpoints older than this key have none
        whole = own in (None, _digest(manifest)) and "fingerprint" in manifest
        whole = whole and hash_file(folder / "state.pt") == manifest["sha256"]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def find_best(folders: Sequence[Path], metric: str) -> Path | None:
    """Return the best of some checkpoints by a number in `Measured`; None: none has it.

    Args:
        folders: the oldest first; of equal numbers the older one is better.
        metric: the number's name.
    """
    best, reached = None, Measured()
    for folder in folders:
        measured = read_measured(folder)
        if metric in measured and is_better(measured, reached, metric):
            best, reached = folder, measured
    return best


def is_better(measured: Measured, before: Measured, metric: str) -> bool:
    """Return whether a number is higher than one before, or cannot be compared with it.

    Numbers over different counts of images cannot: then the later one takes the place.
    """
    key = "rankme_images"
    if metric not in before or measured.get(key) != before.get(key):
        return True
    return measured[metric] > before[metric]


def read_measured(folder: Path) -> Measured:
    """Return what was measured at the step of a checkpoint; nothing of a damaged one."""
    try:
        found: Measured = json.loads((folder / "manifest.json").read_text())["measured"]
    except (OSError, ValueError, KeyError, TypeError):  # or older than this key
        return {}
    return found


def _digest(manifest: dict[str, Any]) -> str:
    """Return the hash of what a manifest says, as it will be read back."""
    return hashlib.sha256(json.dumps(manifest, sort_keys=True).encode()).hexdigest()


def check_fingerprint(folder: Path, found: Fingerprint, wanted: Fingerprint) -> None:
    """Check that a checkpoint is of the run that would go on from it.

    Raises:
        CheckpointError: it is of another one; names the first key that differs.
    """
    found = _BEFORE | found
    for field in wanted:
        if found.get(field) != wanted[field]:
            raise CheckpointError(
                f"{folder} is of another run: {field} was {shorten_value(found.get(field))}, "
                f"now it is {shorten_value(wanted[field])}. Restore it, or choose another out=DIR."
            )
