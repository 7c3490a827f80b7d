"""ImageNet's tars: a tar of tars and a devkit, made here, read in place and compared."""

import io
import os
import tarfile

import numpy as np
import pytest

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Span
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.base import Reject
from fastmoco.pack.sources.imagenet import open_imagenet

savemat = pytest.importorskip("scipy.io").savemat

WNIDS = ["n01440764", "n02123045", "n03000001"]
# The devkit's own numbers follow no order, and its synsets go on with classes of classes.
SYNSETS = [(1, WNIDS[2], 0), (2, WNIDS[0], 0), (3, WNIDS[1], 0), (4, "n00001740", 3)]
TRUTH = [3, 1, 2, 1]  # of the images 1..4
TRAIN, VAL = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
DEVKIT = "ILSVRC2012_devkit_t12"


def add(archive, name, content):
    info = tarfile.TarInfo(name)
    info.size = len(content)
    archive.addfile(info, io.BytesIO(content))


def tar_of(files, format=tarfile.GNU_FORMAT):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w", format=format) as archive:
        for name, content in files.items():
            add(archive, name, content)
    return stream.getvalue()


def content_of(name):
    return (name * 40).encode()


def train_images(wnid):
    return {f"{wnid}_{n}.JPEG": content_of(f"{wnid}_{n}") for n in (10, 9)}


def val_images():
    return {f"ILSVRC2012_val_{n:08d}.JPEG": content_of(str(n)) for n in (2, 1, 4, 3)}


def devkit_files():
    rows = np.zeros(
        len(SYNSETS),
        dtype=[("ILSVRC2012_ID", "O"), ("WNID", "O"), ("words", "O"), ("num_children", "O")],
    )
    for row, (number, wnid, children) in enumerate(SYNSETS):
        rows[row] = (float(number), wnid, "a word, another", float(children))
    meta = io.BytesIO()
    savemat(meta, {"synsets": rows[:, None]})
    return {
        f"{DEVKIT}/readme.txt": b"hello",
        f"{DEVKIT}/data/meta.mat": meta.getvalue(),
        f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": "".join(
            f"{number}\n" for number in TRUTH
        ).encode(),
    }


def write(root, train=True, val=True, devkit="tar"):
    if train:
        # In an order of its own, as in the published file.
        inner = {f"{wnid}.tar": tar_of(train_images(wnid)) for wnid in reversed(WNIDS)}
        (root / TRAIN).write_bytes(tar_of(inner))
    if val:
        (root / VAL).write_bytes(tar_of(val_images()))
    if devkit == "tar":
        with tarfile.open(root / f"{DEVKIT}.tar.gz", "w:gz") as archive:
            for name, content in devkit_files().items():
                add(archive, name, content)
    elif devkit:
        for name, content in devkit_files().items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_bytes(content)
    return root


def check_train(source, get_bytes, get_labels):
    images = {
        f"{wnid}/{name}": content for wnid in WNIDS for name, content in train_images(wnid).items()
    }
    assert get_bytes(source) == images
    assert list(source.names) == sorted(images)
    assert get_labels(source) == {name: name[:9] for name in images}
    assert source.classes == WNIDS


def check_val(source, get_bytes, get_labels):
    assert get_bytes(source) == val_images()
    assert list(source.names) == sorted(val_images())
    number_of = {number: wnid for number, wnid, _ in SYNSETS}
    assert list(get_labels(source).values()) == [number_of[number] for number in TRUTH]
    assert source.classes == WNIDS


@pytest.mark.parametrize("devkit", ["tar", "folder"])
def test_images_and_labels_come_back(tmp_path, get_bytes, get_labels, devkit):
    write(tmp_path, devkit=devkit)
    assert recognize(tmp_path) == "imagenet"
    before = sorted(path for path in tmp_path.rglob("*"))
    found = open_sources(tmp_path)
    assert list(found) == ["train", "val"]
    check_train(found["train"], get_bytes, get_labels)
    check_val(found["val"], get_bytes, get_labels)
    assert sorted(path for path in tmp_path.rglob("*")) == before, "something was extracted"


def test_images_are_spans_of_the_outer_file(tmp_path):
    found = open_imagenet(write(tmp_path, val=False, devkit=""))["train"]
    whole = (tmp_path / TRAIN).read_bytes()
    for row, name in enumerate(found.names):
        span = found.inputs[row]
        assert isinstance(span, Span) and span.path == str(tmp_path / TRAIN)
        assert whole[span.offset : span.offset + span.size] == content_of(name[10:-5])


@pytest.mark.parametrize("split", ["train", "val"])
def test_one_tar_alone(tmp_path, get_bytes, get_labels, split):
    write(tmp_path)
    path = tmp_path / {"train": TRAIN, "val": VAL}[split]
    assert recognize(path) == "imagenet"
    found = open_sources(path)
    assert list(found) == [split]
    {"train": check_train, "val": check_val}[split](found[split], get_bytes, get_labels)


def test_val_needs_the_devkit_or_no_labels(tmp_path):
    write(tmp_path, train=False, devkit="")
    with pytest.raises(DataError, match=rf"put {DEVKIT}.tar.gz or its folder .*--unlabelled"):
        open_imagenet(tmp_path)
    found = open_imagenet(tmp_path, unlabelled=True)["val"]
    assert found.labels.tolist() == [-1] * 4 and not found.classes


def test_other_classes_in_train_than_in_the_devkit_are_refused(tmp_path):
    write(tmp_path)
    inner = {f"{wnid}.tar": tar_of(train_images(wnid)) for wnid in WNIDS[:2]}
    (tmp_path / TRAIN).write_bytes(tar_of(inner))
    with pytest.raises(DataError, match="not the classes of the devkit"):
        open_imagenet(tmp_path)


def test_what_is_no_image_is_listed(tmp_path):
    inner = {f"{wnid}.tar": tar_of(train_images(wnid)) for wnid in WNIDS}
    inner[f"{WNIDS[0]}.tar"] = tar_of(
        train_images(WNIDS[0]) | {"../up.JPEG": b"x", "notes.txt": b"x", "._a.JPEG": b"x"}
    )
    (tmp_path / TRAIN).write_bytes(tar_of(inner | {"readme.txt": b"x", "../n00000001.zip": b"x"}))
    found = open_imagenet(tmp_path)["train"]
    assert len(found) == 6
    assert found.left_out == [
        Reject("../n00000001.zip", "is not the tar of a class"),
        Reject("n01440764/../up.JPEG", "has a path that leaves the archive"),
        Reject("n01440764/notes.txt", "does not have the extension of an image"),
        Reject("readme.txt", "is not the tar of a class"),
    ]
    (tmp_path / VAL).write_bytes(tar_of(val_images() | {"other.JPEG": b"x"}))
    found = open_imagenet(tmp_path / VAL, unlabelled=True)["val"]
    assert found.left_out == [Reject("other.JPEG", "is not named ILSVRC2012_val_NUMBER.JPEG")]


def claiming(size, name="big.JPEG"):
    info = tarfile.TarInfo(name)
    info.size = size
    return info.tobuf(tarfile.GNU_FORMAT)


@pytest.mark.parametrize("size", [10 * 2**30, 2**62, 1537])
def test_a_nested_header_that_claims_more_than_its_tar_is_refused(tmp_path, size):
    # 1537 bytes would reach into the tar of the next class.
    inner = {f"{wnid}.tar": tar_of(train_images(wnid)) for wnid in WNIDS}
    inner[f"{WNIDS[0]}.tar"] = claiming(size) + bytes(1536)
    (tmp_path / TRAIN).write_bytes(tar_of(inner))
    with pytest.raises(DataError, match=rf"{WNIDS[0]}.tar is damaged \(big.JPEG claims {size}"):
        open_imagenet(tmp_path)


def test_an_outer_header_that_claims_more_than_the_file_is_refused(tmp_path):
    (tmp_path / TRAIN).write_bytes(claiming(10 * 2**30, f"{WNIDS[0]}.tar") + bytes(4096))
    with pytest.raises(DataError, match="is damaged"):
        open_imagenet(tmp_path)


@pytest.mark.parametrize(
    ("inner", "words"),
    [
        ({"n00000001.tar": b""}, "n00000001.tar is damaged"),
        ({"n00000001.tar": b"x" * 1024}, "n00000001.tar is damaged"),
        ({"n00000001.tar": tar_of({})}, "holds no images|is damaged"),
        ({"n00000001.tar": tar_of({"a.txt": b"x"})}, "n00000001.tar holds no images"),
        ({"readme.txt": b"x"}, r"no images of ImageNet \(readme.txt: is not the tar of a class"),
        (
            {
                "n00000001.tar": tar_of({"1.JPEG": b"x"}),
                "./n00000001.tar": tar_of({"2.JPEG": b"x"}),
            },
            "n00000001.tar is there twice",
        ),
        ({"n00000001.tar": tar_of({"1.JPEG": b"x"})}, "single class"),
    ],
)
def test_unsound_train_tars_are_refused(tmp_path, inner, words):
    (tmp_path / TRAIN).write_bytes(tar_of(inner))
    with pytest.raises(DataError, match=words):
        open_imagenet(tmp_path)


def test_cut_tars_are_refused(tmp_path):
    write(tmp_path)
    whole = (tmp_path / TRAIN).read_bytes()
    end = len(whole.rstrip(b"\0"))
    for cut in range(0, end, 1024):
        (tmp_path / TRAIN).write_bytes(whole[:cut])
        with pytest.raises(DataError):
            open_imagenet(tmp_path / TRAIN)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({f"{DEVKIT}/data/meta.mat": b"junk"}, "MATLAB 5 file"),
        ({f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": b"1\n2\n"}, "has 2 labels"),
        (
            {f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": b"1\n4\n1\n1\n"},
            "not the devkit",
        ),
        ({f"{DEVKIT}/data/ILSVRC2012_validation_ground_truth.txt": b"x\n"}, "not the devkit"),
    ],
)
def test_unsound_devkits_are_refused(tmp_path, change, words):
    write(tmp_path, train=False, devkit="folder")
    for name, content in change.items():
        (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=words):
        open_imagenet(tmp_path)


def test_a_devkit_without_its_files_is_refused(tmp_path):
    write(tmp_path, train=False, devkit="")
    with tarfile.open(tmp_path / f"{DEVKIT}.tar.gz", "w:gz") as archive:
        add(archive, f"{DEVKIT}/readme.txt", b"hello")
    with pytest.raises(DataError, match=r"lacks data/meta\.mat"):
        open_imagenet(tmp_path)


def test_the_fingerprint_sees_a_change(tmp_path):
    write(tmp_path)
    before = open_imagenet(tmp_path)["train"].fingerprint()
    os.utime(tmp_path / TRAIN, ns=(1, 1))
    assert open_imagenet(tmp_path)["train"].fingerprint() != before
