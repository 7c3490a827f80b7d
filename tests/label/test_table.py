"""Tables of labels: what a row says beside its label, and that number and name agree."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.shard_set import ShardSet, read_labels
from fastmoco.errors import DataError
from fastmoco.label.from_csv import label
from fastmoco.label.table import read_table


@pytest.fixture
def write(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: str) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def test_weights_and_confidences(copied: ShardSet, write: Callable[..., Path]) -> None:
    path = write(
        "sample,label,weight,confidence", "9,bee,0.25,0.5", "2,cow,,", "4,,3,1", "0,ape,2,1"
    )
    table = read_table(copied, path)
    assert table.ids.tolist() == [9, 2, 0] and table.labels.tolist() == [1, 2, 0]
    assert table.weights.tolist() == [0.25, 1, 2] and table.weights.dtype == np.float32
    assert table.confidences is not None and table.confidences.dtype == np.float32
    np.testing.assert_array_equal(table.confidences, [0.5, np.nan, 1])
    done = label(copied.root, path, "mine")
    assert read_labels(copied, "mine")[0].tolist() == [(0, 0, 2.0), (2, 2, 1.0), (9, 1, 0.25)]
    assert any("confidences are not kept" in note for note in done.notes)


def test_without_them(copied: ShardSet, write: Callable[..., Path]) -> None:
    table = read_table(copied, write("sample,label", "0,ape", "1,bee"))
    assert table.weights.tolist() == [1, 1] and table.confidences is None
    assert table.classes == ["ape", "bee", "cow"]


def test_number_and_name_must_agree(copied: ShardSet, write: Callable[..., Path]) -> None:
    """In any of the forms in which a name alone would be found."""
    names = [copied.get_name(row) for row in range(4)]
    rows = [f"0,{names[0]},ape", f"1,{names[1].replace('/', chr(92))},ape", f"2,./{names[2]},bee"]
    assert len(read_table(copied, write("sample,name,label", *rows, "3,,cow")).ids) == 4
    with pytest.raises(DataError) as caught:
        read_table(copied, write("sample,name,label", *rows, f"3,{names[2]},cow"))
    assert f"line 5: sample 3 is {names[3]!r}, not {names[2]!r}" in str(caught.value)
    assert "another set" in str(caught.value) and "1 fault(s)" in str(caught.value)


def test_a_column_that_may_be_no_name_is_not_compared(
    copied: ShardSet, write: Callable[..., Path]
) -> None:
    assert len(read_table(copied, write("sample,id,label", "0,77,ape")).ids) == 1


@pytest.mark.parametrize("cell", ["0", "-0.1", "1.01", "nan", "inf", "sure"])
def test_a_confidence_that_is_none(copied: ShardSet, write: Callable[..., Path], cell: str) -> None:
    with pytest.raises(DataError, match="must be a number above 0 and at most 1"):
        read_table(copied, write("sample,label,confidence", f"0,ape,{cell}"))


def test_no_label_at_all(copied: ShardSet, write: Callable[..., Path]) -> None:
    with pytest.raises(DataError, match="has no label for a sample"):
        read_table(copied, write("sample,name,label", f"0,{copied.get_name(0)},"))
