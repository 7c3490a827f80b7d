"""Files of one number for each sample: how hard it is, how often to show it, how much it is wanted.

NAME.csv    a header with `sample` and one of `COLUMNS`; a row for each sample, in any order; or
NAME.npy    (N,) numbers in id order
NAME.json   where there is one that has `set_ids`: of which sets
"""

import csv
import io
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from fastmoco.core.files import load_array, make_parent, write_bytes, write_json
from fastmoco.dataset.manifest import CHUNK
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import DataError

COLUMNS = ("hardness", "score", "weight")

Numbers = npt.NDArray[np.float64]


def write_numbers(
    path: Path, column: str, numbers: Numbers, data: ConcatShardSets, about: dict[str, Any]
) -> None:
    """Write NAME.json, then NAME.csv with the columns `sample`, `name` and the numbers'.

    Args:
        path: of the CSV.
        column: one of `COLUMNS`.
        numbers: (N,) in id order; written as fp32.
        data: the sets that they are of.
        about: what else they depend on.
    """
    names = (
        name.decode("utf-8", "surrogateescape")
        for one in data.sets
        for start in range(0, len(one), CHUNK)
        for name in one.names(start, min(start + CHUNK, len(one)))
    )
    short = [str(number) for number in numbers.astype(np.float32)]  # the fewest digits that tell
    text = io.StringIO(newline="")
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(["sample", "name", column])
    rows.writerows(zip(range(len(short)), names, short, strict=True))
    make_parent(path)
    write_json(path.with_suffix(".json"), about | {"set_ids": data.set_ids})
    write_bytes(path, text.getvalue().encode("utf-8", "surrogateescape"))


def read_numbers(path: Path, data: ConcatShardSets) -> Numbers:
    """Return the (N,) fp64 numbers of a file, in id order.

    Raises:
        DataError: it cannot be read, is of other sets, a sample is missing or there twice, or a
            number is not finite.
    """
    _check_sets(path, data)
    read = _read_csv if path.suffix == ".csv" else _read_npy
    try:
        numbers = read(path, len(data))
    except (OSError, ValueError, TypeError, csv.Error) as error:
        raise DataError(f"{path} cannot be read as numbers: {error}.") from error
    odd = np.flatnonzero(~np.isfinite(numbers))
    if len(odd):
        raise DataError(f"{path}: the number of sample {odd[0]} is not finite.")
    return numbers


def _check_sets(path: Path, data: ConcatShardSets) -> None:
    beside = path.with_suffix(".json")
    try:
        about: Any = json.loads(beside.read_text())
    except (OSError, ValueError):
        return
    sets = about.get("set_ids") if isinstance(about, dict) else None
    if sets is not None and sets != data.set_ids:
        raise DataError(
            f"{path} is of other sets ({beside} names them by set_ids): take the file of "
            f"{', '.join(str(one.root) for one in data.sets)}."
        )


def _read_npy(path: Path, samples: int) -> Numbers:
    numbers = load_array(path).astype(np.float64, casting="same_kind")
    if numbers.shape != (samples,):
        raise DataError(f"{path} has the shape {numbers.shape}, the data {samples} samples.")
    return numbers


def _read_csv(path: Path, samples: int) -> Numbers:
    numbers = np.zeros(samples)
    lines = np.zeros(samples, np.int64)  # that name each sample; 0: none
    with path.open(newline="", encoding="utf-8-sig", errors="surrogateescape") as stream:
        rows = csv.reader(stream)
        header = next(rows, [])
        named = [column for column in COLUMNS if column in header]
        if "sample" not in header or len(named) != 1:
            raise DataError(
                f"{path} has the columns {', '.join(header) or 'none'}: it needs `sample` and one "
                f"of {', '.join(COLUMNS)}."
            )
        places = header.index("sample"), header.index(named[0])
        for fields in rows:
            where = f"{path}, line {rows.line_num}"
            try:
                sample, number = int(fields[places[0]]), float(fields[places[1]])
            except (IndexError, ValueError) as error:
                raise DataError(f"{where}: no sample and its number ({error}).") from error
            if not 0 <= sample < samples:
                raise DataError(f"{where}: no sample {sample}, only 0..{samples - 1}.")
            if lines[sample]:
                raise DataError(f"{where}: sample {sample} again, as in line {lines[sample]}.")
            numbers[sample], lines[sample] = number, rows.line_num
    if (absent := np.flatnonzero(lines == 0)).size:
        raise DataError(
            f"{path} has no number for {len(absent)} of {samples} samples, such as {absent[0]}."
        )
    return numbers
