"""Files of one number for each sample, as programs and people write them."""

import json
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.numbers import read_numbers
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError

NUMBERS = np.random.default_rng(0).normal(size=24)


@pytest.fixture
def data(small_set: ShardSet) -> ConcatShardSets:
    """24 samples."""
    return ConcatShardSets([small_set])


def rows(header: str = "sample,score", line: str = "{0},{1!r}") -> str:
    order = np.random.default_rng(1).permutation(24).tolist()
    return "\n".join([header, *(line.format(i, float(NUMBERS[i])) for i in order)]) + "\n"


@pytest.mark.parametrize(
    "text",
    [
        rows(),
        rows("\ufeffsample,name,hardness", '{0},"a, ""b""",{1!r}'),
        rows("weight,sample", "{1!r},{0}").replace("\n", "\r\n"),
    ],
)
def test_a_csv_in_any_order(data: ConcatShardSets, tmp_path: Path, text: str) -> None:
    (tmp_path / "n.csv").write_text(text, newline="")
    assert np.array_equal(read_numbers(tmp_path / "n.csv", data), NUMBERS)


@pytest.mark.parametrize("dtype", ["f8", "f4", "f2", "i2"])
def test_an_array(data: ConcatShardSets, tmp_path: Path, dtype: str) -> None:
    numbers = (100 * NUMBERS).astype(dtype)
    np.save(tmp_path / "n.npy", numbers)
    found = read_numbers(tmp_path / "n.npy", data)
    assert found.dtype == np.float64 and np.array_equal(found, numbers)


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "has the columns none"),
        ("sample,loss\n0,1\n", "has the columns sample, loss: it needs `sample` and one of"),
        ("sample,weight,score\n0,1,1\n", "one of hardness, score, weight"),
        (rows() + "24,1\n", "line 26: no sample 24, only 0..23"),
        (rows() + "-1,1\n", "line 26: no sample -1"),
        (rows() + "5,1\n", "line 26: sample 5 again, as in line "),
        (rows() + "5\n", "line 26: no sample and its number"),
        (rows() + "x,1\n", "line 26: no sample and its number"),
        (rows() + "5,x\n", "line 26: no sample and its number"),
        ("sample,score\n0,1\n", "has no number for 23 of 24 samples, such as 1"),
        (rows(line="{0},nan"), "the number of sample 0 is not finite"),
        ("sample,score\n" + "1" * 200_000, "cannot be read as numbers"),
    ],
)
def test_a_csv_with_faults(data: ConcatShardSets, tmp_path: Path, text: str, told: str) -> None:
    (tmp_path / "n.csv").write_text(text)
    with pytest.raises(DataError, match=told.replace("(", r"\(")):
        read_numbers(tmp_path / "n.csv", data)


def test_arrays_that_are_none_of_numbers(data: ConcatShardSets, tmp_path: Path) -> None:
    for name, array in (("text", np.array(["a"] * 24)), ("complex", np.ones(24, complex))):
        np.save(tmp_path / f"{name}.npy", array)
        with pytest.raises(DataError, match="cannot be read as numbers"):
            read_numbers(tmp_path / f"{name}.npy", data)
    for path in (tmp_path / "none.npy", tmp_path / "none.csv", tmp_path):
        with pytest.raises(DataError, match="cannot be read as numbers"):
            read_numbers(path, data)


def test_numbers_of_other_sets_are_refused(data: ConcatShardSets, tmp_path: Path) -> None:
    (tmp_path / "n.csv").write_text(rows())
    for about in ('{"set_ids": ["another"]}', json.dumps({"set_ids": data.set_ids}), "[1]", "no"):
        (tmp_path / "n.json").write_text(about)
        if "another" in about:
            with pytest.raises(DataError, match=r"is of other sets \(.*n.json names them"):
                read_numbers(tmp_path / "n.csv", data)
        else:
            assert len(read_numbers(tmp_path / "n.csv", data)) == 24
