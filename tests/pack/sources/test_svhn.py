"""SVHN: files written by scipy, read back by us and by torchvision."""

import sys

import numpy as np
import pytest
import torchvision

from fastmoco.errors import DataError, UsageError
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.svhn import open_svhn

savemat = pytest.importorskip("scipy.io").savemat
LABELS = {"train": [1, 10, 3], "test": [10, 9], "extra": [5, 6, 7, 8]}


def write(folder, noise, compress=True, kind=np.uint8):
    """Write the three splits; return their images as (N, 32, 32, 3)."""
    folder.mkdir(exist_ok=True)
    images = {}
    for seed, (split, numbers) in enumerate(LABELS.items()):
        images[split] = noise(len(numbers), 32, 32, 3, seed=seed)
        content = {
            "X": np.stack(list(images[split]), axis=3),
            "y": np.array(numbers, dtype=kind)[:, None],
        }
        savemat(folder / f"{split}_32x32.mat", content, do_compression=compress)
    return images


@pytest.mark.parametrize("compress", [True, False])
@pytest.mark.parametrize("kind", [np.uint8, np.float64])
def test_images_and_labels_come_back(tmp_path, noise, to_pixels, compress, kind):
    images = write(tmp_path, noise, compress, kind)
    assert recognize(tmp_path) == "svhn"
    found = open_sources(tmp_path)
    assert list(found) == ["train", "test", "extra"]
    for split, source in found.items():
        np.testing.assert_array_equal(to_pixels(source), images[split])
        assert source.labels.tolist() == [number % 10 for number in LABELS[split]]
        assert source.classes == [str(digit) for digit in range(10)]
    assert found["extra"].names[2] == "extra_32x32/00002"


def test_torchvision_reads_the_same(tmp_path, noise, to_pixels, monkeypatch):
    write(tmp_path, noise)
    monkeypatch.setattr(torchvision.datasets.svhn, "check_integrity", lambda *_: True)
    for split, source in open_svhn(tmp_path).items():
        theirs = torchvision.datasets.SVHN(str(tmp_path), split=split)
        np.testing.assert_array_equal(to_pixels(source), theirs.data.transpose(0, 2, 3, 1))
        assert source.labels.tolist() == theirs.labels.tolist()


def test_one_file_is_a_source_without_splits(tmp_path, noise, to_pixels):
    images = write(tmp_path, noise)
    path = tmp_path / "test_32x32.mat"
    assert recognize(path) == "svhn"
    found = open_sources(path)
    assert list(found) == [""]
    np.testing.assert_array_equal(to_pixels(found[""]), images["test"])


def test_opening_reads_no_image(tmp_path, noise, monkeypatch):
    write(tmp_path, noise)
    read = []
    from fastmoco.pack.sources import svhn

    def watched(path, name, where):
        read.append(name)
        return load(path, name, where)

    load = svhn.load_mat
    monkeypatch.setattr(svhn, "load_mat", watched)
    found = open_svhn(tmp_path)
    assert read == ["y", "y", "y"]
    assert found["train"].inputs[0].array.shape == (32, 32, 3)
    assert found["train"].inputs[1].array.shape == (32, 32, 3)
    assert read == ["y", "y", "y", "X"]


def test_without_scipy_the_error_says_what_to_do(tmp_path, noise, monkeypatch):
    write(tmp_path, noise)
    monkeypatch.setitem(sys.modules, "scipy.io", None)
    with pytest.raises(UsageError, match="pip install scipy"):
        open_svhn(tmp_path)


def test_unlabelled(tmp_path, noise):
    write(tmp_path, noise)
    assert set(open_svhn(tmp_path, unlabelled=True)["test"].labels.tolist()) == {-1}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [11]]}, "the label 11"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [0]]}, "0 is no label"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1.5], [1]]}, "one whole number"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8), "y": [[1], [2], [3]]}, "3 labels for 2"),
        ({"X": np.zeros((32, 32, 3, 2), np.uint8)}, "no variable y"),
        ({"X": np.zeros((16, 32, 3, 2), np.uint8), "y": [[1], [2]]}, r"shape \(16, 32, 3, 2\)"),
        ({"X": np.zeros((32, 32, 3, 2)), "y": [[1], [2]]}, "no uint8 variable X"),
        ({"y": [[1], [2]]}, "no uint8 variable X"),
    ],
)
def test_other_content_is_refused(tmp_path, content, words):
    savemat(tmp_path / "train_32x32.mat", content)
    with pytest.raises(DataError, match=words):
        open_svhn(tmp_path)


def test_an_array_that_claims_ten_gigabytes_is_refused(tmp_path, noise):
    write(tmp_path, noise, compress=False)
    path = tmp_path / "train_32x32.mat"
    sides = np.array([32, 32, 3, 3], dtype="<i4").tobytes()
    claim = np.array([32, 32, 3, 3_500_000], dtype="<i4").tobytes()
    content = path.read_bytes()
    assert content.count(sides) == 1
    path.write_bytes(content.replace(sides, claim))
    with pytest.raises(DataError, match="more than it can hold"):
        open_svhn(path)


def test_cut_files_are_refused_when_opened_or_read(tmp_path, noise):
    write(tmp_path, noise)
    path = tmp_path / "test_32x32.mat"
    whole = path.read_bytes()
    for cut in range(0, len(whole), 700):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            open_svhn(path)[""].inputs[0]
