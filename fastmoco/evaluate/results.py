"""Where the numbers go: a row in the run's evaluations, and beside it what was said of each image.

evaluations.jsonl            one row an evaluation: kind, protocol, sets, accuracies
evaluations/0003-probe.npz   that of row 3:
    id          (n,) int64       sample ids in the test set
    label       (n,) int32       the truth
    predicted   (n,) int32       the class with the highest score
    confidence  (n,) float32     its share, 0..1
    place       (n,) int32       classes that came before the true one; below 5: right in the top 5
    confusion   (c, c) int64     counts; true class down, predicted class across; of 1,000 classes
                                 and more (m, 3): true class, predicted class, count above 0
    classes     (c,) str         names of the labels 0, 1, ...
evaluations/0003-probe.curve.jsonl   how its training went, a row an epoch (finetune: 20 in all):
    loss, train_top1             of the training images, as they were shown
    test_top1                    of the test images, by the weights of that time; it chooses nothing
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from filelock import FileLock

from fastmoco.core.files import new_file, write_bytes
from fastmoco.dataset.labels import Labelled
from fastmoco.evaluate.predictions import Predictions
from fastmoco.runs.run_folder import RunFolder

SPARSE = 1000  # classes from which on the pairs of classes are many more than the samples


def append(
    run: RunFolder,
    result: dict[str, Any],
    found: Predictions,
    test: Labelled,
    curve: Sequence[dict[str, Any]] = (),
) -> dict[str, Any]:
    """Write down a result, and return it with the names of its files.

    Args:
        run: of the encoder.
        result: its "kind", the numbers, and all that they depend on.
        found: of the test samples, in the order of their ids.
        test: the test set.
        curve: rows of the training; none: no file of them.

    Raises:
        OSError: the run folder cannot be written.
    """
    rows = run.root / "evaluations.jsonl"
    # Two evaluations of one run may end at once: each gets a number of its own.
    with FileLock(run.root / ".evaluations.lock"):
        number = 1 + (len(rows.read_text().splitlines()) if rows.exists() else 0)
        name = f"evaluations/{number:04d}-{result['kind']}.npz"
        _save(run.root / name, found, test)
        row = result | {"predictions": name}
        if curve:
            row["curve"] = name.replace(".npz", ".curve.jsonl")
            lines = "".join(json.dumps(one, allow_nan=False) + "\n" for one in curve)
            write_bytes(run.root / row["curve"], lines.encode())
        _add(rows, json.dumps(row, allow_nan=False))
    return row


def _add(rows: Path, row: str) -> None:
    """Append a line; after one cut short by a kill, on a line of its own."""
    torn = rows.exists() and rows.read_bytes()[-1:] not in (b"", b"\n")
    with rows.open("a") as stream:
        stream.write("\n" * torn + row + "\n")


def _save(path: Path, found: Predictions, test: Labelled) -> None:
    with new_file(path) as aside:
        np.savez_compressed(
            aside,
            id=test.ids,
            label=found.labels.numpy().astype(np.int32),
            predicted=found.predicted.numpy().astype(np.int32),
            confidence=found.confidence.numpy(),
            place=found.place.numpy().astype(np.int32),
            confusion=(found.confused() if found.classes >= SPARSE else found.confusion()).numpy(),
            classes=np.array(test.classes),
        )
