"""Labels that come later: what is written, what is refused, and that nothing half is left."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastmoco.pack.labels as station
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.classes import Classes, read_classes
from fastmoco.pack.labels import label
from fastmoco.pack.options import PackOptions
from fastmoco.pack.writer import pack
from fastmoco.shardset import Labelled, ShardSet, labelled_pair, read_labels

Make = Callable[..., Path]
Write = Callable[..., Path]


@pytest.fixture
def copied(small_set: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy of a set of the classes ape, bee and cow, 8 each, that a test may write to."""
    return ShardSet(Path(shutil.copytree(small_set.root, tmp_path / "copy")))


@pytest.fixture
def flat(make_images: Make, tmp_path: Path) -> ShardSet:
    """A set without labels."""
    pack(make_images(tmp_path / "in", (), 12), tmp_path / "flat", PackOptions())
    return ShardSet(tmp_path / "flat")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: str) -> Path:
        path = tmp_path / "labels.csv"
        path.write_text("".join(f"{line}\n" for line in lines))
        return path

    return write


def refused(one: ShardSet, path: Path, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        label(one.root, path, "mine", **arguments)  # type: ignore[arg-type]
    assert not (one.root / "labels").exists()
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_by_id_with_the_classes_of_the_set(copied: ShardSet, write: Write) -> None:
    path = label(copied.root, write("id,label,weight", "5,cow,0.5", "3,ape,1", "0,2,2"), "mine")
    rows, classes = read_labels(copied, "mine")
    assert path == copied.root / "labels/mine.npy" and classes == ["ape", "bee", "cow"]
    assert rows.tolist() == [(0, 2, 2.0), (3, 0, 1.0), (5, 2, 0.5)]
    assert "labels.csv, SHA-256" in json.loads(path.with_suffix(".json").read_text())["origin"]


def test_by_name_in_any_order(copied: ShardSet, write: Write) -> None:
    names = [copied.name_of(row) for row in range(24)]
    lines = [f"{i % 3},{name}" for i, name in reversed(list(enumerate(names)))]
    label(copied.root, write("label,name", *lines), "mine")
    assert copied.labels("mine").tolist() == [i % 3 for i in range(24)]


def test_few_names_over_many_chunks(
    copied: ShardSet, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "CHUNK", 5)
    rows = [23, 4, 5, 0]
    label(copied.root, write("name,label", *(f"{copied.name_of(r)},bee" for r in rows)), "mine")
    assert np.flatnonzero(copied.labels("mine") == 1).tolist() == sorted(rows)


@pytest.mark.parametrize("stem", ['a,"b"', "a b", "ü 😀", "new\nline", "\udcff\udc80"])
def test_odd_names_find_their_sample(make_images: Make, tmp_path: Path, stem: str) -> None:
    source = make_images(tmp_path / "in", ())
    (source / "0002.jpg").rename(source / f"{stem}.jpg")
    pack(source, tmp_path / "set", PackOptions())
    one = ShardSet(tmp_path / "set")
    path = tmp_path / "labels.csv"
    quoted = stem.replace('"', '""')
    text = f'name,label\n"{quoted}.jpg",x\n0001.jpg,y\n'
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    label(one.root, path, "mine")
    found = {one.name_of(int(row)): value for row, value, _ in read_labels(one, "mine")[0].tolist()}
    assert found == {f"{stem}.jpg": 0, "0001.jpg": 1}


def test_classes_from_the_csv(flat: ShardSet, write: Write) -> None:
    label(flat.root, write("id,label", "0,b", "1,a", "2,b"), "words")
    assert read_labels(flat, "words")[1] == ["a", "b"]
    assert flat.labels("words").tolist()[:4] == [1, 0, 1, -1]
    label(flat.root, write("id,label", "0,10", "1,9", "2,100"), "numbers")
    assert read_labels(flat, "numbers")[1] == [str(number) for number in range(101)]
    assert flat.labels("numbers").tolist()[:4] == [10, 9, 100, -1]
    label(flat.root, write("id,label", "0,1", "1,z"), "given", classes=["x", "y", "z"])
    assert flat.labels("given").tolist()[:3] == [1, 2, -1]


def test_a_number_is_a_name_where_a_class_has_one(flat: ShardSet, write: Write) -> None:
    classes = ["0", "1", "10", "2"]  # as folders sort
    label(flat.root, write("id,label", "0,2", "1,10"), "mine", classes)
    assert flat.labels("mine").tolist()[:2] == [3, 2]
    assert "the label '3' is none of 4 classes" in refused_again(flat, write("id,label", "0,3"))


def refused_again(one: ShardSet, path: Path) -> str:
    with pytest.raises(DataError) as caught:
        label(one.root, path, "other", ["0", "1", "10", "2"])
    return str(caught.value)


def test_classes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat\r\n big dog \n", encoding="utf-8")
    assert read_classes(path) == ["cat", "big dog"]
    for content in (b"", b"a\n\nb\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"classes.txt"):
            read_classes(path)
    with pytest.raises(DataError, match="a name twice"):
        Classes(["a", "a"])


def test_a_column_that_is_no_label_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.pack.classes.MAX_CLASSES", 3)
    found = Classes()
    assert [found.code(value) for value in "abca"] == [0, 1, 2, 0]
    with pytest.raises(DataError, match="more than 3 different labels, such as 'd'"):
        found.code("d")


def test_every_fault_is_told_by_its_line(copied: ShardSet, write: Write) -> None:
    known = copied.name_of(3)
    words = refused(
        copied,
        write("name,label,weight", f"{known},ape,1", "x.jpg,ape,1", "y.jpg,,1", f"{known},ape,1"),
    )
    assert "has 3 fault(s), so no labels were written" in words
    assert "line 3: the set has no sample 'x.jpg'" in words
    assert "line 4: the label is empty" in words
    assert "line 5: names sample 3 again, as line 2 does" in words


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("24,ape,1", "there is no id 24, only 0..23"),
        ("-1,ape,1", "the id '-1' is not that of a sample"),
        ("1.0,ape,1", "the id '1.0' is not that of a sample"),
        ("99999999999999999999,ape,1", "is not that of a sample"),
        ("1,dog,1", "the label 'dog' is none of 3 classes"),
        ("1,3,1", "the label '3' is none of 3 classes"),
        ("1,-1,1", "the label '-1' is none of 3 classes"),
        ("1, ,1", "the label is empty"),
        ("1,ape,nan", "the weight 'nan'"),
        ("1,ape,-1", "the weight '-1'"),
        ("1,ape,", "the weight ''"),
        ("1,ape", "another number of fields"),
        ("1,ape,1,1", "another number of fields"),
        ("0,ape,1", "names sample 0 again, as line 2 does"),
    ],
)
def test_a_faulty_row(copied: ShardSet, write: Write, row: str, fault: str) -> None:
    words = refused(copied, write("id,label,weight", "0,ape,1", row))
    assert "1 fault(s)" in words and "line 3: " in words and fault in words


def test_five_faults_are_listed_and_all_counted(copied: ShardSet, write: Write) -> None:
    words = refused(copied, write("id,label", *(f"{i},ape" for i in range(20, 60))))
    assert "36 fault(s)" in words
    assert [line.split(":")[0] for line in words.splitlines()[1:]] == [
        f"  line {number}" for number in range(6, 11)
    ]


@pytest.mark.parametrize(
    "header", ["label", "id", "id,name,label", "id,label,wieght", "id,id,label", "0,ape", ""]
)
def test_other_columns_are_refused(copied: ShardSet, write: Write, header: str) -> None:
    assert "it needs a header with `label`" in refused(copied, write(header, "1,2,3"))


def test_not_a_csv(copied: ShardSet, write: Write, tmp_path: Path) -> None:
    assert "has no rows" in refused(copied, write("id,label"))
    assert "is not a CSV: line 2" in refused(copied, write("id,label", '"1,ape'))
    with pytest.raises(UsageError, match="cannot be read"):
        label(copied.root, tmp_path / "absent.csv", "mine")


def test_a_name_of_two_samples_is_refused(flat: ShardSet, write: Write) -> None:
    content = flat.root / "names.txt"
    names = content.read_bytes()
    content.write_bytes(names.replace(b"0007", b"0003"))
    assert "names two samples" in refused(ShardSet(flat.root), write("name,label", "0003.jpg,a"))


def test_a_taken_name_is_refused_unless_replaced(copied: ShardSet, write: Write) -> None:
    label(copied.root, write("id,label", "0,ape"), "mine")
    before = (copied.root / "labels/mine.npy").read_bytes()
    with pytest.raises(UsageError, match=r"exists already.*--replace"):
        label(copied.root, write("id,label", "1,bee"), "mine")
    assert (copied.root / "labels/mine.npy").read_bytes() == before
    with pytest.raises(DataError):
        label(copied.root, write("id,label", "99,bee"), "mine", replace=True)
    assert copied.labels("mine")[0] == 0
    label(copied.root, write("id,label", "1,bee"), "mine", replace=True)
    assert copied.labels("mine").tolist()[:2] == [-1, 1]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "/x"])
def test_a_name_that_leaves_the_set_is_refused(copied: ShardSet, write: Write, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a label table"):
        label(copied.root, write("id,label", "0,ape"), name)


def test_a_table_may_lie_outside(copied: ShardSet, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere/mine.npy"
    assert label(copied.root, write("id,label", "0,cow"), str(path)) == path
    assert copied.labels(path)[0] == 2 and not (copied.root / "labels").exists()


def test_a_write_that_fails_leaves_no_table(
    copied: ShardSet, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether it is the first table of the name or replaces another one."""
    import fastmoco.shardset as shardset

    def fail(path: Path) -> None:
        raise OSError("the disk is full")

    for rows in (["0,ape"], ["0,bee"]):
        with monkeypatch.context() as patched:
            patched.setattr(shardset, "sync", fail)
            with pytest.raises(OSError, match="full"):
                label(copied.root, write("id,label", *rows), "mine", replace=True)
        with pytest.raises(DataError, match="cannot be read"):
            copied.labels("mine")
        label(copied.root, write("id,label", "0,ape"), "mine")


def test_labelled_samples_of_a_table(copied: ShardSet, flat: ShardSet, write: Write) -> None:
    label(copied.root, write("id,label", "7,cow", "2,ape"), "mine")
    one = Labelled.of(copied, "mine")
    assert (one.ids.tolist(), one.labels.tolist()) == ([2, 7], [0, 2])
    everything = Labelled.of(copied)
    np.testing.assert_array_equal(everything.labels, copied.labels())
    np.testing.assert_array_equal(everything.ids, np.arange(24))
    assert len(Labelled.of(flat).ids) == 0


def test_a_pair_must_agree(copied: ShardSet, flat: ShardSet, write: Write) -> None:
    label(flat.root, write("id,label", "0,ape", "1,bee"), "mine")
    with pytest.raises(DataError, match=r"differ in their classes \(cow\): .*same --classes"):
        labelled_pair(flat.root, copied.root, "mine")
    classes = copied.manifest.classes
    label(flat.root, write("id,label", "0,ape", "1,bee"), "mine", classes, replace=True)
    bank, queries = labelled_pair(flat.root, copied.root, "mine")
    assert (len(bank.ids), bank.table, len(queries.ids), queries.table) == (2, "mine", 24, None)
    label(copied.root, write("id,label", "9,cow"), "mine")
    assert labelled_pair(flat.root, copied.root, "mine")[1].ids.tolist() == [9]
    with pytest.raises(DataError, match="cannot be read"):
        labelled_pair(flat.root, copied.root, "other")
    with pytest.raises(DataError, match="has 0 classes"):
        labelled_pair(flat.root, copied.root)
