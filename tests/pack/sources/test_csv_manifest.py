"""CSV manifests: which rows become which samples, and which files are refused at which line."""

import pytest

from fastmoco.errors import DataError
from fastmoco.pack.sources import open_sources, recognize
from fastmoco.pack.sources.base import Reject
from fastmoco.pack.sources.csv_manifest import open_table


@pytest.fixture
def table(tmp_path, touch):
    """`table(text, *files)`: a manifest and the files beside it."""
    root = tmp_path / "root"

    def write(text, *files):
        touch(root, *files)
        (root / "list.csv").write_bytes(text if isinstance(text, bytes) else text.encode())
        return root / "list.csv"

    return write


def test_rows_become_samples_sorted_by_name(table, get_bytes, get_labels):
    path = table("label,path,note\ndog,b/2.png,x\ncat,a.png,y\n", "a.png", "b/2.png", "c.png")
    assert recognize(path) == "csv"
    found = open_sources(path)
    assert list(found) == [""]
    assert get_labels(found[""]) == {"a.png": "cat", "b/2.png": "dog"}
    assert found[""].labels_from == "the column label"
    assert found[""].notes == ["columns that were not read: 'note'"]
    assert get_bytes(found[""]) == {"a.png": b"a.png", "b/2.png": b"b/2.png"}
    assert found[""].left_out == []


def test_splits_share_their_classes(table, get_labels):
    rows = "1.png,b,train\n2.png,c,train\n3.png,c,val\n4.png,a,val\n"
    found = open_table(table(f"path,label,split\n{rows}", *(f"{n}.png" for n in range(1, 5))))
    assert list(found) == ["train", "val"]
    assert found["train"].classes == found["val"].classes == ["a", "b", "c"]
    assert get_labels(found["train"]) == {"1.png": "b", "2.png": "c"}
    assert found["val"].labels.tolist() == [2, 0]


def test_whole_numbers_keep_their_number(table):
    rows = "path,label\n1.png,3.0\n2.png,0\n3.png,\n4.png,-1\n"
    found = open_table(table(rows, "1.png", "2.png", "3.png", "4.png"))
    assert found[""].labels.tolist() == [3, 0, -1, -1]
    assert found[""].classes == ["0", "1", "2", "3"]


@pytest.mark.parametrize("labels", [("1", "x"), ("01", "02"), ("²", "³"), ("-1.5", "1")])
def test_other_labels_are_names(table, get_labels, labels):
    path = table(f"path,label\n1.png,{labels[0]}\n2.png,{labels[1]}\n", "1.png", "2.png")
    found = open_table(path)[""]
    assert get_labels(found) == {"1.png": labels[0], "2.png": labels[1]}
    assert found.classes == sorted(labels)


def test_without_labels(table):
    for text, unlabelled in (("path\n1.png\n", False), ("path,label\n1.png,a\n", True)):
        found = open_table(table(text, "1.png"), unlabelled)[""]
        assert (found.labels.tolist(), found.classes) == ([-1], [])


def test_quotes_byte_order_marks_and_line_ends(table, get_bytes):
    names = ["a,b.png", 'say "x".png', "two\nlines.png", "é .png"]
    quoted = ['"{}"'.format(name.replace('"', '""')) for name in names]
    text = b"\xef\xbb\xbf" + ("path\r\n" + "\r\n".join([*quoted, "", ""])).encode()
    found = open_table(table(text, *names))[""]
    assert get_bytes(found) == {name: name.encode() for name in names}


def test_missing_are_listed_and_links_followed(table, tmp_path, touch):
    path = table("path\n1.png\n2.png\nlink.png\nout/3.png\nlost.png\nfolder\n", "1.png")
    touch(tmp_path, "elsewhere/3.png")
    (path.parent / "link.png").symlink_to(tmp_path / "elsewhere/3.png")
    (path.parent / "lost.png").symlink_to("nowhere.png")
    (path.parent / "out").symlink_to(tmp_path / "elsewhere")
    (path.parent / "folder").mkdir()
    found = open_table(path)[""]
    assert list(found.names) == ["1.png", "link.png", "out/3.png"]
    assert found.left_out == [
        Reject("2.png", "does not exist"),
        Reject("folder", "is not a regular file"),
        Reject("lost.png", "is a link that leads nowhere"),
    ]


@pytest.mark.parametrize(
    "text",
    [
        "Image_Path;Class\n./a/1.png;x\n.\\b\\2.png;y\n",
        "FILE\tCategory\tnote\na/1.png\tx\t1\nb/2.png\ty\t2\n",
        " path , label \n a/1.png , x \nb/2.png,y\n",
        "id,file name,Class\n7,a/1.png,x\n8,b/2.png,y\n",
        "sep=;\r\npath;label\r\na/1.png;x\r\nb/2.png;y\r\n",
        "path\tlabel\na/1.png\tx\nb/2.png\ty\n".encode("utf-16"),
    ],
)
def test_as_people_write_it(table, get_labels, text):
    found = open_sources(table(text, "a/1.png", "b/2.png"))
    assert get_labels(found[""]) == {"a/1.png": "x", "b/2.png": "y"}


def test_ids_are_stems_of_files(table, get_labels):
    """Of one file each; what is missing is listed, whatever stands before it."""
    path = table("id,label\na/1,x\n2,y\n3,x\n", "a/1.png", "2.jpeg", "3.png", "3.jpg")
    found = open_sources(path)[""]
    assert get_labels(found) == {"a/1.png": "x", "2.jpeg": "y"}
    assert found.left_out == [Reject("3", "does not exist")]


def test_what_is_missing_elsewhere_is_listed(table, get_labels):
    names = ("0.png", "1.png", "2.png", "3.png")
    rows = "".join(f"/elsewhere/{name},{'xy'[place // 2]}\n" for place, name in enumerate(names))
    path = table(f"path,label\n{rows}", "1.png", "2.png")
    found = open_sources(path, folder=path.parent)[""]
    assert get_labels(found) == {"1.png": "x", "2.png": "y"}
    assert found.left_out == [Reject(name, "does not exist") for name in ("0.png", "3.png")]


@pytest.mark.parametrize("where", ["images/", "{root}/images/", "../root/images/", "D:\\img\\"])
def test_another_root(table, tmp_path, get_labels, where):
    """Of a list that lies elsewhere, or was written on another machine."""
    where = where.format(root=tmp_path / "root")
    rows = "".join(f"{where}{name},{name[0]}\n" for name in ("a/1.png", "b/2.png"))
    table("", "images/a/1.png", "images/b/2.png")
    path = tmp_path / "lists/x.csv"
    path.parent.mkdir()
    path.write_text(f"path,label\n{rows}")
    images = tmp_path / "root/images"
    folder = images.parent if where == "images/" else images
    found = get_labels(open_sources(path, folder=folder)[""])
    start = where if where == "images/" else ""
    assert found == {f"{start}a/1.png": "a", f"{start}b/2.png": "b"}
    if where.startswith(("/", "..")):
        with pytest.raises(DataError, match=f"line 2: .* by --root {images}"):
            open_sources(path)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("path,label\n1.png,a|b\n2.png,b\n3.png,a\n", "label 'a|b' is a list: several labels"),
        ("path,label\n1.png,\"['a', 'b']\"\n2.png,a\n3.png,b\n", "several labels"),
        ("path,label\n1.png,a\n1.png,b\n", "line 3: 1.png has another label in line 2: several"),
        ("path,a,b\n1.png,1,0\n2.png,1,1\n", "no column `label`, but 'a', 'b'"),
    ],
)
def test_several_labels_an_image(table, text, words):
    path = table(text, "1.png", "2.png", "3.png")
    with pytest.raises(DataError, match=words):
        open_table(path)
    assert not open_table(path, unlabelled=True)[""].classes, "as the error says"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "must open with a header"),
        ("what,label\n1.png,a\n", "must open with a header.*it opens with: what, label"),
        ("path,path\n1.png,1.png\n", "several columns for the name"),
        ("path,class,target\n1.png,a,1\n", r"several columns for the label .class, target."),
        ("path\n", "lists no images"),
        ("path\n/1.png\n", "line 2: '/1.png' is no path below"),
        ("path\n1.png\n../secret.png\n", "line 3: '../secret.png' is no path below"),
        ("path\na/../../secret.png\n", "line 2: 'a/../../secret.png' is no path below"),
        ("path\n1.png\n\n./1.png\n", "line 4: 1.png stands in line 2 already"),
        ("path,split\n1.png,a\n1.png,b\n", "line 3: 1.png stands in line 2 already"),
        ("path,label\n1.png\n", "line 2: 1 fields, the header has 2"),
        ("path,label\na,b.png,c\n", "line 2: 3 fields, the header has 2; .* needs quotes"),
        ("path,label\n,c\n", "line 2: '' is no path"),
        ("path,split\n1.png,../out\n", "line 2: the split '../out' may hold"),
        ("path,split\n1.png,a\n2.png,\n", "names a split in some lines only"),
        ("path\n2.png\n", r"none of the images is there \(2.png: does not exist\)"),
        ('path\n"1.png\n', "is not a CSV"),
        (b"path,label\n1.png,\xff\n", "is not UTF-8"),
        (b"path\na\0b.png\n", "line 2: 'a.x00b.png' is no path|not a CSV"),
        ("path,label\n1.png,a\n", "single class"),
    ],
)
def test_faults_are_refused_by_line(table, tmp_path, touch, text, words):
    touch(tmp_path, "secret.png")
    with pytest.raises(DataError, match=words):
        open_table(table(text, "1.png"))
