"""A request: the CSV that people fill in, what is known of it, and copies to look at."""

import csv
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.core.files import make_parent, new_folder, to_csv, write_bytes, write_json
from fastmoco.core.rng import Ids
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.label.head import Head
from fastmoco.label.uncertainty import Beliefs


@dataclass(frozen=True)
class Request:
    """What to ask for, the most wanted first.

    Attributes:
        pool: the set.
        ids: of the samples.
        strategy: that chose them; never "auto".
        why: that one, in a sentence; empty: it was named.
        candidates: how many there were.
        classes: names of the classes; none: there are no labels yet.
        head: that judged them, None: none did.
        beliefs: of the head on each sample asked for.
        warnings: what the reader should know.
        about: what it depends on: run, step, sets, options.
    """

    pool: ShardSet
    ids: Ids
    strategy: str
    why: str
    candidates: int
    classes: list[str]
    head: Head | None
    beliefs: Beliefs | None
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def read_request(path: Path) -> list[int]:
    """Return the ids that a request asks for.

    Raises:
        DataError: it is no request.
    """
    try:
        with path.open(newline="") as stream:
            return [int(row["sample"]) for row in csv.DictReader(stream)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no request of `fastmoco query`: {error}.") from error


def check_absent(out: Path, replace: bool) -> None:
    """Refuse a name that is taken, before the minutes of embedding.

    Raises:
        UsageError: it is, it does not end in .csv, or its folder cannot be made.
    """
    if out.suffix != ".csv":
        raise UsageError(f"--out {out} must end in .csv.")
    for path in (out, *_beside(out)):
        if path.exists() and not replace:
            raise UsageError(f"{path} exists: choose another --out, or pass --replace.")
    make_parent(out)


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_suffix(".details.csv"), out.with_suffix(".json")


def write_request(request: Request, out: Path) -> None:
    """Write details and description, and last the CSV that people fill in; each is whole."""
    details, description = _beside(out)
    names = [request.pool.get_name(int(sample)) for sample in request.ids]
    header = ["sample", "rank", "predicted", "confidence", "margin", "entropy"]
    rows: list[list[Any]] = []
    for rank, sample in enumerate(request.ids.tolist()):
        said: list[Any] = [""] * 4
        if (b := request.beliefs) is not None:
            numbers = (b.confidence[rank], b.margin[rank], b.entropy[rank])
            said = [request.classes[b.predicted[rank]], *(f"{x:.6f}" for x in numbers)]
        rows.append([sample, rank + 1, *said])
    write_bytes(details, to_csv(header, rows))
    head = request.head
    classifier = None
    if head:
        classifier = {k: v for k, v in vars(head).items() if k not in ("weight", "bias")}
    write_json(
        description,
        request.about
        | {
            "strategy": request.strategy,
            "candidates": request.candidates,
            "classifier": classifier,
            "warnings": request.warnings,
        },
    )
    wanted = [[i, name, ""] for i, name in zip(request.ids.tolist(), names, strict=True)]
    write_bytes(out, to_csv(["sample", "name", "label"], wanted))


def write_images(request: Request, folder: Path) -> None:
    """Write the stored bytes of the samples into a new folder, named by rank and sample.

    Raises:
        UsageError: the folder exists.
    """
    if os.path.lexists(folder):
        raise UsageError(f"--images {folder} exists: choose another.")
    reader, endings = Reader(ConcatShardSets([request.pool])), {b"\xff\xd8": "jpg", b"\x89P": "png"}
    with new_folder(folder) as aside:
        for rank, sample in enumerate(request.ids.tolist(), 1):
            (image,) = reader.fetch(np.array([sample]))
            ending = endings.get(image[:2].tobytes(), "webp")
            (aside / f"{rank:05d}-{sample}.{ending}").write_bytes(image.tobytes())


def describe(request: Request, out: Path) -> list[str]:
    """Return what a person should read of a request."""
    budget, balanced = len(request.ids), ""
    if request.beliefs is not None:
        counts = np.bincount(request.beliefs.predicted, minlength=len(request.classes))
        balanced = f", {counts.min()} to {counts.max()} of a predicted class"
    lines = [
        f"{out}: {budget:,} of {request.candidates:,} candidates by {request.strategy}{balanced}"
    ]
    if request.why:
        lines.append(f"  {request.strategy}: {request.why}")
    if (head := request.head) and head.accuracy is not None:
        lines.append(
            f"  classifier: {head.samples} labels, {head.accuracy:.1f} % right out of fold, "
            f"C {head.strength:g}, temperature {head.temperature:.2f}, calibration error "
            f"{head.error:.2f}"
        )
    lines += [f"  warning: {warning}" for warning in request.warnings]
    lines.append(f"fill in `label`, then: fastmoco label {request.pool.root} {out} --name asked")
    return lines
