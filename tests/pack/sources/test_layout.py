"""What the folders in names say: splits and classes, and where they say two things."""

import pytest

from fastmoco.errors import DataError
from fastmoco.pack.sources import open_sources
from fastmoco.pack.understood import understood


@pytest.fixture
def described(tmp_path, touch, get_labels):
    """`described(*names, **options)`: the class of each image by split, "" for none."""

    def describe(*names, **options):
        touch(tmp_path / "SOURCE", *names)
        found = open_sources(tmp_path / "SOURCE", **options)
        return {split: get_labels(source) for split, source in found.items()}

    return describe


def each(*names):
    """Return two images below each folder."""
    return [f"{name}/{number}.png" for name in names for number in (1, 2)]


def test_classes_are_the_first_folders(described):
    found = described("b/1.png", "a/2.png", "a/3.png", "a/x/4.png")
    assert found == {"": {"a/2.png": "a", "a/3.png": "a", "a/x/4.png": "a", "b/1.png": "b"}}


def test_classes_are_numbered_by_bytes(tmp_path, touch):
    touch(tmp_path, *each("é", "z", "A"))
    found = open_sources(tmp_path)[""]
    assert (found.classes, found.labels.tolist()) == (["A", "z", "é"], [0, 0, 1, 1, 2, 2])


@pytest.mark.parametrize(
    "splits",
    [
        ("train", "val", "test"),
        ("Validation", "Training"),
        ("train2017", "val2017"),
        ("train_set", "test_set"),
        ("seg_train", "seg_test"),
        ("train", "eval"),
        ("trainval", "test"),
        ("train_images", "test_images"),
        ("TrainImages", "TestImages"),
        ("cifar-train-000", "cifar-test-000"),
        ("trainA", "trainB", "testA", "testB"),
    ],
)
@pytest.mark.parametrize("unlabelled", [False, True])
def test_siblings_that_all_say_split_are_splits(described, splits, unlabelled):
    names = each(*(f"{split}/{name}" for split in splits for name in "ab"))
    found = described(*names, unlabelled=unlabelled)
    assert set(found) == set(splits)
    for split in splits:
        expected = {name: "" if unlabelled else name.split("/")[1] for name in found[split]}
        assert found[split] == expected and len(expected) == 4


@pytest.mark.parametrize(
    "classes",
    [
        ("train", "bus", "car"),
        ("train_station", "airport"),
        ("train_station", "train_track"),
        ("trainer", "test"),
        ("test", "control"),
        ("positive_test", "negative_test"),
    ],
)
def test_a_class_may_be_called_like_a_split(described, classes):
    found = described(*each(*classes))
    assert list(found) == [""] and set(found[""].values()) == set(classes)


def test_what_lies_beside_splits_of_classes_is_left_out(tmp_path, touch, described):
    names = each("train/a", "train/b", "test/a", "test/b")
    found = described(*names, "figures/1.png", "overview.png")
    assert set(found) == {"train", "test"}
    first = next(iter(open_sources(tmp_path / "SOURCE").values()))
    assert {name: reason for name, reason in first.left_out} == {
        "figures/1.png": "lies beside the splits",
        "overview.png": "lies beside the splits",
    }


def test_splits_below_classes_are_not_mixed_unasked(described):
    names = each(*(f"{name}/{split}" for name in "ab" for split in ("train", "test")))
    with pytest.raises(DataError, match=r"splits \(test, train\) below its folders \(a, b\)"):
        described(*names)
    assert set(described(classes_at="1")[""].values()) == {"a", "b"}


PLACES = each("a/abbey", "a/airfield", "a/flat/outdoor", "b/bar", "b/beach")


def test_two_readings_of_the_depth_stop(described):
    with pytest.raises(DataError) as stop:
        described(*PLACES)
    assert "--classes-at 1    gives 2 classes: a, b" in str(stop.value)
    assert "--classes-at 2    gives 5 classes: abbey, airfield, bar, beach, flat" in str(stop.value)
    assert len(described(*PLACES, unlabelled=True)[""]) == 10


@pytest.mark.parametrize(
    ("at", "classes"),
    [
        ("1", {"a", "b"}),
        ("2", {"abbey", "airfield", "flat", "bar", "beach"}),
        ("leaf", {"abbey", "airfield", "outdoor", "bar", "beach"}),
        ("path", {"a/abbey", "a/airfield", "a/flat/outdoor", "b/bar", "b/beach"}),
    ],
)
def test_the_depth_is_chosen(described, at, classes):
    found = described(*PLACES, classes_at=at)[""]
    assert set(found.values()) == classes
    name = {"1": "a", "2": "flat", "leaf": "outdoor", "path": "a/flat/outdoor"}[at]
    assert found["a/flat/outdoor/1.png"] == name


@pytest.mark.parametrize("at", [None, "leaf", "path"])
def test_a_constant_inner_folder_is_no_level(described, at):
    found = described(*each("a/images", "b/images"), classes_at=at)[""]
    assert set(found.values()) == {"a", "b"}


def test_folders_around_all_and_side_files_do_not_count(described):
    names = each("set/set/images/001.Crow", "set/set/images/002.Wren")
    found = described(*names, "set/README", "set/set/attributes/list.txt")[""]
    assert set(found.values()) == {"001.Crow", "002.Wren"}


def test_a_plain_folder_of_images_is_no_class(described):
    found = described(*each("train/images", "val/images", "test/images"), "train/labels/1.txt")
    assert {split: set(labels.values()) for split, labels in found.items()} == {
        "test": {""},
        "train": {""},
        "val": {""},
    }


def test_numbered_folders_of_img2dataset_are_no_classes(tmp_path, touch, described):
    keys = [f"{shard:05d}/{shard:05d}{n:04d}" for shard in range(2) for n in range(3)]
    found = described(*(f"{key}{end}" for key in keys for end in (".jpg", ".txt", ".json")))
    assert set(found[""].values()) == {""}
    touch(tmp_path / "numbered", *each("00001", "00002"), "readme.txt")
    assert open_sources(tmp_path / "numbered")[""].classes == ["00001", "00002"]


def test_the_test_set_may_lack_classes_of_the_training_set(tmp_path, touch):
    touch(tmp_path, *each("train/a", "train/b", "train/c", "val/c", "val/a"))
    (tmp_path / "val/b").mkdir()
    found = open_sources(tmp_path)
    assert found["val"].classes == ["a", "b", "c"]
    assert found["val"].labels.tolist() == [0, 0, 2, 2]
    assert understood(found)[1] == (
        "split val: 4 images, 3 classes from the names of folders (a 2, b 0, c 2); "
        "without images, 1: b"
    )


def test_names_of_classes_match_by_normalization(tmp_path, touch):
    touch(tmp_path, *each("train/cafe\u0301", "train/the\u0301", "val/caf\u00e9", "val/th\u00e9"))
    found = open_sources(tmp_path)
    assert found["val"].classes == found["train"].classes == ["cafe\u0301", "the\u0301"]
    assert found["val"].labels.tolist() == [0, 0, 1, 1]


@pytest.mark.parametrize(
    "names",
    [
        each("train", "test", "figures"),
        each("train/a", "train/b", "test/a", "test/b", "other/a", "other/b"),
        each("train_station", "test_tube"),
    ],
)
@pytest.mark.parametrize("unlabelled", [False, True])
def test_what_may_be_splits_or_classes_stops(described, names, unlabelled):
    with pytest.raises(DataError, match=r"may be splits or classes: .*--classes-at 1"):
        described(*names, unlabelled=unlabelled)
    found = described(unlabelled=unlabelled, classes_at="1")
    assert set(found[""].values()) == ({""} if unlabelled else {n.split("/")[0] for n in names})


def test_an_image_beside_splits_does_not_make_classes_of_them(described):
    found = described(
        *(f"{split}2017/{n}.png" for split in ("train", "val") for n in "12"), "x.png"
    )
    assert set(found) == {"train2017", "val2017"}


def test_masks_beside_their_images_stop(described):
    names = [f"{kind}/{kind} (1){end}.png" for kind in "ab" for end in ("", "_mask")]
    with pytest.raises(DataError, match=r"masks beside images \(a/a \(1\)_mask.png\)"):
        described(*names)
    assert len(described(classes_at="1")[""]) == 4


@pytest.mark.parametrize(
    ("names", "message"),
    [
        ((*each("a", "b"), *(f"{n}.png" for n in range(5))), "images beside class folders"),
        (each("a"), r"SOURCE has a single class folder \(a\)"),
        (each("train/a", "val/a"), "SOURCE/train has a single class folder"),
        (each("train/a", "train/b", "val/a", "val/c"), r"train, val\) differ .* \(c\)"),
        (each("test/a", "test/b", "val/a", "val/c"), r"test, val\) differ .* \([bc]\)"),
    ],
)
def test_labels_that_would_be_wrong_are_refused(described, names, message):
    with pytest.raises(DataError, match=message):
        described(*names)


def test_a_few_images_beside_class_folders_are_left_out(tmp_path, touch):
    touch(tmp_path, *each("a", "b"), "collage.png")
    found = open_sources(tmp_path)[""]
    assert len(found) == 4
    assert found.left_out == [("collage.png", "lies beside the class folders")]
