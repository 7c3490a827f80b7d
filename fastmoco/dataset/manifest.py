"""`manifest.json`: what a set holds, and what it is known by."""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
import numpy.typing as npt
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    FiniteFloat,
    PlainValidator,
    ValidationError,
    field_validator,
    model_validator,
)

from fastmoco.core.files import hash_file, write_json
from fastmoco.errors import DataError

FORMAT_VERSION = 1
GRAY_VERSION = 2  # of sets of one channel, which a fastmoco that knows none shall not read
CHUNK = 2**16  # rows of a table that are looked at together: no table need fit into memory


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a name is a text")
    return value


# Names are bytes: what is not UTF-8 stands as surrogates, which pydantic takes for no text.
ClassName = Annotated[str, PlainValidator(_text)]
Channels = Annotated[list[FiniteFloat], Field(min_length=1, max_length=3)]


class Shard(BaseModel):
    """One tar file of a set."""

    model_config = ConfigDict(extra="forbid")

    name: str = Field(pattern=r"^[^./\\][^/\\]*$")  # in this folder, and not above it
    samples: int
    bytes: int
    sha256: str


class Manifest(BaseModel):
    """`manifest.json`: what a set holds. No time, host, path or worker count enters it.

    Attributes:
        mean, std: of the channels, in 0..1 units.
        channels: 3, or 1, gray.
        bits: 16 if any image has so many, which only gray ones have.
    """

    model_config = ConfigDict(extra="forbid")

    format_version: int
    set_id: str
    samples: int
    rejected: int
    progressive: int
    classes: list[ClassName]
    class_counts: list[int]
    mean: Channels
    std: Channels
    channels: Literal[1, 3] = 3
    bits: Literal[8, 16] = 8
    options: dict[str, Any]
    shards: list[Shard]
    sha256: dict[str, str] = {}  # not part of the set's identity; older sets have none

    @field_validator("std")
    @classmethod
    def _no_zero(cls, std: list[float]) -> list[float]:
        """Let a channel that is the same everywhere be divided by 1."""
        return [value or 1.0 for value in std]

    @model_validator(mode="after")
    def _one_for_each(self) -> "Manifest":
        if not len(self.mean) == len(self.std) == self.channels:
            raise ValueError("a mean and a deviation for each channel")
        return self

    def content(self) -> dict[str, Any]:
        """Return what is written: of three channels, what it was before there were others."""
        return self.model_dump(exclude_defaults=True)


MANIFEST = "manifest.json"
HASHED = ("samples.npy", "names.txt", "names.idx.npy", "rejects.jsonl")


def write_manifest(root: Path, manifest: Manifest) -> Manifest:
    """Write the manifest of a set whose other files are there, and return it with their hashes."""
    hashes = {name: hash_file(root / name) for name in HASHED}
    hashes[MANIFEST] = manifest_sha256(manifest.content())
    manifest = manifest.model_copy(update={"sha256": hashes})
    write_json(root / MANIFEST, manifest.content())
    return manifest


def manifest_sha256(content: dict[str, Any]) -> str:
    """Return the SHA-256 of all of a manifest but its hashes."""
    rest = {key: value for key, value in content.items() if key != "sha256"}
    return hashlib.sha256(json.dumps(rest, sort_keys=True).encode()).hexdigest()


def hash_set(
    shards: Sequence[Shard], samples: npt.NDArray[np.void], version: int = FORMAT_VERSION
) -> str:
    """Return the identity of a set: SHA-256 over format version, shard hashes and sample table."""
    digest = hashlib.sha256(f"fastmoco {version}\n".encode())
    for shard in shards:
        digest.update(f"{shard.sha256}\n".encode())
    for start in range(0, len(samples), CHUNK):
        digest.update(samples[start : start + CHUNK].tobytes())
    return digest.hexdigest()


def count_classes(labels: npt.NDArray[np.int32], classes: int) -> list[int]:
    """Return how many of (N,) labels, -1 for none, each of the classes has."""
    counts = np.zeros(classes, dtype=np.int64)
    for start in range(0, len(labels), CHUNK):
        some = labels[start : start + CHUNK]
        counts += np.bincount(some[some >= 0], minlength=classes)
    return counts.tolist()


def read_manifest(root: Path) -> Manifest:
    """Return the manifest of a set.

    Raises:
        DataError: there is none, or it is not one that this version reads.
    """
    path = root / "manifest.json"
    if not path.is_file():
        raise DataError(
            f"{root} is not a shard set (no manifest.json): make it by `fastmoco shard`."
        )
    text = path.read_bytes()
    manifest: Manifest | None
    try:
        # Straight from the text: half the time of `json.loads` first, which 11,000 shards show.
        manifest = Manifest.model_validate_json(text)
        version = manifest.format_version
    except ValidationError:
        manifest, version = _with_surrogates(text), _get_version(text)
    if version > GRAY_VERSION:
        raise DataError(
            f"{root} has format version {version}, this fastmoco reads up to {GRAY_VERSION}: "
            "upgrade fastmoco."
        )
    if manifest is None:
        raise DataError(f"{path} is damaged: pack the set anew.")
    return manifest


def _with_surrogates(text: bytes) -> Manifest | None:
    """Return a manifest in which class names are not UTF-8, None if that is not what is wrong."""
    try:
        return Manifest.model_validate(json.loads(text))
    except (ValueError, RecursionError):
        return None


def _get_version(text: bytes) -> int:
    """Return the format version of a manifest that does not fit ours, 0 if it has none."""
    try:
        return int(json.loads(text)["format_version"])
    except (ValueError, KeyError, TypeError):
        return 0
