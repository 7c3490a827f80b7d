"""CIFAR as published: files written by hand, read back by us and by torchvision."""

import io
import pickle
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torchvision

from fastmoco.errors import DataError
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.cifar import open_cifar

N = 4  # images a batch
BATCHES = [f"data_batch_{number}" for number in range(1, 6)]
TEN = ["plane", "car", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]
HUNDRED = [f"fine{number:02d}" for number in range(100)]


def planes(batch: int, count: int = N) -> Any:
    return np.random.default_rng(batch).integers(0, 256, (count, 3072), dtype=np.uint8)


def labels(batch: int, classes: int, count: int = N) -> list[int]:
    return [(batch * 3 + row * 7) % classes for row in range(count)]


def pickled(value: Any, protocol: int = 2) -> bytes:
    return pickle.dumps(value, protocol=protocol)


def python2(batch: int, key: str, classes: int) -> bytes:
    """Write a batch as Python 2 did: text and bytes are one type, written as BINSTRING."""

    def text(value: bytes) -> bytes:
        return b"T" + len(value).to_bytes(4, "little") + value

    numbers = b"(l" + b"".join(b"K" + bytes([n]) + b"a" for n in labels(batch, classes))
    minus = b"J\xff\xff\xff\xff"
    dtype = b"cnumpy\ndtype\n(U\x02u1K\x00K\x01tR(K\x03U\x01|NNN" + minus + minus + b"K\x00tb"
    array = b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(K\x00tU\x01btR"
    state = (
        b"(K\x01(K" + bytes([N]) + b"M\x00\x0ct" + dtype + b"\x89" + text(planes(batch).tobytes())
    )
    names = b"(l" + b"".join(text(f"photo_{n}.png".encode()) + b"a" for n in range(N))
    items = text(b"data") + array + state + b"tb" + text(key.encode()) + numbers
    return b"\x80\x02}(" + items + text(b"filenames") + names + b"u."


def ten_python(files: Callable[[int], Any] | None = None, protocol: int = 2) -> dict[str, bytes]:
    def batch(number: int) -> bytes:
        content = {"batch_label": "a batch", "data": planes(number), "labels": labels(number, 10)}
        if files:
            content["filenames"] = files(number)
        return pickled(content, protocol)

    made = {name: batch(number) for number, name in enumerate(BATCHES, 1)}
    meta = {"label_names": TEN, "num_vis": 3072, "num_cases_per_batch": N}
    return {**made, "test_batch": batch(6), "batches.meta": pickled(meta)}


def hundred_python() -> dict[str, bytes]:
    def batch(number: int) -> bytes:
        coarse = labels(number, 20)
        return pickled(
            {"data": planes(number), "fine_labels": labels(number, 100), "coarse_labels": coarse}
        )

    meta = {"fine_label_names": HUNDRED, "coarse_label_names": [f"c{n}" for n in range(20)]}
    return {"train": batch(1), "test": batch(2), "meta": pickled(meta)}


def ten_binary() -> dict[str, bytes]:
    def batch(number: int) -> bytes:
        rows = zip(labels(number, 10), planes(number), strict=True)
        return b"".join(bytes([label]) + row.tobytes() for label, row in rows)

    made = {f"{name}.bin": batch(number) for number, name in enumerate(BATCHES, 1)}
    return {**made, "test_batch.bin": batch(6), "batches.meta.txt": "\n".join([*TEN, ""]).encode()}


def hundred_binary() -> dict[str, bytes]:
    def batch(number: int) -> bytes:
        rows = zip(labels(number, 20), labels(number, 100), planes(number), strict=True)
        return b"".join(bytes([coarse, fine]) + row.tobytes() for coarse, fine, row in rows)

    names = "\n".join([*HUNDRED, "", ""]).encode()
    return {"train.bin": batch(1), "test.bin": batch(2), "fine_label_names.txt": names}


VERSIONS = {
    "cifar-10-batches-py": (ten_python, TEN, [1, 2, 3, 4, 5], [6]),
    "cifar-100-python": (hundred_python, HUNDRED, [1], [2]),
    "cifar-10-batches-bin": (ten_binary, TEN, [1, 2, 3, 4, 5], [6]),
    "cifar-100-binary": (hundred_binary, HUNDRED, [1], [2]),
}


def write(root: Path, folder: str, files: dict[str, bytes]) -> Path:
    (root / folder).mkdir(parents=True)
    for name, content in files.items():
        (root / folder / name).write_bytes(content)
    return root / folder


def write_tar(path: Path, folder: str, files: dict[str, bytes], mode: Any) -> Path:
    with tarfile.open(path, mode) as archive:
        top = tarfile.TarInfo(folder)
        top.type = tarfile.DIRTYPE
        archive.addfile(top)
        for name, content in files.items():
            info = tarfile.TarInfo(f"{folder}/{name}")
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return path


def images(batches: list[int]) -> Any:
    """Return what the planes show, by the definition: red plane first, each in rows."""
    rows = np.concatenate([planes(number) for number in batches])
    return np.stack([rows[:, at : at + 1024].reshape(-1, 32, 32) for at in (0, 1024, 2048)], axis=3)


def numbers(batches: list[int], classes: int) -> list[int]:
    return [label for number in batches for label in labels(number, classes)]


def check_opened(found: Any, folder: str, to_pixels: Any) -> None:
    _, classes, train, test = VERSIONS[folder]
    assert list(found) == ["train", "test"]
    for split, batches in (("train", train), ("test", test)):
        np.testing.assert_array_equal(to_pixels(found[split]), images(batches))
        assert found[split].labels.tolist() == numbers(batches, len(classes))
        assert found[split].classes == classes
        assert len(set(found[split].names)) == len(found[split])


@pytest.mark.parametrize("folder", VERSIONS)
def test_every_version_in_every_form_gives_the_images_and_labels(tmp_path, to_pixels, folder):
    files = VERSIONS[folder][0]()
    inner = write(tmp_path / "data", folder, files)
    forms = [inner, inner.parent]
    forms += [
        write_tar(tmp_path / f"x{suffix}", folder, files, mode)
        for suffix, mode in ((".tar", "w"), (".tar.gz", "w:gz"), (".tgz", "w:gz"))
    ]
    for form in forms:
        assert recognize(form) == "cifar"
        check_opened(open_sources(form), folder, to_pixels)


@pytest.mark.parametrize("protocol", [0, 1, 2, 3, 4])
def test_every_protocol_gives_the_same(tmp_path, to_pixels, protocol):
    folder = "cifar-10-batches-py"
    check_opened(
        open_cifar(write(tmp_path, folder, ten_python(protocol=protocol))), folder, to_pixels
    )


def test_the_pickles_of_python_2_are_read(tmp_path, to_pixels):
    files = ten_python()
    for number, name in enumerate([*BATCHES, "test_batch"], 1):
        files[name] = python2(number, "labels", 10)
        assert pickle.loads(files[name], encoding="latin1")["data"].shape == (N, 3072)
    found = open_cifar(write(tmp_path, "cifar-10-batches-py", files))
    check_opened(found, "cifar-10-batches-py", to_pixels)
    assert found["train"].names[N] == "data_batch_2/photo_0.png"


@pytest.mark.parametrize(
    ("folder", "peer"),
    [
        ("cifar-10-batches-py", torchvision.datasets.CIFAR10),
        ("cifar-100-python", torchvision.datasets.CIFAR100),
    ],
)
def test_torchvision_reads_the_same(tmp_path, monkeypatch, to_pixels, folder, peer):
    monkeypatch.setattr(torchvision.datasets.cifar, "check_integrity", lambda *_: True)
    found = open_cifar(write(tmp_path, folder, VERSIONS[folder][0]()))
    for split in ("train", "test"):
        theirs = peer(str(tmp_path), train=split == "train")
        np.testing.assert_array_equal(to_pixels(found[split]), theirs.data)
        assert found[split].labels.tolist() == theirs.targets
        assert found[split].classes == theirs.classes


def test_names_are_those_of_the_files_made_unique(tmp_path):
    twice = ten_python(files=lambda number: ["a.png", "b.png", "a.png", "c.png"])
    found = open_cifar(write(tmp_path / "1", "cifar-10-batches-py", twice))["train"]
    assert list(found.names)[:5] == [
        "data_batch_1/00000/a.png",
        "data_batch_1/b.png",
        "data_batch_1/00002/a.png",
        "data_batch_1/c.png",
        "data_batch_2/00000/a.png",
    ]
    none = open_cifar(write(tmp_path / "2", "cifar-10-batches-bin", ten_binary()))["train"]
    assert none.names[N + 1] == "data_batch_2/00001"


def test_unlabelled_gives_no_labels(tmp_path):
    found = open_cifar(write(tmp_path, "cifar-100-binary", hundred_binary()), unlabelled=True)
    assert set(found["train"].labels.tolist()) == {-1} and found["train"].classes == []


def test_a_missing_file_is_named(tmp_path):
    folder = write(tmp_path, "cifar-10-batches-py", ten_python())
    (folder / "data_batch_3").unlink()
    with pytest.raises(DataError, match="lacks data_batch_3"):
        open_cifar(folder)


def test_two_versions_in_one_folder_must_be_chosen_from(tmp_path):
    write(tmp_path, "cifar-10-batches-py", ten_python())
    write(tmp_path, "cifar-10-batches-bin", ten_binary())
    with pytest.raises(DataError, match="cifar-10-batches-py, cifar-10-batches-bin: name"):
        open_cifar(tmp_path)


def damaged(**changes: Any) -> dict[str, bytes]:
    content = {"data": planes(2), "labels": labels(2, 10), **changes}
    return ten_python() | {"data_batch_2": pickled(content)}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (damaged(labels=[0, 1, 2, 10]), "label 10 lies outside 0..9"),
        (damaged(labels=[0, 1, 2, 2**32 + 1]), "4294967297 is no label"),
        (damaged(labels=[0, 1, 2, -1]), "-1 is no label"),
        (damaged(labels=[0, 1, 2]), "3 labels for 4 images"),
        (damaged(labels=[[0], [1, 2]]), "one whole number an image"),
        (damaged(labels=["a"] * 4), "one whole number an image"),
        (damaged(labels=None), "one whole number an image"),
        (damaged(data=planes(2)[:, :3071]), r"shape \(4, 3071\)"),
        (damaged(data=planes(2).astype(np.int16)), "no sound array"),
        (damaged(data=[1, 2, 3]), "no sound array"),
        (ten_python() | {"batches.meta": pickled({"label_names": "ten"})}, "no list of class"),
        (ten_python() | {"batches.meta": pickled([1])}, "no dictionary"),
        (ten_python() | {"test_batch": b""}, "is empty"),
        (ten_python() | {"test_batch": ten_python()["test_batch"][:-200]}, "damaged"),
        (ten_python() | {"test_batch": b"<html>404"}, "damaged|refused"),
    ],
)
def test_damaged_pickles_are_refused(tmp_path, files, words):
    with pytest.raises(DataError, match=words):
        open_cifar(write(tmp_path, "cifar-10-batches-py", files))


def test_a_cut_binary_is_refused(tmp_path):
    files = ten_binary()
    files["data_batch_4.bin"] = files["data_batch_4.bin"][:-1]
    with pytest.raises(DataError, match=r"data_batch_4.bin has 12291 bytes, no whole number"):
        open_cifar(write(tmp_path, "cifar-10-batches-bin", files))


def test_a_label_beyond_the_classes_of_a_binary_is_refused(tmp_path):
    files = ten_binary()
    files["test_batch.bin"] = b"\x0a" + files["test_batch.bin"][1:]
    with pytest.raises(DataError, match="label 10 lies outside"):
        open_cifar(write(tmp_path, "cifar-10-batches-bin", files))


def test_cut_and_doubled_archives_are_refused(tmp_path):
    folder, files = "cifar-100-python", hundred_python()
    path = write_tar(tmp_path / "x.tar.gz", folder, files, "w:gz")
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(DataError, match="damaged or cut off"):
        open_cifar(path)
    path = write_tar(tmp_path / "x.tar", folder, files, "w")
    path.write_bytes(path.read_bytes()[:20000])
    with pytest.raises(DataError, match="cannot be read as a tar"):
        open_cifar(path)
    write_tar(path, folder, files, "w")
    with tarfile.open(path, "a") as archive:
        archive.addfile(tarfile.TarInfo("other/meta"))
    with pytest.raises(DataError, match="holds meta more than once"):
        open_cifar(path)


def test_an_archive_that_unpacks_to_too_much_is_refused(tmp_path, monkeypatch):
    path = write_tar(tmp_path / "x.tgz", "cifar-100-python", hundred_python(), "w:gz")
    monkeypatch.setattr("fastmoco.pack.sources.small_archive.MAX_UNPACKED", 10000)
    with pytest.raises(DataError, match="unpacks to more than"):
        open_cifar(path)


def test_the_fingerprint_sees_a_changed_batch(tmp_path):
    folder = write(tmp_path, "cifar-10-batches-bin", ten_binary())
    before = open_cifar(folder)["train"].fingerprint()
    content = bytearray((folder / "data_batch_2.bin").read_bytes())
    content[5] ^= 1
    (folder / "data_batch_2.bin").write_bytes(content)
    assert open_cifar(folder)["train"].fingerprint() != before
