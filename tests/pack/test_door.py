"""What people have, as commands pack it: nothing lost, nothing mislabelled, each remedy works."""

import json
import os
import re
import shlex
import shutil
import tarfile
import zipfile
from collections import Counter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
from PIL import Image, features
from tars import encoded, write_tar

from fastmoco.dataset.shard_set import ShardSet

Make = Callable[..., Path]
Run = Callable[..., tuple[int, str, str]]


def photo(seed: int, format: str = "JPEG") -> bytes:
    image = Image.radial_gradient("L").resize((24 + seed % 7, 24)).convert("RGB")
    return encoded(image, format)


def put(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


def counts(root: Path) -> dict[str, int]:
    """Return the samples of each class of a packed set, "" for those without."""
    shards = ShardSet(root)
    names = [shards.manifest.classes[label] if label >= 0 else "" for label in shards.labels()]
    return dict(Counter(names))


@pytest.fixture
def shard(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., str]:
    """`shard(*arguments, code=0)`: what `fastmoco shard` says, on both streams."""
    monkeypatch.chdir(tmp_path)

    def packed(*arguments: str, code: int = 0) -> str:
        found, out, err = run("shard", *arguments, "--workers", 1)
        assert found == code, out + err
        assert "Traceback" not in err
        return err + out

    return packed


def test_linked_classes_and_class_names_that_are_not_utf8(
    shard: Callable[..., str], run: Run, make_images: Make, tmp_path: Path
) -> None:
    odd = os.fsdecode(b"caf\xe9")
    make_images(tmp_path / "elsewhere", (odd, "horse"))
    make_images(tmp_path / "photos", ("cat",))
    for name in (odd, "horse"):
        (tmp_path / "photos" / name).symlink_to(tmp_path / "elsewhere" / name)
    shutil.copytree(tmp_path / "photos/cat", tmp_path / "photos/twin", copy_function=os.link)
    said = shard("photos", "set")
    assert "4 images are there under more than one name, by links, and packed under each" in said
    assert counts(tmp_path / "set") == {"cat": 4, odd: 4, "horse": 4, "twin": 4}
    for command in ("verify", "inspect"):
        assert run(command, "set")[0] == 0


@pytest.mark.parametrize(
    ("kind", "start", "said"),
    [
        ("jp2", b"\0\0\0\x0cjP  ", "is JPEG 2000"),
        ("NEF", b"II*\0", "is a raw camera file"),
        ("jxl", b"?", "is JPEG XL"),
    ],
)
def test_what_looks_like_an_image_counts_and_the_value_printed_passes(
    shard: Callable[..., str], make_images: Make, tmp_path: Path, kind: str, start: bytes, said: str
) -> None:
    source = make_images(tmp_path / "album", per_class=6)
    for name in ("cat", "dog"):
        for number in range(7):
            put(source / name / f"IMG_{number}.{kind}", start + bytes(90))
        put(source / name / "broken.jpg", b"<html>403</html>")
        put(source / name / "0000.CR2", b"II*\0raw")  # beside 0000.jpg
    errors = shard("album", "set", code=3)
    assert f"left out: 14, each {said}" in errors.split("error:")[0]
    assert "passed over: raw camera files beside their image, 2 (cat/0000.CR2, ...)" in errors
    assert not (tmp_path / "set").exists()
    remedy = re.search(r"--max-rejects (\d+) puts up", errors)
    assert remedy and remedy[1] == "16"
    shard("album", "set", "--max-rejects", "15", code=3)
    shard("album", "set", "--max-rejects", remedy[1])
    assert counts(tmp_path / "set") == {"cat": 6, "dog": 6}


def test_heic_is_read_by_its_extra_or_named(
    shard: Callable[..., str], make_picture: Callable[..., Image.Image], tmp_path: Path
) -> None:
    if find_spec("pillow_heif") is None:
        put(tmp_path / "album/1.jpg", b"\0\0\0\x18ftypheic" + bytes(90))
        put(tmp_path / "album/2.jpg", photo(2))
        said = shard("album", "set")
        assert "'1.jpg' is HEIC, which the extra heif reads: pip install pillow-heif" in said
    else:
        import pillow_heif

        pillow_heif.from_pillow(make_picture(1)).save(tmp_path / "album.heic")
        put(tmp_path / "album/1.HEIC", (tmp_path / "album.heic").read_bytes())
        shard("album", "set", "--max-rejects", "0")
        assert counts(tmp_path / "set") == {"": 1}


def test_content_decides_not_the_name(shard: Callable[..., str], tmp_path: Path) -> None:
    for number, name in enumerate(("a1b2c3", "1.jpg?w=300", "2.jpg_large", "3.heic", "4.JP2", "5")):
        for kind in ("cat", "dog"):
            put(tmp_path / "crawl" / kind / name, photo(number, "PNG" if number % 2 else "JPEG"))
    put(tmp_path / "crawl/cat/checksums", b"no image")
    if "avif" in features.modules and features.check("avif"):  # since Pillow 11.3
        put(tmp_path / "crawl/dog/9.avif", photo(9, "AVIF"))
    else:
        put(tmp_path / "crawl/dog/9.avif", photo(9, "PNG"))
    assert "passed over: files of other kinds, 1 (cat/checksums)" in shard(
        "crawl", "set", "--max-rejects", "0"
    )
    assert counts(tmp_path / "set") == {"cat": 6, "dog": 7}


def test_what_systems_leave_behind_is_passed_over(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    source = make_images(tmp_path / "disk")
    junk = [
        *("@eaDir/x.jpg/THUMB.jpg", "cat/@eaDir/0000.jpg/THUMB.jpg", "__MACOSX/cat/._0000.jpg"),
        *("$RECYCLE.BIN/1.jpg", "#recycle/1.jpg", "@Recycle/1.jpg", ".Trash-1000/files/1.jpg"),
        *("System Volume Information/1.jpg", "lost+found/1.jpg", ".ipynb_checkpoints/1.jpg"),
        *("__pycache__/1.jpg", ".git/1.jpg", "cat/._0000.jpg", "cat/.DS_Store", "cat/Thumbs.db"),
    ]
    for name in junk:
        put(source / name, photo(1))
    for name in ("annotations/a.json", "docs/readme.md", "cat/0000.txt", "dog/clip.mp4"):
        put(source / name, b"x")
    (source / "scripts").mkdir()
    said = shard("disk", "set", "--max-rejects", "0")
    assert f"hidden and system files and folders, {len(junk)} (" in said
    assert "folders without images, 3 (annotations, ...)" in said
    assert "captions and side files, 3 (" in said and "videos, 1 (dog/clip.mp4)" in said
    assert counts(tmp_path / "set") == {"cat": 4, "dog": 4}


def test_both_readings_are_told_and_each_option_works(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "places", ("a/abbey", "a/flat/outdoor", "b/bar"), per_class=2)
    errors = shard("places", "set", code=3)
    readings = re.findall(r"--classes-at (\w+) +gives \d+ classes: (.*)", errors)
    assert dict(readings) == {
        "1": "a, b",
        "2": "abbey, bar, flat",
        "leaf": "abbey, bar, outdoor",
        "path": "a/abbey, a/flat/outdoor, b/bar",
    }
    for at, classes in readings:
        shard("places", f"set_{at}", "--classes-at", at)
        assert ", ".join(sorted(counts(tmp_path / f"set_{at}"))) == classes
    shard("places", "set", "--unlabelled")
    assert counts(tmp_path / "set") == {"": 6}


@pytest.mark.parametrize(
    ("images", "masks", "mode"),
    [
        ("images", "masks", "RGB"),
        ("images", "annotations/trimaps", "RGB"),
        ("JPEGImages", "SegmentationClass", "P"),
        ("photo", "second", "1"),
    ],
)
def test_masks_are_no_class(
    shard: Callable[..., str],
    make_images: Make,
    tmp_path: Path,
    images: str,
    masks: str,
    mode: str,
) -> None:
    make_images(tmp_path / "seg", (images,), per_class=4)
    for path in (tmp_path / "seg" / images).iterdir():
        with Image.open(path) as image:
            mask = encoded(image.convert(mode), "PNG")
            put(tmp_path / "seg" / masks / f"{path.stem}.png", mask)
    errors = shard("seg", "set", code=3)
    remedy = re.search(r"fastmoco shard (\S+) OUT", errors)
    assert remedy and remedy[1] == f"seg/{images}"
    shard(remedy[1], "set")
    assert counts(tmp_path / "set") == {"": 4}
    shard("seg", "both", "--classes-at", "1")
    assert counts(tmp_path / "both") == {images: 4, masks.split("/")[0]: 4}


def test_classes_with_equal_stems_are_no_masks(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "faces", ("with_mask", "without_mask"))
    shard("faces", "set")
    assert counts(tmp_path / "set") == {"with_mask": 4, "without_mask": 4}


def test_unlabelled_keeps_splits_apart(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "d/train", per_class=5)
    make_images(tmp_path / "d/test", per_class=2)
    said = shard("d", "set", "--unlabelled")
    assert said.startswith("split test: 4 images, no labels\nsplit train: 10 images, no labels\n")
    assert counts(tmp_path / "set/train") == {"": 10}


def test_splits_and_what_lies_beside_them(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "d/seg_train", per_class=5)
    make_images(tmp_path / "d/seg_test", ("cat",), per_class=2)
    (tmp_path / "d/seg_test/dog").mkdir()
    make_images(tmp_path / "d", ("figures",), per_class=1)
    said = shard("d", "set")
    assert "split seg_test: 2 images, 2 classes from the names of folders (cat 2, dog 0)" in said
    assert "left out: 1, each lies beside the splits (figures/0000.jpg)" in said
    assert counts(tmp_path / "set/seg_train") == {"cat": 5, "dog": 5}
    assert ShardSet(tmp_path / "set/seg_test").manifest.classes == ["cat", "dog"]


def test_like_numbers_by_the_training_set_and_needs_labels(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "train", ("cafe\u0301", "cat", "dog"))
    make_images(tmp_path / "test", ("caf\u00e9", "dog"), per_class=2)
    (tmp_path / "test/cat").mkdir()
    assert "fill the class or remove the folder" in shard("test", "va", code=3)
    shard("train", "tr")
    assert "without images, 1: cat" in shard("test", "va", "--like", "tr")
    assert counts(tmp_path / "va") == {"cafe\u0301": 2, "dog": 2}
    shard("train", "un", "--unlabelled")
    assert "that set has no labels" in shard("test", "x", "--like", "un", code=2)


def test_a_part_without_images_is_refused_in_words(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "four")
    assert "val gets no image" in shard("four", "s", "--splits", "train=0.9,val=0.1", code=2)
    assert "write NAME=SHARE" in shard("four", "s", "--splits", "a=nan,b=1", code=2)
    shard("four", "s", "--splits", "train=0.75,val=0.25")
    assert counts(tmp_path / "s/val") == {"cat": 1, "dog": 1}


def samples(numbers: range, classes: str = "012") -> list[tuple[str, bytes]]:
    """Return the members of a shard, of three classes in turn."""
    pairs = (
        ((f"{number:04d}.jpg", photo(number)), (f"{number:04d}.cls", classes[number % 3].encode()))
        for number in numbers
    )
    return [member for pair in pairs for member in pair]


def test_shards_of_two_splits_are_two_sets(
    shard: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    write_tar(tmp_path / "wds/set-train-0000.tar", samples(range(6)))
    write_tar(tmp_path / "wds/set-train-0001.tar", samples(range(100, 106)))
    write_tar(tmp_path / "wds/set-val-0000.tar", samples(range(200, 203)))
    code, _, errors = run("index", "wds", "--workers", 1)
    assert code == 2 and "(train 2, val 1)" in errors and "--out DIR" in errors
    assert run("index", "wds", "--out", "DIR", "--workers", 1)[0] == 0
    shard("wds", "set")
    for root in ("DIR", "set"):
        assert counts(tmp_path / root / "train") == {"0": 4, "1": 4, "2": 4}
        assert counts(tmp_path / root / "val") == {"0": 1, "1": 1, "2": 1}
    assert run("verify", "DIR/val", "--full", "--workers", 1)[0] == 0


def test_shards_of_a_split_that_lacks_a_class_are_numbered_as_in_training(
    shard: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    write_tar(tmp_path / "wds/train-0.tar", samples(range(6), "abc"))
    write_tar(tmp_path / "wds/val-0.tar", samples(range(200, 203), "acc"))
    assert run("index", "wds", "--out", "DIR", "--workers", 1)[0] == 0
    shard("wds", "set")
    for root in ("DIR", "set"):
        assert ShardSet(tmp_path / root / "val").manifest.classes == ["a", "b", "c"]
        assert counts(tmp_path / root / "val") == {"a": 1, "c": 2}
    write_tar(tmp_path / "wds/val-1.tar", samples(range(300, 303), "acd"))
    assert "lacks classes of another" in shard("wds", "x", code=3)


def test_shards_that_must_be_reencoded_are_packed_by_the_command_that_is_named(
    shard: Callable[..., str], run: Run, tmp_path: Path
) -> None:
    members = samples(range(12))
    for number in range(100, 111):
        image = Image.new("CMYK", (20, 20), (number, 0, 9, 0))
        members += [(f"{number}.jpg", encoded(image)), (f"{number}.cls", b"1")]
    write_tar(tmp_path / "wds/0.tar", members)
    code, _, errors = run("index", "wds", "--workers", 1)
    assert code == 3 and "11 of 23 images would be left out" in errors
    remedy = re.search(r"fastmoco shard (\S+) OUT", errors)
    assert remedy
    shard(*shlex.split(remedy[1]), "OUT")
    assert counts(tmp_path / "OUT") == {"0": 4, "1": 15, "2": 4}
    assert run("index", "wds", "--max-rejects", 11, "--workers", 1)[0] == 0
    assert counts(tmp_path / "wds") == {"0": 4, "1": 4, "2": 4}


def test_tiny_imagenet_as_it_is_published(shard: Callable[..., str], tmp_path: Path) -> None:
    root, wnids = tmp_path / "tiny", ("n01", "n02", "n03")
    for kind, wnid in enumerate(wnids):
        for number in range(2):
            put(root / f"train/{wnid}/images/{wnid}_{number}.JPEG", photo(kind))
        put(root / f"train/{wnid}/{wnid}_boxes.txt", b"x")
    lines = []
    for number in range(5):
        put(root / f"val/images/val_{number}.JPEG", photo(number))
        put(root / f"test/images/test_{number}.JPEG", photo(number))
        lines.append(f"val_{number}.JPEG\t{wnids[number % 2]}\t0\t0\t9\t9\n")
    put(root / "val/val_annotations.txt", "".join(lines).encode())
    shard("tiny", "set")
    assert counts(tmp_path / "set/train") == {"n01": 2, "n02": 2, "n03": 2}
    assert counts(tmp_path / "set/val") == {"n01": 3, "n02": 2}
    assert counts(tmp_path / "set/test") == {"": 5}
    shard("tiny/train", "tr")
    shard("tiny/val", "va", "--like", "tr")
    assert ShardSet(tmp_path / "va").labels().tolist().count(1) == 2
    assert counts(tmp_path / "va") == {"n01": 3, "n02": 2}


def test_a_class_whose_listed_or_repeated_images_are_gone_stops(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "im", ("cat", "dog"), per_class=3)
    shutil.copytree(tmp_path / "im/cat", tmp_path / "im/twin")
    assert "All images of the class twin came before" in shard("im", "set", "--dedupe", code=3)
    rows = [f"im/{name}/000{n}.jpg,{name}" for name in ("cat", "dog", "cow") for n in range(3)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]))
    said = shard("list.csv", "set", code=3)
    assert "All images of the class cow that list.csv lists are missing" in said
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows[:6], "im/no.jpg,cat"]))
    shard("list.csv", "x", "--max-rejects", "0", code=3)
    assert "left out: 1, each does not exist (im/no.jpg)" in shard("list.csv", "set")


def test_listed_names_match_by_normalization(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "im", ("cafe\u0301", "tea"), per_class=2)
    rows = [f"im/{name}/000{n}.jpg,{name}" for name in ("caf\u00e9", "tea") for n in range(2)]
    (tmp_path / "list.csv").write_text("\n".join(["path,label", *rows]), encoding="utf-8")
    shard("list.csv", "set", "--max-rejects", "0")
    assert counts(tmp_path / "set") == {"caf\u00e9": 2, "tea": 2}


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_metadata_beside_images_as_hugging_face_has_it(
    shard: Callable[..., str], tmp_path: Path, kind: str
) -> None:
    for split, labels in (("train", "cat dog cow cat"), ("test", "dog cat")):
        rows = [{"file_name": f"{n}.jpg", "label": x} for n, x in enumerate(labels.split())]
        for number in range(len(rows) + 1):  # one is not listed
            put(tmp_path / f"hf/{split}/{number}.jpg", photo(number))
        lines = ["file_name,label", *(",".join(row.values()) for row in rows)]
        text = lines if kind == "csv" else map(json.dumps, rows)
        put(tmp_path / f"hf/{split}/metadata.{kind}", "\n".join(text).encode())
    said = shard("hf", "set")
    assert f"3 classes from metadata.{kind} (cat 1, cow 0, dog 1); without images, 1: cow" in said
    assert f"left out: 2, each is not in metadata.{kind} (4.jpg, ...)" in said or "(2.jpg" in said
    assert counts(tmp_path / "set/train") == {"cat": 2, "dog": 1, "cow": 1}
    assert ShardSet(tmp_path / "set/test").labels().tolist().count(2) == 1


def test_json_lines_whose_first_image_has_no_label(
    shard: Callable[..., str], tmp_path: Path
) -> None:
    for number in range(5):
        put(tmp_path / f"flat/{number}.jpg", photo(number))
    lines = [{"file": "0.jpg"}, *({"file": f"{n}.jpg", "label": "ab"[n % 2]} for n in range(1, 5))]
    put(tmp_path / "flat/list.jsonl", "".join(json.dumps(one) + "\n" for one in lines).encode())
    shard("flat/list.jsonl", "set")
    assert counts(tmp_path / "set") == {"": 1, "a": 2, "b": 2}


def test_arrow_and_parquet_as_hugging_face_writes_them(
    shard: Callable[..., str], tmp_path: Path
) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    features = {"label": {"names": ["cat", "dog"], "_type": "ClassLabel"}}
    about = {b"huggingface": json.dumps({"info": {"features": features}}).encode()}
    image = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema([("image", image), ("label", pa.int64())], metadata=about)
    for split, labels in (("train", [0, 1, 1, -1]), ("test", [1, 0])):
        held = [{"bytes": photo(n), "path": f"{n}.jpg"} for n in range(len(labels))]
        table = pa.table({"image": held, "label": labels}, schema=schema)
        (tmp_path / "pq/data").mkdir(parents=True, exist_ok=True)
        pq.write_table(table, tmp_path / f"pq/data/{split}-00000-of-00001.parquet")
        (tmp_path / "disk" / split).mkdir(parents=True)
        file = tmp_path / f"disk/{split}/data-00000-of-00001.arrow"
        with pa.OSFile(str(file), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
            stream.write_table(table)
    for source in ("pq", "disk"):
        shard(source, f"set_{source}")
        assert counts(tmp_path / f"set_{source}/train") == {"cat": 1, "dog": 2, "": 1}
        assert counts(tmp_path / f"set_{source}/test") == {"cat": 1, "dog": 1}
    names = {ShardSet(tmp_path / "set_pq/test").get_name(row) for row in range(2)}
    assert names == {"0.jpg", "1.jpg"}
    held = [{"bytes": photo(n) if n < 2 else None, "path": f"{n}.jpg"} for n in range(3)]
    for wrong, words in ((99, "label 99 lies outside 0..1"), (2**40, f"{2**40} is no label")):
        table = pa.table({"image": held, "label": [0, 1, wrong]}, schema=schema)
        pq.write_table(table, tmp_path / "odd-00000-of-00001.parquet")
        assert words in shard("odd-00000-of-00001.parquet", "x", code=3), "of no image, and yet"
    put(tmp_path / "bad-00000-of-00001.parquet", b"PAR1" + bytes(40) + b"PAR1")
    assert "cannot be read" in shard("bad-00000-of-00001.parquet", "x", code=3)


def test_archives_as_other_systems_make_them(
    shard: Callable[..., str], make_images: Make, tmp_path: Path
) -> None:
    make_images(tmp_path / "src/data/train", per_class=3)
    make_images(tmp_path / "src/data/test", per_class=2)
    with tarfile.open(tmp_path / "d.tar", "w") as tar:
        tar.add(tmp_path / "src", "./top")
    with zipfile.ZipFile(tmp_path / "w.zip", "w") as archive:
        for path in sorted((tmp_path / "src").rglob("*.jpg")):
            info = zipfile.ZipInfo("x")
            info.filename = str(path.relative_to(tmp_path)).replace("/", "\\")
            archive.writestr(info, path.read_bytes())
    for source in ("d.tar", "w.zip"):
        shard(source, f"set_{source}")
        assert counts(tmp_path / f"set_{source}/train") == {"cat": 3, "dog": 3}
        assert counts(tmp_path / f"set_{source}/test") == {"cat": 2, "dog": 2}
    for name, start, tool in (
        ("x.7z", b"7z\xbc\xaf\x27\x1c", "7z x"),
        ("x.rar", b"Rar!", "unrar x"),
    ):
        put(tmp_path / name, start + bytes(40))
        assert f"run `{tool} {name}` first" in shard(name, "x", code=3)
    (tmp_path / "zips").mkdir()
    shutil.move(tmp_path / "w.zip", tmp_path / "zips/w.zip")
    assert "it holds 1 archives (w.zip), pack each by itself" in shard("zips", "x", code=3)


def test_the_names_of_rejects_survive(shard: Callable[..., str], tmp_path: Path) -> None:
    odd = os.fsdecode(b"\xff\xfe.jpg")
    for number in range(3):
        put(tmp_path / f"flat/{number}.jpg", photo(number))
    put(tmp_path / "flat" / odd, b"x")
    shard("flat", "set")
    assert json.loads((tmp_path / "set/rejects.jsonl").read_text())["name"] == odd
