"""Which adapter opens what, and what holds for all of them."""

import json
import tarfile

import numpy as np
import pytest

from fastmoco.errors import DataError, FastmocoError, UsageError
from fastmoco.pack.sources import FORMATS, open_sources, recognize


def test_general_formats_are_recognized_by_their_suffix(tmp_path, touch):
    touch(tmp_path, "x.ZIP", "x.tar", "x.csv", "x.npy", "x.pt", "x.mat", "folder/1.png")
    found = {path.name: recognize(path) for path in tmp_path.iterdir()}
    assert found == {
        "x.ZIP": "zip",
        "x.tar": "tar",
        "x.csv": "csv",
        "x.npy": "tensor",
        "x.pt": "tensor",
        "x.mat": "svhn",
        "folder": "folder",
    }


def test_a_folder_of_known_words_is_still_a_folder(tmp_path, touch):
    # CIFAR-100 has a file `train`, STL-10 a file `train_X.bin`: these are folders and images.
    touch(tmp_path, "train/meta/1.png", "train/b/1.png", "test/meta/1.png", "test/b/1.png")
    assert recognize(tmp_path) == "folder"


def test_what_is_not_known_is_refused_in_words(tmp_path, touch):
    touch(tmp_path, "x.rar")
    with pytest.raises(DataError, match=r"none of folder, zip, .*--format"):
        open_sources(tmp_path / "x.rar")
    for name in (None, "folder", "csv", "cifar", "tensor"):
        with pytest.raises(UsageError, match="There is no file or folder"):
            open_sources(tmp_path / "absent", name)
    with pytest.raises(UsageError, match="no format 'cifr'; those known: folder, zip"):
        open_sources(tmp_path, "cifr")


def test_a_compressed_tar_of_images_is_refused_with_the_remedy(tmp_path, touch):
    touch(tmp_path, "images/1.png")
    with tarfile.open(tmp_path / "x.tar.gz", "w:gz") as archive:
        archive.add(tmp_path / "images", "images")
    with pytest.raises(DataError, match=r"compressed.*`gzip -d x\.tar\.gz`"):
        open_sources(tmp_path / "x.tar.gz")


@pytest.mark.parametrize("name", FORMATS)
def test_each_format_refuses_what_it_cannot_read(tmp_path, touch, name):
    touch(tmp_path, "file", "folder/notes.txt")
    for path in (tmp_path / "file", tmp_path / "folder"):
        with pytest.raises(FastmocoError):  # an extra may be missing
            open_sources(path, name)


def test_like_demands_the_same_classes_and_gives_their_numbers(tmp_path, touch):
    touch(tmp_path, "cow/1.png", "ape/1.png", "bee/1.png")
    found = open_sources(tmp_path, like=["cow", "bee", "ape"])[""]
    assert found.classes == ["cow", "bee", "ape"]
    assert dict(zip(found.names, found.labels.tolist(), strict=True)) == {
        "cow/1.png": 0,
        "bee/1.png": 1,
        "ape/1.png": 2,
    }
    assert len(open_sources(tmp_path, like=["ant", "bee", "ape", "cow"])[""].classes) == 4
    with pytest.raises(DataError, match="unknown there bee"):
        open_sources(tmp_path, like=["ape", "bear", "cow"])
    found = open_sources(tmp_path, like=["ape", "ass", "bee", "cow"])[""]
    assert set(found.labels.tolist()) == {0, 2, 3}
    with pytest.raises(UsageError, match="--like"):
        open_sources(tmp_path, unlabelled=True, like=["ape"])


def test_like_of_an_unlabelled_source_is_refused(tmp_path, touch):
    touch(tmp_path, "1.png", "2.png")
    with pytest.raises(DataError, match="has no labels"):
        open_sources(tmp_path, like=["ape", "bee"])


def test_like_keeps_images_without_a_label(tmp_path, touch):
    touch(tmp_path, "1.png", "2.png", "3.png")
    (tmp_path / "x.csv").write_text("path,label\n1.png,b\n2.png,\n3.png,a\n")
    found = open_sources(tmp_path / "x.csv", like=["b", "a"])[""]
    assert found.labels.tolist() == [0, -1, 1]


def test_labels_are_plain_numbers_for_json(tmp_path, touch):
    touch(tmp_path, "a/1.png", "b/1.png")
    found = open_sources(tmp_path)[""]
    assert found.labels.dtype == np.int32
    assert json.dumps([found.classes, found.left_out]) == '[["a", "b"], []]'
