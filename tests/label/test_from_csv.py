"""Labels that come later: what is written, what is refused, and that nothing half is left."""

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import fastmoco.label.names as station
from fastmoco.dataset.classes import Found, Known
from fastmoco.dataset.labels import Labelled, labelled_pair
from fastmoco.dataset.shard_set import ShardSet, read_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.label.from_csv import label, read_classes
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

Make = Callable[..., Path]
Write = Callable[..., Path]


@pytest.fixture
def flat(make_images: Make, tmp_path: Path) -> ShardSet:
    """A set without labels."""
    pack(make_images(tmp_path / "in", (), 12), tmp_path / "flat", PackOptions())
    return ShardSet(tmp_path / "flat")


@pytest.fixture
def write(tmp_path: Path) -> Write:
    def write(*lines: str) -> Path:
        path = tmp_path / "labels.csv"
        text = "".join(f"{line}\n" for line in lines)
        path.write_bytes(text.encode("utf-8", "surrogateescape"))
        return path

    return write


def refused(one: ShardSet, path: Path, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        label(one.root, path, "mine", **arguments)  # type: ignore[arg-type]
    assert not (one.root / "labels").exists()
    assert caught.value.exit_code == 3
    return str(caught.value)


def test_by_id_with_the_classes_of_the_set(copied: ShardSet, write: Write) -> None:
    done = label(
        copied.root, write("sample,label,weight", "5,cow,1", "3,ape,1.0", "0,cow,"), "mine"
    )
    rows, classes = read_labels(copied, "mine")
    path = copied.root / "labels/mine.npy"
    assert (done.path, done.labels) == (path, 3) and classes == ["ape", "bee", "cow"]
    assert rows.tolist() == [(0, 2, 1.0), (3, 0, 1.0), (5, 2, 1.0)]
    assert "labels.csv, SHA-256" in json.loads(path.with_suffix(".json").read_text())["origin"]


def test_by_name_in_any_order(copied: ShardSet, write: Write) -> None:
    names = [copied.get_name(row) for row in range(24)]
    lines = [f"{i % 3},{name}" for i, name in reversed(list(enumerate(names)))]
    label(copied.root, write("label,name", *lines), "mine")
    assert copied.labels("mine").tolist() == [i % 3 for i in range(24)]


def test_few_names_over_many_chunks(
    copied: ShardSet, write: Write, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "CHUNK", 5)
    rows = [23, 4, 5, 0]
    label(copied.root, write("name,label", *(f"{copied.get_name(r)},bee" for r in rows)), "mine")
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
    found = {
        one.get_name(int(row)): value for row, value, _ in read_labels(one, "mine")[0].tolist()
    }
    assert found == {f"{stem}.jpg": 0, "0001.jpg": 1}


def test_classes_from_the_csv(flat: ShardSet, write: Write) -> None:
    label(flat.root, write("sample,label", "0,b", "1,a", "2,b"), "words")
    assert read_labels(flat, "words")[1] == ["a", "b"]
    assert flat.labels("words").tolist()[:4] == [1, 0, 1, -1]
    label(flat.root, write("sample,label", "0,10", "1,9", "2,100"), "numbers")
    assert read_labels(flat, "numbers")[1] == [str(number) for number in range(101)]
    assert flat.labels("numbers").tolist()[:4] == [10, 9, 100, -1]
    label(flat.root, write("sample,label", "0,1", "1,z"), "given", classes=["x", "y", "z"])
    assert flat.labels("given").tolist()[:3] == [1, 2, -1]


@pytest.mark.parametrize(
    ("names", "value", "by_place", "code"),
    [
        (["0", "1", "10", "2"], "2", True, 3),  # a name, not the place: as folders sort
        (["0", "1", "10", "2"], "3", True, None),
        (["001", "002", "003"], "1", False, 0),  # a spreadsheet drops the zeros
        (["001", "002", "003"], "3.0", False, 2),
        (["1", "01"], "01", False, 1),
        (["1", "01"], "001", False, None),  # could be either
        (["cat", "dog"], "1", False, None),  # no place, unless asked for
        (["cat", "dog"], "1", True, 1),
        (["cat", "dog"], "2", True, None),
        (["caf\u00e9", "x"], "cafe\u0301", False, 0),
        (["caf\u00e9", "cafe\u0301"], "cafe\u0301", False, 1),
        (["caf\u00e9", "cafe\u0301"], "\uff43af\u00e9", False, None),
    ],
)
def test_which_class_is_meant(
    names: list[str], value: str, by_place: bool, code: int | None
) -> None:
    assert Known(names, by_place).code(value) == code


@pytest.mark.parametrize(
    ("values", "classes", "labels"),
    [
        (["2", "0.0", "2.0"], ["0", "1", "2"], [2, 0, 2]),
        (["01", "1", "10"], ["01", "10"], [0, 0, 1]),
        (["b", "a", "1.0"], ["1.0", "a", "b"], [2, 1, 0]),
        (["99999999", "5"], ["5", "99999999"], [1, 0]),
        (["tench, Tinca tinca", "maillot", "maillot, tank suit"], None, [2, 0, 1]),
        (["caf\u00e9", "cafe\u0301"], ["cafe\u0301"], [0, 0]),
    ],
)
def test_classes_of_the_labels(
    values: list[str], classes: list[str] | None, labels: list[int]
) -> None:
    found = Found()
    for value in values:
        found.code(value)
    numbers, names = found.as_classes()
    assert (numbers.tolist(), names) == (labels, classes or sorted(values))


def test_classes_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "classes.txt"
    path.write_text("\ufeffcat\r\n big dog \n", encoding="utf-8")
    assert read_classes(path) == ["cat", "big dog"]
    for content in (b"", b"a\n\nb\n", b"\xff\n"):
        path.write_bytes(content)
        with pytest.raises(UsageError, match=r"classes.txt"):
            read_classes(path)
    with pytest.raises(DataError, match="a name twice"):
        Known(["a", "a"])


def test_a_column_that_is_no_label_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.dataset.classes.MAX_CLASSES", 3)
    found = Found()
    assert [found.code(value) for value in "abca"] == [0, 1, 2, 0]
    with pytest.raises(DataError, match="more than 3 different labels, such as 'd'"):
        found.code("d")


def test_every_fault_is_told_by_its_line(copied: ShardSet, write: Write) -> None:
    known = copied.get_name(3)
    words = refused(
        copied,
        write("name,label", f"{known},ape", "x.jpg,ape", "y.jpg", f"{known},bee"),
    )
    assert "has 3 fault(s), so none of its labels was taken" in words
    assert "line 3: the set has no sample 'x.jpg'" in words
    assert "line 4: has another number of fields" in words
    assert "line 5: names sample 3 again, as line 2 does: an image has one label" in words


@pytest.mark.parametrize(
    ("row", "fault"),
    [
        ("24,ape,1", "there is no sample 24, only 0..23"),
        ("-1,ape,1", "'-1' is no sample number"),
        ("a,ape,1", "'a' is no sample number"),
        ("99999999999999999999,ape,1", "is no sample number"),
        ("1,dog,1", "the label 'dog' is none of 3 classes"),
        ("1,1,1", "the label '1' is none of 3 classes"),
        ("1,\udcff,1", "is not UTF-8"),
        ("1,ape,nan", "the weight 'nan'"),
        ("1,ape,0", "the weight '0': it must be a number above 0"),
        ("1,ape,1e39", "the weight '1e39'"),
        ("1,ape,1e-60", "the weight '1e-60'"),
        ("1,ape,half", "the weight 'half'"),
        ("1,ape", "another number of fields"),
        ("1,ape,1,1", "another number of fields"),
        ("0,ape,1", "names sample 0 again, as line 2 does"),
    ],
)
def test_a_faulty_row(copied: ShardSet, write: Write, row: str, fault: str) -> None:
    words = refused(copied, write("sample,label,weight", "0,ape,1", row))
    assert "1 fault(s)" in words and "line 3: " in words and fault in words


def test_five_faults_are_listed_and_all_counted(copied: ShardSet, write: Write) -> None:
    words = refused(copied, write("sample,label", *(f"{i},ape" for i in range(20, 60))))
    assert "36 fault(s)" in words
    assert [line.split(":")[0] for line in words.splitlines()[1:]] == [
        f"  line {number}" for number in range(6, 11)
    ]


@pytest.mark.parametrize("header", ["label", "name", "weight,label", "0,ape", ""])
def test_other_columns_are_refused(copied: ShardSet, write: Write, header: str) -> None:
    assert "it needs a header with `label`" in refused(copied, write(header, "1,2,3"))


def test_not_a_csv(copied: ShardSet, write: Write, tmp_path: Path) -> None:
    assert "has no rows" in refused(copied, write("sample,label"))
    assert "is not a CSV: line 2" in refused(copied, write("sample,label", '"1,ape'))
    with pytest.raises(DataError, match="cannot be read"):
        label(copied.root, tmp_path / "absent.csv", "mine")


def test_a_name_of_two_samples_is_refused(flat: ShardSet, write: Write) -> None:
    content = flat.root / "names.txt"
    names = content.read_bytes()
    content.write_bytes(names.replace(b"0007", b"0003"))
    words = refused(ShardSet(flat.root), write("name,label", "0003.jpg,a"))
    assert "could be '0003.jpg' or '0003.jpg'" in words


def test_a_taken_name_is_refused_unless_replaced(copied: ShardSet, write: Write) -> None:
    label(copied.root, write("sample,label", "0,ape"), "mine")
    before = (copied.root / "labels/mine.npy").read_bytes()
    with pytest.raises(UsageError, match=r"exists already.*--replace"):
        label(copied.root, write("sample,label", "1,bee"), "mine")
    assert (copied.root / "labels/mine.npy").read_bytes() == before
    with pytest.raises(DataError):
        label(copied.root, write("sample,label", "99,bee"), "mine", replace=True)
    assert copied.labels("mine")[0] == 0
    label(copied.root, write("sample,label", "1,bee"), "mine", replace=True)
    assert copied.labels("mine").tolist()[:2] == [-1, 1]


@pytest.mark.parametrize("name", ["", "../x", "a/b", ".hidden", "a b", "/x"])
def test_a_name_that_leaves_the_set_is_refused(copied: ShardSet, write: Write, name: str) -> None:
    with pytest.raises(UsageError, match="cannot name a label table"):
        label(copied.root, write("sample,label", "0,ape"), name)


def test_a_table_may_lie_outside(copied: ShardSet, write: Write, tmp_path: Path) -> None:
    path = tmp_path / "elsewhere/mine.npy"
    assert label(copied.root, write("sample,label", "0,cow"), str(path)).path == path
    assert copied.labels(path)[0] == 2 and not (copied.root / "labels").exists()


@pytest.mark.parametrize("name", ["x.npy", "x.json"])
def test_a_file_that_is_no_table_is_not_overwritten(
    copied: ShardSet, write: Write, tmp_path: Path, name: str
) -> None:
    theirs = tmp_path / name
    with theirs.open("wb") as stream:
        np.save(stream, np.arange(10))
    before = theirs.read_bytes()
    for replace in (False, True):
        with pytest.raises(UsageError, match="is no label table"):
            label(
                copied.root, write("sample,label", "0,ape"), str(tmp_path / "x.npy"), None, replace
            )
    assert theirs.read_bytes() == before and {p.name for p in tmp_path.glob("x*")} == {name}


def test_a_table_without_its_json_is_not_replaced_unasked(copied: ShardSet, write: Write) -> None:
    label(copied.root, write("sample,label", "0,ape"), "mine")
    (copied.root / "labels/mine.json").unlink()
    with pytest.raises(UsageError, match=r"exists already.*--replace"):
        label(copied.root, write("sample,label", "0,bee"), "mine")
    label(copied.root, write("sample,label", "0,bee"), "mine", replace=True)
    assert copied.labels("mine")[0] == 1


@pytest.mark.parametrize("limit", [0, 250])
def test_a_write_that_fails_leaves_the_table_of_before(
    copied: ShardSet, write: Write, limit: int
) -> None:
    """Under a limit of file sizes, as on a full disk: at the first byte, or in the second file."""
    path = write("sample,label", "1,ape")
    run = f"""
import resource, signal, sys
from fastmoco import cli
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, ({limit}, {limit}))
sys.argv = ["fastmoco", "label", {str(copied.root)!r}, {str(path)!r}, "--name", "mine", "--replace"]
cli.main()
"""
    for table in ({}, {0: 1}):
        found = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True)
        assert found.returncode == 3 and "cannot be written" in found.stderr, found.stderr
        assert "Traceback" not in found.stderr
        if table:
            assert copied.labels("mine")[0] == 1
            assert sorted(p.name for p in (copied.root / "labels").iterdir()) == [
                "mine.json",
                "mine.npy",
            ]
        else:
            assert not list((copied.root / "labels").iterdir())
        label(copied.root, write("sample,label", "0,bee"), "mine", replace=True)
        write("sample,label", "1,ape")


def test_names_as_people_write_them(copied: ShardSet, write: Write) -> None:
    full = copied.get_name(5)
    where = copied.root.parent / "elsewhere"
    for written, folder in (
        (full, None),
        (f"./{full} ", None),
        (full.replace("/", "\\"), None),
        (full.removesuffix(".jpg"), None),
        (f"{where}/{full}", str(where)),
        ("C:\\x\\" + full.replace("/", "\\"), "C:\\x"),
    ):
        path = write("ID;Class;note", f"{written};bee;1")
        done = label(copied.root, path, "mine", replace=True, folder=folder)
        assert np.flatnonzero(copied.labels("mine") == 1).tolist() == [5]
        assert "columns that were not read: 'note'" in done.notes


def test_a_part_of_a_name_counts_if_one_sample_has_it(copied: ShardSet, write: Write) -> None:
    """Every class has a 0003.jpg, but only one sample is of the folder that is named."""
    assert "could be" in refused(copied, write("id,label", "0003,bee"))
    words = refused(copied, write("name,label", "elsewhere/ape/0003.jpg,bee"))
    assert "pass --root elsewhere" in words
    words = refused(copied, write("id,label", *(f"{row},bee" for row in range(24))))
    assert "If these are the numbers of samples in the set, call the column `sample`" in words


def test_numbers_that_are_stems_are_names(make_images: Make, write: Write, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", (), 12)
    for number in range(12):
        (source / f"{number:04d}.jpg").rename(source / f"{number}.jpg")
    pack(source, tmp_path / "set", PackOptions())
    one = ShardSet(tmp_path / "set")
    rows = [f"{number},{number // 4}" for number in range(12)]
    label(one.root, write("id,label", *rows), "mine")
    numbers = [int(one.get_name(row).split(".")[0]) for row in range(12)]
    assert one.labels("mine").tolist() == [number // 4 for number in numbers]


def test_names_match_by_normalization(make_images: Make, write: Write, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", (), 4)
    (source / "0002.jpg").rename(source / "caf\u00e9.jpg")
    pack(source, tmp_path / "set", PackOptions())
    label(tmp_path / "set", write("name,label", "cafe\u0301.jpg,x", "0001.jpg,y"), "mine")
    one = ShardSet(tmp_path / "set")
    (row,) = np.flatnonzero(one.labels("mine") == 0)
    assert one.get_name(row) == "caf\u00e9.jpg"


def test_what_was_left_out_at_packing_is_no_fault(
    make_images: Make, write: Write, tmp_path: Path
) -> None:
    source = make_images(tmp_path / "in", (), 4)
    (source / "0002.jpg").write_bytes(b"no image")
    pack(source, tmp_path / "set", PackOptions())
    rows = [f"{number:04d},{'ab'[number % 2]}" for number in range(4)]
    done = label(tmp_path / "set", write("id,label", *rows), "mine")
    assert done.labels == 3
    assert done.notes == ["1 rows name images that were left out when the set was packed"]


def test_labels_of_another_attribute(copied: ShardSet, write: Write) -> None:
    """None of them is a class of the set: they get classes of their own, by number or name."""
    done = label(copied.root, write("sample,label", "0,0", "1,1", "2,", "3,-1"), "sex")
    assert done.classes == ["0", "1"] and copied.labels("sex").tolist()[:4] == [0, 1, -1, -1]
    assert "classes of its own (0, 1), not the set's (ape, bee, cow)" in done.notes[0]
    assert done.notes[1] == "2 rows have no label (empty or -1)"
    by_place = read_classes(copied.root)
    label(copied.root, write("sample,label", "0,0", "1,2"), "places", by_place)
    assert read_labels(copied, "places")[1] == ["ape", "bee", "cow"]
    told = r"line 3: the label 'dog' is none of 3 classes(?s:.*)--classes FILE"
    with pytest.raises(DataError, match=told):
        label(copied.root, write("sample,label", "0,ape", "1,dog"), "other")


def test_labelled_samples_of_a_table(copied: ShardSet, flat: ShardSet, write: Write) -> None:
    label(copied.root, write("sample,label", "7,cow", "2,ape"), "mine")
    one = Labelled.of(copied, "mine")
    assert (one.ids.tolist(), one.labels.tolist()) == ([2, 7], [0, 2])
    everything = Labelled.of(copied)
    np.testing.assert_array_equal(everything.labels, copied.labels())
    np.testing.assert_array_equal(everything.ids, np.arange(24))
    assert len(Labelled.of(flat).ids) == 0


def test_a_pair_must_agree(copied: ShardSet, flat: ShardSet, write: Write) -> None:
    label(flat.root, write("sample,label", "0,ape", "1,bee"), "mine")
    with pytest.raises(DataError, match=r"differ in their classes \(cow\): .*same --classes"):
        labelled_pair(flat.root, copied.root, "mine")
    classes = copied.manifest.classes
    label(flat.root, write("sample,label", "0,ape", "1,bee"), "mine", classes, replace=True)
    bank, queries = labelled_pair(flat.root, copied.root, "mine")
    assert (len(bank.ids), bank.table, len(queries.ids), queries.table) == (2, "mine", 24, None)
    label(copied.root, write("sample,label", "9,cow"), "mine")
    assert labelled_pair(flat.root, copied.root, "mine")[1].ids.tolist() == [9]
    with pytest.raises(DataError, match="cannot be read"):
        labelled_pair(flat.root, copied.root, "other")
    with pytest.raises(DataError, match="has 0 classes"):
        labelled_pair(flat.root, copied.root)
