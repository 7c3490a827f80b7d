"""Labels of several sets: who keeps a label, and what stands where."""

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.labels import Labelled, labelled_pair, union
from fastmoco.dataset.shard_set import LABEL_DTYPE, ShardSet, write_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack


@pytest.fixture
def pool(make_images: Callable[..., Path], tmp_path: Path) -> ShardSet:
    """A set of 15 images without labels."""
    pack(make_images(tmp_path / "in", (), 15, (36, 28)), tmp_path / "pool", PackOptions())
    return ShardSet(tmp_path / "pool")


def labelled(
    one: ShardSet, rows: list[tuple[int, int, float]], classes: list[str], name: str = "asked"
) -> Labelled:
    write_labels(one, name, np.array(rows, dtype=LABEL_DTYPE), classes, "by hand")
    return Labelled.of(one, name)


def test_sets_and_tables_together(copied: ShardSet, pool: ShardSet, tmp_path: Path) -> None:
    """Against a dictionary of (set, row) that a later table adds to and never changes."""
    twin = ShardSet(shutil.copytree(copied.root, tmp_path / "twin"))  # the same set elsewhere
    parts = [
        labelled(copied, [(7, 1, 1), (2, 0, 3)], ["ape", "bee", "cow"], "first"),
        labelled(pool, [(4, 0, 0.5), (9, 1, 2)], ["cow", "bee"]),
        labelled(twin, [(2, 1, 9), (20, 2, 0.25)], ["ape", "bee", "cow"], "second"),
        labelled(pool, [(9, 0, 7), (0, 1, 1)], ["cow", "ape"], "third"),
    ]
    wanted: dict[tuple[str, int], tuple[str, float]] = {}
    for part in parts:
        for row, label, weight in zip(part.ids, part.labels, part.weights, strict=True):
            key = part.set.manifest.set_id, int(row)
            wanted.setdefault(key, (part.classes[label], float(weight)))
    found = union(*parts)
    assert found.data.set_ids == [copied.manifest.set_id, pool.manifest.set_id]
    assert found.ids.tolist() == [2, 7, 20, 24, 28, 33]
    which, rows = found.data.locate(found.ids)
    assert wanted == {
        (found.data.set_ids[one], int(row)): (found.classes[label], float(weight))
        for one, row, label, weight in zip(which, rows, found.labels, found.weights, strict=True)
    }
    assert [(one.table, one.samples, one.dropped) for one in found.sources] == [
        ("first", 2, 0),
        ("asked", 2, 0),
        ("second", 1, 1),
        ("third", 1, 1),
    ]
    assert union(parts[0]).ids.tolist() == parts[0].ids.tolist()


def test_a_class_of_its_own_is_refused(small_set: ShardSet, pool: ShardSet) -> None:
    more = labelled(pool, [(0, 0, 1), (1, 1, 1)], ["ape", "yak", "zebu"])
    with pytest.raises(DataError, match=r"\(yak\): only asked has these; label them by the names"):
        labelled_pair(small_set.root, small_set.root, None, [more])


def test_one_class_may_come_with_the_others(small_set: ShardSet, pool: ShardSet) -> None:
    """What is refused of one set is not of the union."""
    one = Labelled.of(small_set).take(np.arange(1))
    more = labelled(pool, [(0, (int(one.labels[0]) + 1) % 3, 1)], one.classes)
    assert len(np.unique(union(one, more).labels)) == 2


def test_relative_weights(pool: ShardSet) -> None:
    """Their mean is 1; equal ones are none at all, so that nothing is multiplied."""
    some = labelled(pool, [(0, 0, 1), (1, 1, 2), (2, 0, 6)], ["a", "b"])
    assert some.relative_weights().tolist() == pytest.approx([1 / 3, 2 / 3, 2])  # type: ignore[union-attr]
    assert labelled(pool, [(0, 0, 3), (1, 1, 3)], ["a", "b"], "same").relative_weights() is None
    assert some.take(np.array([1])).relative_weights() is None


def test_so_many_of_each_class(small_set: ShardSet, pool: ShardSet) -> None:
    some = Labelled.of(small_set)
    two, five = (some.draw(count, seed=3) for count in (2, 5))
    assert np.bincount(two.labels).tolist() == [2, 2, 2] and set(two.ids) < set(five.ids)
    assert np.bincount(five.labels).tolist() == [5, 5, 5] and (np.diff(five.ids) > 0).all()
    assert five.labels.tolist() == some.labels[np.isin(some.ids, five.ids)].tolist()
    assert set(two.ids) != set(some.draw(2, seed=4).ids)
    assert dict(two.drawn) == {"per_class": 2, "seed": 3}
    few = labelled(pool, [(i, int(i > 2), 1) for i in range(8)], ["a", "b", "c"])
    with pytest.raises(UsageError, match=r"1 of 3 classes have fewer labels, 'a' has 3: choose"):
        few.draw(4, seed=0)
    assert len(few.draw(3, seed=0).ids) == 6  # a class without any label stays without
