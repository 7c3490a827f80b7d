"""Features of a set as plain numpy files, for whatever comes after."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import load_array, new_file, refuse_taken, write_json
from fastmoco.errors import DataError


def companions(out: Path) -> tuple[Path, Path]:
    """Return where the ids and the description of features.npy go."""
    return out.with_suffix(".ids.npy"), out.with_suffix(".json")


def check_absent(out: Path) -> None:
    """Refuse a name of features that is taken, or is no name of a `.npy`; see `refuse_taken`."""
    refuse_taken((out, *companions(out)), ".npy")


def write_features(
    out: Path, features: npt.NDArray[np.float32], ids: npt.NDArray[np.int64], about: dict[str, Any]
) -> None:
    """Write OUT.npy, OUT.ids.npy and, last, the OUT.json that says they are whole.

    Args:
        out: ends in .npy.
        features: (N, width), one row a sample.
        ids: (N,) of the samples.
        about: what they are features of.
    """
    beside, description = companions(out)
    for path, array in ((out, features), (beside, ids)):
        with new_file(path) as aside:
            np.save(aside, array)
    write_json(description, about | {"samples": len(ids), "width": features.shape[1]})


def open_features(
    path: Path, about: Mapping[str, Any], samples: int, width: int
) -> npt.NDArray[np.float32]:
    """Map the (samples, width) features of a whole set that `write_features` wrote.

    Args:
        path: of the `.npy`.
        about: what its description must say, as given to `write_features`.
        samples, width: its shape.

    Raises:
        DataError: it cannot be read, or is of something else.
    """
    beside, description = companions(path)
    try:
        told = json.loads(description.read_text())
        features, ids = load_array(path), load_array(beside)
    except (OSError, ValueError) as error:
        raise DataError(
            f"{path} cannot be read as features of `fastmoco embed`: {error}."
        ) from error
    told = told if isinstance(told, dict) else {}
    for field, wanted in about.items():
        if told.get(field) != wanted:
            raise DataError(
                f"{path} has features of another {field}: {told.get(field)!r}, not {wanted!r}. "
                "Make others by `fastmoco embed`, or leave them out."
            )
    if features.shape != (samples, width) or not np.array_equal(ids, np.arange(samples)):
        raise DataError(
            f"{path} has the shape {features.shape}, not {(samples, width)} in id order."
        )
    return features
