"""What is said beside a number, and what is refused."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.labels import Labelled, labelled_pair
from fastmoco.dataset.shard_set import LABEL_DTYPE, ShardSet, write_labels
from fastmoco.errors import DataError
from fastmoco.evaluate.sanity import cautions, shared
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

MakeImages = Callable[..., Path]
CLASSES = ("ape", "bee", "cow")


def test_sound_sets_and_a_trained_encoder_need_no_words(
    small_set: ShardSet, unseen_set: ShardSet
) -> None:
    assert cautions(Labelled.of(small_set), Labelled.of(unseen_set), step=5) == []
    assert cautions(Labelled.of(small_set), Labelled.of(unseen_set)) == []


def test_an_untrained_encoder_is_told(small_set: ShardSet, unseen_set: ShardSet) -> None:
    found = cautions(Labelled.of(small_set), Labelled.of(unseen_set), step=0)
    assert found == ["this encoder is untrained (step 0)"]


def test_training_images_in_the_test_set_are_counted_and_named(
    small_set: ShardSet, make_images: MakeImages, tmp_path: Path
) -> None:
    source = make_images(tmp_path / "source", CLASSES, 3, (32, 48), "png")
    for name in ("ape/0001.jpg", "cow/0007.jpg"):
        copied = tmp_path / "source" / name.replace(".jpg", "-copy.jpg")
        shutil.copy(small_set.root.parent / "source" / name, copied)
    pack(source, tmp_path / "set", PackOptions())
    test = Labelled.of(ShardSet(tmp_path / "set"))
    ids = shared(Labelled.of(small_set), test)
    names = {test.set.get_name(int(row)) for row in ids}
    assert names == {"ape/0001-copy.jpg", "cow/0007-copy.jpg"}
    (told,) = cautions(Labelled.of(small_set), test)
    assert told.startswith("2 of 11 test images (18.2 %) are in the training set too")
    assert all(name in told for name in names)


def test_a_set_that_is_tested_on_itself_is_told(small_set: ShardSet) -> None:
    (told,) = cautions(Labelled.of(small_set), Labelled.of(small_set))
    assert told.startswith("every one of the 24 test images is in the training set too")


def test_classes_without_images_are_told(small_set: ShardSet, unseen_set: ShardSet) -> None:
    train, test = Labelled.of(small_set), Labelled.of(unseen_set)
    few = test.take(np.flatnonzero(test.labels < 2))
    assert cautions(train, few) == [
        "1 of 3 classes (cow) have no test image: the accuracy is one over the others"
    ]
    less = train.take(np.flatnonzero(train.labels > 0))
    (told,) = cautions(less, test)
    assert told.startswith("1 of 3 classes (ape) have no training image")


def with_table(one: ShardSet, labels: list[int], to: Path) -> ShardSet:
    copied = ShardSet(shutil.copytree(one.root, to))
    rows = np.array([(i, label, 1.0) for i, label in enumerate(labels)], dtype=LABEL_DTYPE)
    write_labels(copied, "mine", rows, ["even", "odd"], "by hand")
    return copied


def test_images_of_one_class_only_are_refused(
    small_set: ShardSet, unseen_set: ShardSet, tmp_path: Path
) -> None:
    one = with_table(unseen_set, [1, 1, 1], tmp_path / "one")
    both = with_table(small_set, [0, 1, 0], tmp_path / "both")
    for pair in ((both, one), (one, both)):
        with pytest.raises(DataError, match=r"are of one class \('odd'\): any guess .* 100 %"):
            labelled_pair(pair[0].root, pair[1].root, "mine")


def test_a_label_without_a_class_is_refused(
    small_set: ShardSet, unseen_set: ShardSet, tmp_path: Path
) -> None:
    odd = ShardSet(shutil.copytree(small_set.root, tmp_path / "odd"))
    table = np.load(odd.root / "samples.npy")
    table["label"][4] = 3
    np.save(odd.root / "samples.npy", table)
    with pytest.raises(DataError, match=r"has a label 3, but only 3 classes"):
        labelled_pair(unseen_set.root, odd.root)
