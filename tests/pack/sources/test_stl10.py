"""STL-10: files written column by column, read back by us and by torchvision."""

import numpy as np
import pytest
import torchvision

from fastmoco.errors import DataError
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.stl10 import open_stl10

NAMES = ["airplane", "bird", "car", "cat", "deer", "dog", "horse", "monkey", "ship", "truck"]
LABELS = {"train": [1, 10, 3], "test": [2, 2, 9, 1]}
SEEDS = {"train": 1, "test": 2, "unlabeled": 3}


def write(folder, noise):
    """Write the three splits; return their images as (N, 96, 96, 3)."""
    folder.mkdir(parents=True)
    images = {
        split: noise(len(numbers), 96, 96, 3, seed=SEEDS[split])
        for split, numbers in LABELS.items()
    }
    images["unlabeled"] = noise(2, 96, 96, 3, seed=SEEDS["unlabeled"])
    for split, array in images.items():
        with (folder / f"{split}_X.bin").open("wb") as stream:
            for image in array:
                for channel in range(3):
                    for column in range(96):
                        stream.write(image[:, column, channel].tobytes())
    for split, numbers in LABELS.items():
        np.array(numbers, dtype=np.uint8).tofile(folder / f"{split}_y.bin")
    (folder / "class_names.txt").write_text("\n".join(NAMES) + "\n")
    return images


def test_images_and_labels_come_back(tmp_path, noise, to_pixels):
    images = write(tmp_path / "stl10_binary", noise)
    for path in (tmp_path, tmp_path / "stl10_binary"):
        assert recognize(path) == "stl10"
        found = open_sources(path)
        assert list(found) == ["train", "test", "unlabeled"]
        for split, source in found.items():
            np.testing.assert_array_equal(to_pixels(source), images[split])
        assert found["train"].labels.tolist() == [0, 9, 2]
        assert found["test"].labels.tolist() == [1, 1, 8, 0]
        assert found["train"].classes == NAMES
        assert found["unlabeled"].labels.tolist() == [-1, -1] and not found["unlabeled"].classes
        assert found["test"].names[3] == "test_X/00003"


def test_torchvision_reads_the_same(tmp_path, noise, to_pixels, monkeypatch):
    write(tmp_path / "stl10_binary", noise)
    monkeypatch.setattr(torchvision.datasets.stl10, "check_integrity", lambda *_: True)
    for split, source in open_stl10(tmp_path).items():
        theirs = torchvision.datasets.STL10(str(tmp_path), split=split)
        np.testing.assert_array_equal(to_pixels(source), theirs.data.transpose(0, 2, 3, 1))
        assert source.labels.tolist() == theirs.labels.astype(np.int8).tolist()
        assert not source.classes or source.classes == theirs.classes


def test_the_images_stay_on_the_disk(tmp_path, noise):
    write(tmp_path / "stl10_binary", noise)
    array = open_stl10(tmp_path)["unlabeled"].inputs.array
    while not isinstance(array, np.memmap):
        assert array.base is not None, "a copy of everything"
        array = array.base


def test_splits_that_are_absent_are_not_missed(tmp_path, noise):
    folder = tmp_path / "stl10_binary"
    write(folder, noise)
    (folder / "unlabeled_X.bin").unlink()
    (folder / "test_X.bin").unlink()
    assert list(open_stl10(tmp_path)) == ["train"]
    (folder / "train_X.bin").unlink()
    with pytest.raises(DataError, match=r"holds none of train_X\.bin"):
        open_stl10(tmp_path)


def test_unlabelled_needs_no_labels(tmp_path, noise):
    folder = tmp_path / "stl10_binary"
    write(folder, noise)
    for name in ("train_y.bin", "test_y.bin", "class_names.txt"):
        (folder / name).unlink()
    assert set(open_stl10(folder, unlabelled=True)["train"].labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("name", "change", "words"),
    [
        ("train_X.bin", lambda b: b[:-1], "82943 bytes, no whole number of records of 27648"),
        ("unlabeled_X.bin", lambda b: b"", "unlabeled_X.bin is empty"),
        ("test_y.bin", lambda b: b[:-1], "3 labels for 4 images"),
        ("test_y.bin", lambda b: b"\x0b" + b[1:], "label 10 lies outside 0..9"),
        ("test_y.bin", lambda b: b"\0" + b[1:], "0 is no label; they run from 1"),
        ("test_y.bin", None, "test_y.bin is missing.*--unlabelled"),
        ("class_names.txt", None, "class_names.txt is missing.*--unlabelled"),
        ("class_names.txt", lambda b: b"one\ntwo", "lies outside 0..1"),
    ],
)
def test_damage_is_refused(tmp_path, noise, name, change, words):
    folder = tmp_path / "stl10_binary"
    write(folder, noise)
    if change:
        (folder / name).write_bytes(change((folder / name).read_bytes()))
    else:
        (folder / name).unlink()
    with pytest.raises(DataError, match=words):
        open_stl10(tmp_path)
