"""Features of a set as plain numpy files, for whatever comes after."""

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import new_file, write_json
from fastmoco.errors import UsageError


def companions(out: Path) -> tuple[Path, Path]:
    """Return where the ids and the description of features.npy go."""
    return out.with_suffix(".ids.npy"), out.with_suffix(".json")


def check_absent(out: Path) -> None:
    """Refuse a name before the hours of embedding.

    Raises:
        UsageError: it does not end in .npy, or one of the three files exists.
    """
    if out.suffix != ".npy":
        raise UsageError(f"{out} must end in .npy.")
    for path in (out, *companions(out)):
        if path.exists():
            raise UsageError(f"{path} exists: choose another --out.")


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
