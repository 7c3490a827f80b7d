"""One tensor of images, and numbered PNGs with a tensor of labels."""

import io
import pickle

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.errors import DataError
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.base import Reject
from fastmoco.pack.sources.tensor import open_png_tensor, open_tensor

LABELS = [2, 0, 1, 2]


def save(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".pt":
        torch.save(torch.from_numpy(np.ascontiguousarray(array)), path)
    else:
        np.save(path, array)
    return path


def png(array):
    stream = io.BytesIO()
    Image.fromarray(array).save(stream, "PNG")
    return stream.getvalue()


LAYOUTS = {
    "rows": ((4, 5, 7, 3), lambda a: a),
    "planes": ((4, 3, 5, 7), lambda a: np.moveaxis(a, 1, 3)),
    "gray": ((4, 5, 7), lambda a: a),
    "gray plane": ((4, 1, 5, 7), lambda a: a[:, 0]),
    "gray last": ((4, 5, 7, 1), lambda a: a[:, :, :, 0]),
}


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_images_and_labels_come_back(tmp_path, noise, to_pixels, suffix, layout):
    shape, upright = LAYOUTS[layout]
    array = noise(*shape)
    path = save(tmp_path / f"X{suffix}", array)
    for labels in (".npy", ".pt"):
        beside = save(tmp_path / f"X_labels{labels}", np.array(LABELS))
        assert recognize(path) == "tensor"
        found = open_sources(path)[""]
        np.testing.assert_array_equal(to_pixels(found), upright(array))
        assert found.labels.tolist() == LABELS
        assert found.classes == ["0", "1", "2"]
        assert found.names[3] == "X/00003"
        beside.unlink()


@pytest.mark.parametrize(
    ("labels", "classes", "numbers"),
    [
        (np.array([2.0, 0.0, 1.0, 2.0]), ["0", "1", "2"], [2, 0, 1, 2]),
        (np.array([2, np.nan, 1, 2]), ["0", "1", "2"], [2, -1, 1, 2]),
        (np.array([[2], [-1], [1], [2]]), ["0", "1", "2"], [2, -1, 1, 2]),
        (np.array([True, False, True, True]), ["0", "1"], [1, 0, 1, 1]),
        (np.eye(3, dtype=np.uint8)[LABELS], ["0", "1", "2"], LABELS),
        (np.array(["dog", "cat", "", "dog"]), ["cat", "dog"], [1, 0, -1, 1]),
    ],
)
def test_labels_as_people_save_them(tmp_path, noise, labels, classes, numbers):
    np.save(tmp_path / "X_labels.npy", labels)
    found = open_sources(save(tmp_path / "X.npy", noise(4, 5, 7)))[""]
    assert (found.classes, found.labels.tolist()) == (classes, numbers)


def test_alpha_is_dropped(tmp_path, noise, to_pixels):
    array = noise(4, 5, 7, 4)
    for name, stored in (("rows", array), ("planes", np.moveaxis(array, 3, 1))):
        found = open_tensor(save(tmp_path / f"{name}.npy", stored))[""]
        np.testing.assert_array_equal(to_pixels(found), array[..., :3])


def test_arrays_in_columns_come_back(tmp_path, noise, to_pixels):
    array = np.asfortranarray(noise(4, 5, 7, 3))
    found = open_tensor(save(tmp_path / "X.npy", array))[""]
    np.testing.assert_array_equal(to_pixels(found), array)


def test_without_labels(tmp_path, noise):
    path = save(tmp_path / "X.npy", noise(4, 5, 7))
    assert open_tensor(path)[""].labels.tolist() == [-1] * 4
    save(tmp_path / "X_labels.npy", np.array([1, 2]))
    found = open_tensor(path, unlabelled=True)[""]
    assert (found.labels.tolist(), found.classes) == ([-1] * 4, [])


def test_the_images_stay_on_the_disk(tmp_path, noise):
    array = open_tensor(save(tmp_path / "X.npy", noise(4, 3, 5, 7)))[""].inputs.array
    while not isinstance(array, np.memmap):
        assert array.base is not None, "a copy of everything"
        array = array.base


def resident():
    with open("/proc/self/statm") as stream:
        return int(stream.read().split()[1]) * 4096


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_opening_takes_no_memory(tmp_path, suffix):
    path = save(tmp_path / f"X{suffix}", np.ones((1000, 3, 200, 200), dtype=np.uint8))
    before = resident()
    found = open_tensor(path)[""]
    assert found.inputs[999].array.shape == (200, 200, 3)
    assert resident() - before < 40 * 10**6  # of 120 MB


@pytest.mark.parametrize(
    ("array", "words"),
    [
        (np.zeros((4, 3, 5, 7), np.float32), "float32 values.*times 255"),
        (np.zeros((4, 3, 5, 7), np.int64), "int64 values"),
        (np.zeros((4, 3, 5, 7), bool), "bool values"),
        (np.zeros((4, 2, 5, 7), np.uint8), r"shape \(4, 2, 5, 7\)"),
        (np.zeros((5, 7), np.uint8), r"shape \(5, 7\)"),
        (np.zeros((4, 3, 5, 3), np.uint8), "could be two of them"),
        (np.zeros((4, 3, 0, 7), np.uint8), r"shape \(4, 3, 0, 7\)|cannot be read"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_other_arrays_are_refused(tmp_path, suffix, array, words):
    with pytest.raises(DataError, match=words):
        open_tensor(save(tmp_path / f"X{suffix}", array))


@pytest.mark.parametrize(
    ("labels", "words"),
    [
        ([0, 1, 2], "3 labels for 4 images"),
        ([0, 1, 2, -2], "-2 is no label"),
        ([0, 1, 2, 2**40], "1099511627776 is no label"),
        ([0.0, 1.5, 2.0, 1.0], "whole number an image, not float64"),
        ([[0, 1], [1, 2], [0, 1], [1, 0]], "no single 1 in each row"),
        ([[0, 1], [1, 1], [0, 1], [1, 0]], "X_labels.*: several labels an image"),
        ([0, 0, 0, 0], "single class"),
    ],
)
@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_labels_that_do_not_fit_are_refused(tmp_path, noise, suffix, labels, words):
    path = save(tmp_path / "X.npy", noise(4, 5, 7))
    save(tmp_path / f"X_labels{suffix}", np.array(labels))
    with pytest.raises(DataError, match=words):
        open_tensor(path)


def test_two_label_files_are_refused(tmp_path, noise):
    path = save(tmp_path / "X.npy", noise(4, 5, 7))
    for suffix in (".npy", ".pt"):
        save(tmp_path / f"X_labels{suffix}", np.array(LABELS))
    with pytest.raises(DataError, match="both hold labels"):
        open_tensor(path)


class Runs:
    def __init__(self, sentinel):
        self.sentinel = sentinel

    def __reduce__(self):
        import os

        return os.system, (f"touch {self.sentinel}",)


def test_nothing_runs(tmp_path):
    sentinel = tmp_path / "sentinel"
    torch.save(Runs(sentinel), tmp_path / "new.pt")
    torch.save(Runs(sentinel), tmp_path / "old.pt", _use_new_zipfile_serialization=False)
    (tmp_path / "bare.pt").write_bytes(pickle.dumps(Runs(sentinel)))
    np.save(tmp_path / "objects.npy", np.array([Runs(sentinel)], dtype=object), allow_pickle=True)
    (tmp_path / "bare.npy").write_bytes(pickle.dumps(Runs(sentinel)))
    for name in ("new.pt", "old.pt", "bare.pt", "objects.npy", "bare.npy"):
        with pytest.raises(DataError, match="cannot be read as one array"):
            open_tensor(tmp_path / name)
        assert not sentinel.exists(), name


def test_files_that_claim_more_than_they_hold_are_refused(tmp_path, noise):
    path = save(tmp_path / "X.npy", noise(4, 5, 7))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"(4, 5, 7), }" + b" " * 9, b"(4000000000, 5, 7), }"))
    assert len(path.read_bytes()) == len(content) and path.read_bytes() != content
    with pytest.raises(DataError, match=r"cannot be read|claims"):
        open_tensor(path)
    torch.save(torch.zeros(1, dtype=torch.uint8).expand(10**9, 5, 7), tmp_path / "X.pt")
    with pytest.raises(DataError, match="claims 35000000000 bytes"):
        open_tensor(tmp_path / "X.pt")
    torch.save({"images": torch.zeros(4, 5, 7, dtype=torch.uint8)}, tmp_path / "X.pt")
    with pytest.raises(DataError, match="holds a dict"):
        open_tensor(tmp_path / "X.pt")


@pytest.mark.parametrize("suffix", [".npy", ".pt"])
def test_cut_files_are_refused(tmp_path, noise, suffix):
    path = save(tmp_path / f"X{suffix}", noise(4, 5, 7))
    whole = path.read_bytes()
    for cut in (0, 5, 60, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:cut])
        with pytest.raises(DataError):
            open_tensor(path)


# Numbered PNGs


def write_pngs(folder, noise, count=4):
    """Write 0.png ...; return the bytes by name."""
    folder.mkdir(parents=True)
    images = {f"{n}.png": png(noise(6, 8, 3, seed=n)) for n in range(count)}
    for name, content in images.items():
        (folder / name).write_bytes(content)
    return images


@pytest.mark.parametrize(
    ("folder", "beside"),
    [
        ("X", "X_labels.pt"),
        ("X", "X_labels.npy"),
        ("X", "X_label_tensor.pt"),
        ("train_data", "train_label_tensor.pt"),
        ("train_data", "train_data_labels.npy"),
        ("train", "train_label_tensor.pt"),
    ],
)
def test_image_i_has_label_i(tmp_path, noise, get_bytes, monkeypatch, folder, beside):
    # Twelve images: in the order of the names, 10 would come before 2.
    images = write_pngs(tmp_path / folder, noise, 12)
    labels = [(5 * n) % 7 for n in range(12)]
    save(tmp_path / beside, np.array(labels))
    assert recognize(tmp_path / folder) == "png-tensor"
    found = open_sources(tmp_path / folder)[""]
    assert get_bytes(found) == images
    assert list(found.names) == [f"{n}.png" for n in range(12)]
    assert found.labels.tolist() == labels
    assert found.classes == [str(n) for n in range(7)]
    monkeypatch.chdir(tmp_path / folder)
    from pathlib import Path

    assert open_sources(Path("."))[""].labels.tolist() == labels


def test_the_folder_above_gives_the_splits(tmp_path, noise, get_bytes):
    images = {split: write_pngs(tmp_path / split, noise) for split in ("train", "val_data")}
    images["unlabeled"] = write_pngs(tmp_path / "unlabeled", noise, 3)
    write_pngs(tmp_path / "scratch", noise)
    save(tmp_path / "train_label_tensor.pt", np.array([0, 1, 2, 1]))
    save(tmp_path / "val_label_tensor.pt", np.array([3, 0, 1, 1]))
    assert recognize(tmp_path) == "png-tensor"
    found = open_sources(tmp_path)
    assert set(found) == {"train", "val", "unlabeled"}
    assert get_bytes(found["train"]) == images["train"]
    assert get_bytes(found["val"]) == images["val_data"]
    assert get_bytes(found["unlabeled"]) == images["unlabeled"]
    assert found["train"].labels.tolist() == [0, 1, 2, 1]
    assert found["val"].labels.tolist() == [3, 0, 1, 1]
    assert found["train"].classes == found["val"].classes == ["0", "1", "2", "3"]
    assert found["unlabeled"].classes == [] and set(found["unlabeled"].labels.tolist()) == {-1}


def test_a_folder_without_labels_is_an_ordinary_folder(tmp_path, noise):
    write_pngs(tmp_path / "X", noise)
    assert recognize(tmp_path / "X") == "folder"
    assert set(open_png_tensor(tmp_path / "X")[""].labels.tolist()) == {-1}
    save(tmp_path / "X_labels.pt", np.array([0, 1]))
    found = open_png_tensor(tmp_path / "X", unlabelled=True)[""]
    assert (set(found.labels.tolist()), found.classes) == ({-1}, [])


def test_what_is_no_numbered_png_is_listed(tmp_path, noise):
    write_pngs(tmp_path / "X", noise)
    (tmp_path / "X/notes.txt").write_bytes(b"x")
    (tmp_path / "X/a.png").write_bytes(b"x")
    (tmp_path / "X/4.png").symlink_to("/etc/passwd")
    (tmp_path / "X/.hidden").write_bytes(b"x")
    save(tmp_path / "X_labels.npy", np.array(LABELS))
    found = open_png_tensor(tmp_path / "X")[""]
    assert len(found) == 4
    assert found.left_out == [
        Reject("4.png", "is not a regular file"),
        Reject("a.png", "is not a PNG named by its number"),
        Reject("notes.txt", "is not a PNG named by its number"),
    ]


def test_numbers_that_do_not_fit_are_refused(tmp_path, noise):
    folder = tmp_path / "X"
    write_pngs(folder, noise)
    save(tmp_path / "X_labels.npy", np.array([0, 1, 2]))
    with pytest.raises(DataError, match="3 labels for 4 images"):
        open_png_tensor(folder)
    save(tmp_path / "X_labels.npy", np.array(LABELS))
    (folder / "1.png").rename(folder / "4.png")
    with pytest.raises(DataError, match=r"has no 1\.png"):
        open_png_tensor(folder)
    (folder / "04.png").write_bytes(b"x")
    with pytest.raises(DataError, match="have one number"):
        open_png_tensor(folder)


def test_two_folders_of_one_split_and_no_images_are_refused(tmp_path, noise):
    with pytest.raises(DataError, match="no PNGs named by number"):
        open_png_tensor(tmp_path)
    for name in ("train", "train_data"):
        write_pngs(tmp_path / name, noise)
    with pytest.raises(DataError, match="two folders of one split"):
        open_png_tensor(tmp_path)
