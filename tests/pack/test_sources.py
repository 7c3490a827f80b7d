"""Which files are images, which label each has, and which layouts are refused."""

import os
from collections.abc import Callable
from pathlib import Path

import pytest

from fastmoco.errors import DataError, UsageError
from fastmoco.pack.sources import Reject, find_images
from fastmoco.shardset import ShardSet

Make = Callable[..., Path]


def touch(*paths: Path) -> None:
    for path in paths:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")


def test_class_folder_gives_sorted_names_and_labels(tmp_path: Path) -> None:
    touch(tmp_path / "b/2.JPG", tmp_path / "b/deep/er/1.png", tmp_path / "a/9.webp")
    found = find_images(tmp_path)
    assert found.names == ["a/9.webp", "b/2.JPG", "b/deep/er/1.png"]
    assert found.labels == [0, 1, 1]
    assert found.classes == ["a", "b"]
    assert found.left_out == []


def test_names_are_sorted_by_their_bytes(tmp_path: Path) -> None:
    # By code point the astral character comes last too; by UTF-16, as some tools sort, it does not.
    touch(*(tmp_path / f"{stem}.png" for stem in ("é", "Z", "a", "～", "😀")))
    assert [name[0] for name in find_images(tmp_path).names] == ["Z", "a", "é", "～", "😀"]


def test_flat_folder_has_no_labels(tmp_path: Path) -> None:
    touch(tmp_path / "2.png", tmp_path / "1.tiff")
    (tmp_path / "empty").mkdir()
    found = find_images(tmp_path)
    assert (found.names, found.labels, found.classes) == (["1.tiff", "2.png"], [-1, -1], [])


def test_unlabelled_takes_any_layout(tmp_path: Path) -> None:
    touch(tmp_path / "train/1.png", tmp_path / "2.png", tmp_path / "one/x/3.png")
    found = find_images(tmp_path, unlabelled=True)
    assert found.names == ["2.png", "one/x/3.png", "train/1.png"]
    assert set(found.labels) == {-1} and not found.classes


def test_hidden_files_and_folders_do_not_count(tmp_path: Path) -> None:
    touch(tmp_path / "1.png", tmp_path / "._1.png", tmp_path / ".cache/2.png")
    found = find_images(tmp_path)
    assert found.names == ["1.png"] and found.left_out == []


def test_what_is_passed_over_is_listed_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "root"
    touch(root / "ok.png", root / "notes.txt", tmp_path / "outside/secret.png")
    (root / "inner.png").symlink_to(root / "ok.png")
    (root / "leaves.png").symlink_to(tmp_path / "outside/secret.png")
    (root / "folder").symlink_to(tmp_path / "outside")
    (root / "loop.png").symlink_to(root / "loop.png")
    os.mkfifo(root / "pipe.png")
    found = find_images(root)
    assert found.names == ["inner.png", "ok.png"]
    assert found.left_out == [
        Reject("folder", "is a link that leaves the source folder"),
        Reject("leaves.png", "is a link that leaves the source folder"),
        Reject("loop.png", "is not a regular file"),
        Reject("notes.txt", "does not have the extension of an image"),
        Reject("pipe.png", "is not a regular file"),
    ]


def test_a_linked_source_is_followed(tmp_path: Path) -> None:
    touch(tmp_path / "real/1.png")
    (tmp_path / "real/2.png").symlink_to("1.png")
    (tmp_path / "link").symlink_to("real")
    assert find_images(tmp_path / "link").names == ["1.png", "2.png"]


def test_missing_source_and_file_are_usage_errors(tmp_path: Path) -> None:
    touch(tmp_path / "images.zip")
    for path in (tmp_path / "absent", tmp_path / "images.zip"):
        with pytest.raises(UsageError, match="not a folder"):
            find_images(path)


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], "holds no images"),
        (["a.txt"], r"no images \(a.txt: does not have the extension"),
        (["cat/1.png", "cat/2.png"], "single class folder .cat.*100 %.*--unlabelled"),
        (["train/1.png", "Val/2.png"], "holds splits .Val, train.: pack each"),
        (["train/1.png"], "holds splits"),
        (["cat/1.png", "dog/2.png", "3.png"], "beside class folders .3.png.*--unlabelled"),
        (["cat/1.png", "dog/2.png", "cow/x.txt"], "cow holds no images"),
    ],
)
def test_unsound_layouts_are_refused(tmp_path: Path, files: list[str], message: str) -> None:
    touch(*(tmp_path / name for name in files))
    with pytest.raises(DataError, match=message):
        find_images(tmp_path)


def test_like_demands_the_same_classes(tmp_path: Path, small_set: ShardSet) -> None:
    touch(*(tmp_path / name for name in ("cow/1.png", "ape/1.png", "bee/1.png")))
    assert find_images(tmp_path, like=small_set.root).classes == ["ape", "bee", "cow"]
    (tmp_path / "bee").rename(tmp_path / "bear")
    with pytest.raises(DataError, match="missing here bee; unknown there bear"):
        find_images(tmp_path, like=small_set.root)


def test_like_gives_the_numbers(tmp_path: Path, small_set: ShardSet) -> None:
    touch(*(tmp_path / name for name in ("cow/1.png", "ape/1.png", "bee/1.png")))
    other = tmp_path.parent / "renumbered"
    other.mkdir()
    text = (small_set.root / "manifest.json").read_text()
    (other / "manifest.json").write_text(
        text.replace('"ape"', '"?"').replace('"cow"', '"ape"').replace('"?"', '"cow"')
    )
    for shard in small_set.manifest.shards:
        (other / shard.name).symlink_to(small_set.root / shard.name)
    found = find_images(tmp_path, like=other)
    assert found.classes == ["cow", "bee", "ape"]
    assert dict(zip(found.names, found.labels, strict=True))["cow/1.png"] == 0


def test_like_and_unlabelled_exclude_each_other(tmp_path: Path, small_set: ShardSet) -> None:
    touch(tmp_path / "1.png")
    with pytest.raises(UsageError, match="--like"):
        find_images(tmp_path, unlabelled=True, like=small_set.root)
    with pytest.raises(DataError, match="missing here ape, bee, cow"):
        find_images(tmp_path, like=small_set.root)
