"""A request: the CSV that people fill in, what is known of it, and copies to look at."""

import csv
import os
import re
import shutil
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.core.files import (
    check_replaceable,
    make_parent,
    new_file,
    new_folder,
    refuse_taken,
    to_csv,
    write_json,
)
from fastmoco.core.rng import Ids
from fastmoco.dataset.reader import CorruptSamples, Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.label.head import Head, Scores
from fastmoco.label.uncertainty import Beliefs
from fastmoco.pack.contact_sheet import draw_sheet

_ON_SHEET = 64  # images, the most wanted
_COPY = re.compile(r"\d{5,}-\d+\.(jpg|png|webp)")  # the name of an image's copy


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
        beliefs: of the classifier on each sample asked for.
        scores: of each; None: the strategy has none.
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
    scores: Scores | None
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
    """Refuse a name of a request that is taken, or is no name of a CSV; see `refuse_taken`."""
    refuse_taken((out, *_beside(out)), ".csv", replace)
    make_parent(out)


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_suffix(".details.csv"), out.with_suffix(".json")


def check_request(out: Path, images: Path | None, replace: bool) -> None:
    """Refuse names of a request, of its sheet and of its copies, as `check_absent` does.

    Raises:
        UsageError: one is taken, or what would be replaced was not written here.
    """
    check_absent(out, replace)
    sheet = out.with_suffix(".png")
    for path, option in ((sheet, "--out"), (images, "--images")):
        if path and os.path.lexists(path) and not replace:
            raise UsageError(f"{path} exists: choose another {option}, or pass --replace.")
    check_replaceable(sheet)
    if images and os.path.lexists(images) and not _holds_copies_alone(images):
        raise UsageError(f"--images {images} is not of a request: choose another.")


def _holds_copies_alone(folder: Path) -> bool:
    return folder.is_dir() and all(_COPY.fullmatch(path.name) for path in folder.iterdir())


def write_request(request: Request, out: Path, images: Path | None = None) -> None:
    """Write a request: all of it, or, if that fails, nothing.

    Args:
        request: it.
        out: the CSV that people fill in. While it is there, so is all else, and of this request:
            details, description and contact sheet beside it, and the images.
        images: a folder for copies of the images, named by rank and sample.

    Raises:
        DataError: an image cannot be read.
    """
    details, description = _beside(out)
    with ExitStack() as stack:
        # Put in place in reverse: the CSV last.
        stack.enter_context(new_file(out)).write_bytes(_get_csv(request))
        write_json(stack.enter_context(new_file(description)), _get_description(request))
        stack.enter_context(new_file(details)).write_bytes(_get_details(request))
        stack.enter_context(new_file(out.with_suffix(".png"))).write_bytes(_get_sheet(request))
        if images:
            _write_images(request, stack.enter_context(new_folder(images)))
        out.unlink(missing_ok=True)  # the old one, before what lies beside it changes
        if images:
            shutil.rmtree(images, ignore_errors=True)


def _get_csv(request: Request) -> bytes:
    rows = ([i, request.pool.get_name(i), ""] for i in request.ids.tolist())
    return to_csv(["sample", "name", "label"], rows)


def _get_details(request: Request) -> bytes:
    rows: list[list[Any]] = []
    for rank, sample in enumerate(request.ids.tolist()):
        said: list[Any] = [""] * 4
        if (b := request.beliefs) is not None:
            numbers = (b.confidence[rank], b.margin[rank], b.entropy[rank])
            said = [request.classes[b.predicted[rank]], *(f"{x:.6f}" for x in numbers)]
        score = "" if request.scores is None else f"{request.scores[rank]:.6g}"
        rows.append([sample, rank + 1, score, *said])
    return to_csv(["sample", "rank", "score", "predicted", "confidence", "margin", "entropy"], rows)


def _get_description(request: Request) -> dict[str, Any]:
    classifier = None
    if request.head:
        fields = vars(request.head).items()
        classifier = {name: value for name, value in fields if name not in ("weight", "bias")}
    return request.about | {
        "strategy": request.strategy,
        "why": request.why,
        "candidates": request.candidates,
        "classifier": classifier,
        "warnings": request.warnings,
    }


def _get_sheet(request: Request) -> bytes:
    ids = request.ids[:_ON_SHEET].tolist()
    captions = [f"{rank}: {sample}" for rank, sample in enumerate(ids, 1)]
    if request.beliefs is not None:
        predicted = (request.classes[label] for label in request.beliefs.predicted[:_ON_SHEET])
        captions = [f"{told} {name}?" for told, name in zip(captions, predicted, strict=True)]
    return draw_sheet(request.pool, ids, captions)


def _write_images(request: Request, folder: Path) -> None:
    data = ConcatShardSets([request.pool])
    reader, endings = Reader(data), {b"\xff\xd8": "jpg", b"\x89P": "png"}
    for rank, sample in enumerate(request.ids.tolist(), 1):
        try:
            (image,) = reader.fetch(np.array([sample]))
        except CorruptSamples as error:
            raise DataError(
                f"{data.describe(sample)} cannot be read: the shard was damaged after packing. "
                "Copy the set again, or pack it anew."
            ) from error
        ending = endings.get(image[:2].tobytes(), "webp")
        (folder / f"{rank:05d}-{sample}.{ending}").write_bytes(image.tobytes())


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
    if (b := request.beliefs) is not None:
        lines.append(
            f"  of those asked for: confidence up to {b.confidence.max():.2f}, margin up to "
            f"{b.margin.max():.3f}, entropy from {b.entropy.min():.2f}"
        )
    lines += [f"  warning: {warning}" for warning in request.warnings]
    lines.append(
        f"  look first: {out.with_suffix('.png')}, the {min(budget, _ON_SHEET)} most wanted"
    )
    lines.append(f"fill in `label`, then: fastmoco label {request.pool.root} {out} --name asked")
    return lines
