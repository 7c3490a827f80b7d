"""Which files of a folder are images, which label each has, and which layouts are refused."""

import os
from pathlib import Path

import pytest

from fastmoco.errors import DataError
from fastmoco.pack.sources.base import Reject
from fastmoco.pack.sources.folder import open_folder


def test_class_folder_gives_sorted_names_labels_and_bytes(tmp_path, touch, get_bytes, get_labels):
    touch(tmp_path, "b/2.JPG", "b/deep/er/1.png", "a/9.webp")
    found = open_folder(tmp_path)
    assert list(found) == [""]
    assert list(found[""].names) == ["a/9.webp", "b/2.JPG", "b/deep/er/1.png"]
    assert get_labels(found[""]) == {"a/9.webp": "a", "b/2.JPG": "b", "b/deep/er/1.png": "b"}
    assert get_bytes(found[""]) == {name: name.encode() for name in found[""].names}
    assert found[""].left_out == []


def test_each_split_folder_is_a_source(tmp_path, touch, get_bytes, get_labels):
    touch(tmp_path, "train/b/1.png", "train/a/1.png", "val/b/2.png", "val/a/3.png", "val/x.txt")
    found = open_folder(tmp_path)
    assert set(found) == {"train", "val"}
    assert get_labels(found["train"]) == {"train/a/1.png": "a", "train/b/1.png": "b"}
    assert get_labels(found["val"]) == {"val/a/3.png": "a", "val/b/2.png": "b"}
    assert get_bytes(found["val"])["val/b/2.png"] == b"val/b/2.png"
    assert found["train"].left_out == found["val"].left_out == []
    passed = {kind: (group.first, group.count) for kind, group in found["train"].passed.items()}
    assert passed == {"captions and side files": ("val/x.txt", 1)}


def test_names_are_sorted_by_their_bytes(tmp_path, touch):
    # By code point the astral character comes last too; by UTF-16, as some tools sort, it does not.
    touch(tmp_path, *(f"{stem}.png" for stem in ("é", "Z", "a", "～", "😀")))
    assert [name[0] for name in open_folder(tmp_path)[""].names] == ["Z", "a", "é", "～", "😀"]


def test_folders_sort_among_files_as_whole_paths_do(tmp_path, touch):
    files = [
        f"{top}/{name}" for top in ("a", "a.b", "a0") for name in ("x.png", "x/1.png", "x0.png")
    ]
    touch(tmp_path, *files, "a.png", "a-.png", "deep/x/y/z/1.png")
    found = list(open_folder(tmp_path, unlabelled=True)[""].names)
    assert found == sorted([*files, "a.png", "a-.png", "deep/x/y/z/1.png"], key=os.fsencode)


def test_a_folder_that_cannot_be_listed_is_named(tmp_path, touch, monkeypatch):
    touch(tmp_path, "a/1.png")
    scandir = os.scandir

    def refuse(path):
        if os.fsdecode(path).rstrip("/").endswith("/a"):
            raise PermissionError(13, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"/a/? cannot be listed: Permission denied"):
        open_folder(tmp_path)


def test_flat_folder_has_no_labels(tmp_path, touch):
    touch(tmp_path, "2.png", "1.tiff")
    (tmp_path / "empty").mkdir()
    found = open_folder(tmp_path)[""]
    assert (list(found.names), found.labels.tolist()) == (["1.tiff", "2.png"], [-1, -1])
    assert found.classes == []


def test_unlabelled_takes_any_layout_as_one(tmp_path, touch):
    touch(tmp_path, "train/1.png", "2.png", "one/x/3.png")
    found = open_folder(tmp_path, unlabelled=True)
    assert list(found[""].names) == ["2.png", "one/x/3.png", "train/1.png"]
    assert set(found[""].labels.tolist()) == {-1} and not found[""].classes


def test_hidden_files_and_folders_do_not_count(tmp_path, touch):
    touch(tmp_path, "1.png", "._1.png", ".cache/2.png")
    found = open_folder(tmp_path)[""]
    assert list(found.names) == ["1.png"] and found.left_out == []
    assert found.passed["hidden and system files and folders"].count == 2


def test_links_are_followed_and_what_is_no_file_is_left_out(tmp_path, touch, get_bytes):
    root = tmp_path / "root"
    touch(tmp_path, "root/ok.png", "elsewhere/there.png", "elsewhere/deep/below.png")
    (root / "alias.png").symlink_to("ok.png")
    (root / "hard.png").hardlink_to(root / "ok.png")
    (root / "linked.png").symlink_to(tmp_path / "elsewhere/there.png")
    (root / "folder").symlink_to(tmp_path / "elsewhere")
    (root / "loop.png").symlink_to("loop.png")
    (root / "gone.png").symlink_to("nowhere.png")
    (root / "gone.txt").symlink_to("nowhere.txt")
    os.mkfifo(root / "pipe.png")
    for up in (root / "up", tmp_path / "elsewhere/deep/back", tmp_path / "elsewhere/self"):
        up.symlink_to(tmp_path if up.name == "up" else tmp_path / "elsewhere")
    found = open_folder(root, unlabelled=True)[""]
    assert get_bytes(found) == {
        "alias.png": b"root/ok.png",
        "folder/deep/below.png": b"elsewhere/deep/below.png",
        "folder/there.png": b"elsewhere/there.png",
        "hard.png": b"root/ok.png",
        "linked.png": b"elsewhere/there.png",
        "ok.png": b"root/ok.png",
    }
    circle = "is a link to a folder that it lies in"
    assert found.left_out == [
        Reject("folder/deep/back", circle),
        Reject("folder/self", circle),
        Reject("gone.png", "is a link to what is not there"),
        Reject("loop.png", "is a link to what is not there"),
        Reject("pipe.png", "is not a regular file"),
        Reject("up", circle),
    ]
    assert found.notes == [
        "3 images are there under more than one name, by links, and packed under each"
    ]


def test_two_folders_that_link_to_each_other_end(tmp_path, touch):
    touch(tmp_path, "a/1.png", "b/2.png")
    (tmp_path / "a/to").symlink_to(tmp_path / "b")
    (tmp_path / "b/to").symlink_to(tmp_path / "a")
    found = open_folder(tmp_path, unlabelled=True)[""]
    assert list(found.names) == ["a/1.png", "a/to/2.png", "b/2.png", "b/to/1.png"]


def test_a_linked_source_is_followed(tmp_path, touch):
    touch(tmp_path, "real/1.png")
    (tmp_path / "real/2.png").symlink_to("1.png")
    (tmp_path / "link").symlink_to("real")
    assert list(open_folder(tmp_path / "link")[""].names) == ["1.png", "2.png"]


def test_a_name_that_is_no_unicode_survives(tmp_path):
    raw = os.path.join(os.fsencode(tmp_path), b"\xff.png")
    Path(os.fsdecode(raw)).write_bytes(b"content")
    found = open_folder(tmp_path)[""]
    assert os.fsencode(found.names[0]) == b"\xff.png"
    assert found.inputs[0].read(100) == b"content"


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["a.txt"], r"no images; it holds 1 captions and side files \(a.txt\)"),
        (["a.jp2"], r"no images \(a.jp2 is JPEG 2000"),
        (["cat/1.png", "cat/2.png"], "single class folder .cat.*100 %.*--unlabelled"),
        (["cat/1.png", "dog/2.png", "3.png", "4.png"], "beside class folders.*--unlabelled"),
        (["cat/1.png", "dog/2.png", "cow/"], "cow holds no images"),
        (["cat/1.png", "dog/2.png", "cow/x.jp2"], "All of the class cow is left out"),
    ],
)
def test_unsound_layouts_are_refused(tmp_path, touch, files, message):
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).mkdir() if name.endswith("/") else touch(tmp_path, name)
    with pytest.raises(DataError, match=message):
        open_folder(tmp_path)


def test_the_fingerprint_sees_a_file_change(tmp_path, touch):
    touch(tmp_path, "1.png", "2.png")
    before = open_folder(tmp_path)[""].fingerprint()
    assert open_folder(tmp_path)[""].fingerprint() == before
    (tmp_path / "2.png").write_bytes(b"other content")
    assert open_folder(tmp_path)[""].fingerprint() != before
