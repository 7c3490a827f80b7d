"""What the folders in names say: splits and classes."""

import pytest

from fastmoco.errors import DataError
from fastmoco.pack.sources.layout import first_folder, split_by_layout


def described(names, unlabelled=False):
    parts = split_by_layout(names, "SOURCE", unlabelled)
    return {
        split: {names[row]: part.classes[label] if label >= 0 else "" for row, label in pairs}
        for split, part in parts.items()
        if (pairs := list(zip(part.rows.tolist(), part.labels.tolist(), strict=True)))
    }


def test_classes_are_the_first_folders():
    assert described(["b/1", "a/x/2", "a/3"]) == {"": {"b/1": "b", "a/x/2": "a", "a/3": "a"}}


def test_splits_are_first_folders_of_known_names_only():
    found = described(["train/a/1", "train/b/1", "Validation/b/2", "Validation/a/2"])
    assert found == {
        "train": {"train/a/1": "a", "train/b/1": "b"},
        "Validation": {"Validation/b/2": "b", "Validation/a/2": "a"},
    }
    # `trainer` is a class like any other.
    assert described(["trainer/1", "test/1"]) == {"": {"trainer/1": "trainer", "test/1": "test"}}


def test_a_split_without_classes_is_unlabelled_beside_labelled_ones():
    found = described(["train/a/1", "train/b/1", "unlabeled/1"])
    assert found["unlabeled"] == {"unlabeled/1": ""}


def test_unlabelled_is_one_part():
    assert described(["train/a/1", "x"], unlabelled=True) == {"": {"train/a/1": "", "x": ""}}


def test_classes_are_numbered_by_bytes():
    part = split_by_layout(["é/1", "z/1", "A/1"], "SOURCE", False)[""]
    assert (part.classes, part.labels.tolist()) == (["A", "z", "é"], [2, 1, 0])


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["a/1", "2"], "SOURCE holds images beside class folders"),
        (["a/1", "a/2"], r"SOURCE has a single class folder \(a\)"),
        (["train/a/1", "train/b/1", "val/a/1"], "SOURCE/val has a single class folder"),
        (["train/a/1", "train/b/1", "val/a/1", "val/c/1"], r"train, val\) differ .* \(b, c\)"),
    ],
)
def test_labels_that_would_be_wrong_are_refused(names, message):
    with pytest.raises(DataError, match=message):
        split_by_layout(names, "SOURCE", False)


def test_first_folder():
    assert [first_folder(name) for name in ("a/b/c", "a", "/a")] == ["a", "", ""]
