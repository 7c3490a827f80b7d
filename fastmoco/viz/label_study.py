"""What `query` and `pseudolabel` wrote, read back for the report."""

import csv
import hashlib
import json
from collections import Counter
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.core.distributed import get_device
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, FastmocoError
from fastmoco.evaluate.features import frozen_preprocessing
from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz.encoder_study import shown
from fastmoco.viz.report_plots import Tile, draw_precision, draw_reliability, save_tile


@dataclass(frozen=True)
class LabelFile:
    """A request or pseudo-labels.

    Attributes:
        name: of the CSV.
        about: its JSON.
        balance: how many images of each class there are, the most first.
        counted: what is counted there, in words.
        pseudo: whether they are pseudo-labels.
    """

    name: str
    about: dict[str, Any]
    balance: list[tuple[str, int]]
    counted: str
    pseudo: bool


def read_label_file(path: Path) -> LabelFile:
    """Read what lies beside a CSV.

    Raises:
        DataError: it is none of `query` or `pseudolabel`, or was changed since.
    """
    try:
        content = path.read_bytes()
        about = json.loads(path.with_suffix(".json").read_text())
        if about.get("kind") == "pseudolabels":
            counts, counted = Counter(about["classes"]), "labels"
        else:
            counts, counted = _balance(path, about["strategy"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(
            f"{path} is no CSV that `fastmoco query` or `pseudolabel` wrote, with its .json beside "
            f"it ({error})."
        ) from error
    pseudo = counted == "labels"
    if pseudo and hashlib.sha256(content).hexdigest() != about.get("sha256"):
        raise DataError(f"{path} is another one than its .json describes: label the pool anew.")
    # By name where counts are equal: the same bytes each time.
    balance = sorted(counts.items(), key=lambda pair: (-pair[1], pair[0]))
    return LabelFile(path.name, about, balance, counted, pseudo)


def _balance(path: Path, strategy: str) -> tuple[Counter[str], str]:
    """Return the classes of a request: as labelled, if it came back, else as predicted."""
    labels = _count(path, "label")
    if labels:
        return labels, "labels that came back"
    return _count(path.with_suffix(".details.csv"), "predicted"), f"predictions, by {strategy}"


def _count(path: Path, column: str) -> Counter[str]:
    with path.open(newline="", encoding="utf-8", errors="replace") as stream:
        return Counter(row[column] for row in csv.DictReader(stream) if row[column])


def draw_label_file(
    folder: Path, run: RunFolder, one: LabelFile, number: int, device: str
) -> dict[str, Any]:
    """Draw a request or pseudo-labels.

    Args:
        folder: where the PNGs go.
        run: how images are shown to its encoder.
        one: the file.
        number: of it on the page, part of the names of the PNGs.
        device: "auto", "cpu" or "cuda".

    Returns:
        The names of what was drawn: `precision`, None where there is no curve, `reliability` with
        the classifier of each, and the tiles of `wrong`, or the sentence that says why there are
        none; and the `file` itself.
    """
    drawn: dict[str, Any] = {"precision": None, "reliability": [], "wrong": None}
    about = one.about
    if about.get("curve"):
        drawn["precision"] = f"precision_{number}.png"
        path = folder / drawn["precision"]
        draw_precision(path, about["curve"], about["threshold"], about["precision"])
    for place, classifier in enumerate(about["classifiers"] if one.pseudo else []):
        if classifier.get("bins"):
            file = f"reliability_{number}_{place}.png"
            draw_reliability(folder / file, classifier["bins"], classifier["run"])
            drawn["reliability"].append((file, classifier))
    if one.pseudo and about["truth"]:
        try:
            drawn["wrong"] = _surest_wrong(folder, run, one, number, device)
        except FastmocoError as error:  # the pool may be gone
            drawn["wrong"] = str(error)
    return drawn | {"file": one}


def _surest_wrong(
    folder: Path, run: RunFolder, one: LabelFile, number: int, device: str
) -> list[Tile]:
    """Draw the pseudo-labels that are the surest of those that are wrong."""
    rows = one.about["truth"]["surest_wrong"]
    if not rows:
        return []
    pool = ShardSet(Path(one.about["pool"]))
    if pool.manifest.set_id != one.about["set_id"]:
        raise DataError(f"{pool.root} is not the set that {one.name} labels.")
    preprocessing = frozen_preprocessing(run.spec(), run.runtime(), get_device(device, 0))
    ids = np.array([row["sample"] for row in rows])
    tiles = []
    for rank, pixels in enumerate(shown(preprocessing, ConcatShardSets([pool]), ids)):
        row, file = rows[rank], f"pseudo_{number}_{rank}.png"
        save_tile(folder / file, pixels)
        alt = f"{row['truth']}: sample {row['sample']}, {pool.get_name(row['sample'])}"
        title = f"{row['truth']}, taken for {row['label']}"
        tiles.append(Tile(file, title, f"{100 * row['confidence']:.0f} %", alt, right=False))
    return tiles
