"""Shards that others wrote: read as tarfile, webdataset and DALI read them, and never touched."""

import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import PIL
import pytest
from PIL import Image
from tars import encoded, hashes, write_tar

from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.load.executor import Settings
from fastmoco.load.loader import evaluation_batches
from fastmoco.pack.adopt import AdoptOptions, adopt
from fastmoco.pack.verify import verify

Picture = Callable[..., Image.Image]


def content(one: ShardSet, row: int) -> bytes:
    entry = one.samples[row]
    shard = one.root / one.manifest.shards[int(entry["shard"])].name
    return shard.read_bytes()[int(entry["offset"]) :][: int(entry["size"])]


def rejects(root: Path) -> dict[str, str]:
    lines = (root / "rejects.jsonl").read_text().splitlines()
    return {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}


def names(one: ShardSet) -> list[str]:
    return [one.get_name(row) for row in range(len(one))]


def test_an_adopted_set_is_what_the_tars_hold(folder: Path) -> None:
    before = hashes(folder)
    manifest = adopt(folder)
    assert hashes(folder) == before
    one = ShardSet(folder)
    assert one.manifest == manifest and len(one) == 8 and manifest.options["adopted"] is True
    assert manifest.classes == ["0", "1", "2"] and manifest.class_counts == [4, 2, 2]
    row = 0
    for shard in manifest.shards:
        assert shard.sha256 == before[shard.name]
        with tarfile.open(folder / shard.name) as tar:
            for member in (m for m in tar if m.name.endswith(".jpg")):
                stored = tar.extractfile(member).read()  # type: ignore[union-attr]
                assert one.get_name(row) == f"{shard.name}!{member.name}"
                assert content(one, row) == stored
                digest = hashlib.sha256(stored).digest()[:8]
                assert int(one.samples["hash"][row]).to_bytes(8, "little") == digest
                with Image.open(io.BytesIO(stored)) as image:
                    size = one.samples["width"][row], one.samples["height"][row]
                    assert image.size == size
                label = tar.extractfile(member.name.replace(".jpg", ".cls")).read()  # type: ignore[union-attr]
                assert int(label) == one.samples["label"][row]
                row += 1
    assert sorted(p.name for p in folder.iterdir()) == sorted(
        ["manifest.json", "names.idx.npy", "names.txt", "rejects.jsonl", "samples.npy"]
        + [f"part-{i}.{ext}" for i in range(2) for ext in ("idx", "tar")]
    )
    assert verify(folder, full=True) == []


def test_statistics_are_those_of_the_pixels(folder: Path) -> None:
    manifest = adopt(folder)
    one = ShardSet(folder)
    images = [np.asarray(Image.open(io.BytesIO(content(one, row)))) for row in range(8)]
    pixels = np.concatenate([image.reshape(-1, 3) for image in images]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), rtol=1e-12)


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its streams open
def test_stock_webdataset_sees_the_same(folder: Path) -> None:
    import webdataset as wds

    adopt(folder)
    one = ShardSet(folder)
    paths = [str(folder / shard.name) for shard in one.manifest.shards]
    found = list(wds.WebDataset(paths, shardshuffle=False).to_tuple("jpg", "cls"))
    assert [image for image, _ in found] == [content(one, row) for row in range(8)]
    assert [int(label) for _, label in found] == one.samples["label"].tolist()


def dali_sees(one: ShardSet, ext: list[str]) -> list[list[np.ndarray]]:
    from nvidia.dali import fn, pipeline_def

    shards = [one.root / shard.name for shard in one.manifest.shards]

    @pipeline_def(batch_size=len(one), num_threads=1, device_id=None)
    def read() -> Any:
        found = fn.readers.webdataset(
            paths=[str(path) for path in shards],
            index_paths=[str(path.with_suffix(".idx")) for path in shards],
            ext=ext,
            missing_component_behavior="error",
        )
        return tuple(found) if isinstance(found, list) else found

    pipeline = read()
    pipeline.build()
    return [[np.array(out[i]) for i in range(len(one))] for out in pipeline.run()]


def test_stock_dali_sees_the_same_through_our_index(folder: Path) -> None:
    adopt(folder)
    one = ShardSet(folder)
    images, labels = dali_sees(one, ["jpg", "cls"])
    assert [image.tobytes() for image in images] == [content(one, row) for row in range(8)]
    assert [int(label.tobytes()) for label in labels] == one.samples["label"].tolist()


ODD = [
    "000.jpg",
    "with space.jpg",
    "a.b.c/dots.in.key.jpg",
    "folder/sub/001.jpeg",
    "002.JPG",
    "./003.jpg",
    "ünï 😀.jpg",
    "new\nline.jpg",
    "tab\there.jpg",
    "x" * 150 + ".jpg",
    "deep/" * 40 + "y.jpg",
]


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT])
def test_odd_names_and_long_headers(
    tmp_path: Path, jpeg: Callable[..., bytes], format: int
) -> None:
    images = {name: jpeg(seed) for seed, name in enumerate(ODD)}
    labels = [(str(Path(name).with_suffix(".cls")), b"%d" % i) for i, name in enumerate(ODD)]
    write_tar(tmp_path / "s/a.tar", [*images.items(), *labels], format)  # not adjacent
    before = hashes(tmp_path / "s")
    adopt(tmp_path / "s")
    one = ShardSet(tmp_path / "s")
    assert names(one) == [f"a.tar!{name}" for name in ODD]
    assert [content(one, row) for row in range(len(one))] == list(images.values())
    expected = list(range(len(ODD)))
    expected[ODD.index("./003.jpg")] = -1  # its label is called 003.cls: another folder, by name
    assert one.samples["label"].tolist() == expected
    assert hashes(tmp_path / "s") == before and verify(tmp_path / "s", full=True) == []
    (seen,) = dali_sees(one, ["jpg"])
    assert [image.tobytes() for image in seen] == list(images.values())


def test_names_that_are_not_utf8(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    write_tar(tmp_path / "s/a.tar", [("\udcff.jpg", jpeg(0)), ("b.jpg", jpeg(1))])
    adopt(tmp_path / "s")
    assert names(ShardSet(tmp_path / "s")) == ["a.tar!\udcff.jpg", "a.tar!b.jpg"]
    assert verify(tmp_path / "s", full=True) == []


def test_mixed_formats_go_through_the_loader(tmp_path: Path, make_picture: Picture) -> None:
    picture = make_picture(0)
    images = [
        ("0.jpg", encoded(picture)),
        ("1.jpeg", encoded(picture.convert("L"))),
        ("2.png", encoded(picture, "PNG")),
        ("3.webp", encoded(picture, "WEBP", lossless=True)),
        ("4.jpg", encoded(picture, "PNG")),  # its content decides, not its name
        ("5.JPG", encoded(picture, progressive=True)),
    ]
    write_tar(tmp_path / "s/a.tar", images)
    assert adopt(tmp_path / "s").progressive == 1
    one = ShardSet(tmp_path / "s")
    assert len(one) == 6 and verify(tmp_path / "s", full=True) == []
    look = {"size": 32, "mean": (0.0, 0.0, 0.0), "std": (1.0, 1.0, 1.0), "share": 1.0}
    (batch,) = evaluation_batches(
        ConcatShardSets([one]),
        ids=slice(0, 6),
        batch=6,
        settings=Settings("dali", threads=1),
        **look,
    )
    assert (batch.views[0] - batch.views[0][2:3]).abs().mean(dim=(1, 2, 3))[
        [0, 3, 4, 5]
    ].max() < 0.1


def test_what_cannot_be_read_in_place_is_left_out(
    tmp_path: Path, make_picture: Picture, jpeg: Callable[..., bytes]
) -> None:
    picture = make_picture(0)
    gray16 = Image.fromarray(np.zeros((8, 8), dtype=np.uint16))
    members = [
        ("good.jpg", jpeg(1)),
        ("cmyk.jpg", encoded(picture.convert("CMYK"))),
        ("deep.png", encoded(gray16, "PNG")),
        ("still.gif", encoded(picture, "GIF")),
        ("cut.jpg", jpeg(2)[:-100]),
        ("page.jpg", b"<html>"),
        ("empty.png", b""),
        ("moving.webp", encoded(picture, "WEBP", save_all=True, append_images=[make_picture(1)])),
        ("notes.txt", b"x"),
        ("evil.pkl", b"cos\nsystem\n(S'true'\ntR."),
    ]
    write_tar(tmp_path / "s/a.tar", members)
    manifest = adopt(tmp_path / "s")
    found = rejects(tmp_path / "s")
    assert names(ShardSet(tmp_path / "s")) == ["a.tar!good.jpg"]
    assert set(found) == {f"a.tar!{name}" for name, _ in members[1:-2]}
    assert manifest.rejected == len(found) == 7
    for name, words in (
        ("cmyk.jpg", "re-encoded (JPEG of mode CMYK)"),
        ("deep.png", "re-encoded (PNG of mode I;16)"),
        ("still.gif", "re-encoded (GIF"),
        ("moving.webp", "re-encoded (WEBP"),
        ("page.jpg", "not an image"),
        ("cut.jpg", "cannot be decoded"),
    ):
        assert words in found[f"a.tar!{name}"]


@pytest.mark.parametrize(
    ("format", "how"),
    [
        ("JPEG", "exif"),
        ("PNG", "exif"),
        ("WEBP", "exif"),
        ("JPEG", "little"),
        pytest.param(
            "JPEG",
            "xmp",
            marks=pytest.mark.skipif(
                PIL.__version__ < "11", reason="Pillow 10 has no XMP of a JPEG to compare with"
            ),
        ),
    ],
)
def test_rotated_images_are_kept_and_reported(
    tmp_path: Path, make_picture: Picture, format: str, how: str
) -> None:
    picture, exif = make_picture(0), Image.Exif()
    exif[0x0112] = 6
    raw = exif.tobytes()
    if how == "little":
        raw = b"Exif\0\0II*\0\x08\0\0\0\x01\0\x12\x01\x03\0\x01\0\0\0\x06\0\0\0\0\0\0\0"
    options: dict[str, Any] = {"exif": raw}
    if how == "xmp":
        options = {"xmp": b'<x:xmpmeta tiff:Orientation="6"/>'}
    turned = encoded(picture, format, **options)
    with Image.open(io.BytesIO(turned)) as image:
        assert image.getexif().get(0x0112) == 6
    write_tar(tmp_path / "s/a.tar", [(f"r.{format}", turned), ("plain.jpg", encoded(picture))])
    (tmp_path / "s/a.tar").rename(tmp_path / "s/b.tar")
    write_tar(tmp_path / "s/a.tar", [(f"r.{'jpg' if format == 'JPEG' else format}", turned)])
    manifest = adopt(tmp_path / "s")
    one = ShardSet(tmp_path / "s")
    assert manifest.options["rotated"] == len(one) - 1
    assert manifest.options["rotated_first"][0].startswith("a.tar!r.")
    assert content(one, 0) == turned
    assert (one.samples["width"][0], one.samples["height"][0]) == picture.size
    assert verify(tmp_path / "s", full=True) == []


def test_one_image_a_sample(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    members = [
        ("a.seg.png", encoded(Image.open(io.BytesIO(jpeg(0))), "PNG")),
        ("a.jpg", jpeg(1)),
        ("a.png", encoded(Image.open(io.BytesIO(jpeg(2))), "PNG")),
        ("b.1.jpg", jpeg(3)),
        ("b.2.jpg", jpeg(4)),
        ("b.2.cls", b"1"),
        ("b.cls", b"0"),
    ]
    write_tar(tmp_path / "s/x.tar", members)
    adopt(tmp_path / "s")
    one = ShardSet(tmp_path / "s")
    assert names(one) == ["x.tar!a.jpg", "x.tar!b.1.jpg", "x.tar!b.2.jpg"]
    assert one.samples["label"].tolist() == [-1, 0, 1]
    assert set(rejects(tmp_path / "s")) == {"x.tar!a.seg.png", "x.tar!a.png"}


def test_links_and_devices_are_not_followed(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    root = tmp_path / "s"
    root.mkdir()
    with tarfile.open(root / "a.tar", "w") as tar:
        for kind, name in ((tarfile.SYMTYPE, "link.jpg"), (tarfile.LNKTYPE, "hard.jpg")):
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
        tar.addfile(directory("folder.jpg"))
        info = tarfile.TarInfo("../../up.jpg")
        info.size = len(jpeg(0))
        tar.addfile(info, io.BytesIO(jpeg(0)))
    adopt(root)
    assert names(ShardSet(root)) == ["a.tar!../../up.jpg"]  # a name, and never a path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s"]
    assert rejects(root) == {
        f"a.tar!{name}.jpg": "is not a regular file" for name in ("link", "hard", "folder")
    }


def directory(name: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type = tarfile.DIRTYPE
    return info


LABELS = [
    # members, options, classes, labels
    ({"0.cls": b"2", "1.cls": b"0"}, {}, ["0", "1", "2"], [2, 0, -1]),
    ({"0.cls": b"dog\n", "1.cls": b"cat"}, {}, ["cat", "dog"], [1, 0, -1]),
    ({"0.cls": b"dog", "1.cls": b"7"}, {}, ["7", "dog"], [1, 0, -1]),
    ({"0.cls": b"-1", "1.cls": b"1"}, {}, ["0", "1"], [-1, 1, -1]),
    ({"0.cls": b"1", "2.cls": b"0"}, {"classes": ("a", "b")}, ["a", "b"], [1, -1, 0]),
    ({"0.cls": b"1"}, {"unlabelled": True}, [], [-1, -1, -1]),
    ({}, {}, [], [-1, -1, -1]),
    ({"0.json": b'{"label": 3}'}, {}, [], [-1, -1, -1]),
    (
        {"0.json": b'{"y": "b"}', "1.json": b'{"y": "a"}', "2.cls": b"5"},
        {"label_key": "y"},
        ["a", "b"],
        [1, 0, -1],
    ),
    (
        {"0.json": b'{"y": 1.0}', "1.json": b"{", "2.json": b"[" * 100_000},
        {"label_key": "y"},
        ["0", "1"],
        [1, -1, -1],
    ),
    ({"0.json": b'{"y": [1]}', "1.json": b"[1]"}, {"label_key": "y"}, ["0", "1"], [1, -1, -1]),
    ({"0.json": b'{"y": "\\ud800"}'}, {"label_key": "y"}, ["?"], [0, -1, -1]),
]


@pytest.mark.parametrize(("sides", "options", "classes", "labels"), LABELS)
def test_labels(
    tmp_path: Path,
    jpeg: Callable[..., bytes],
    sides: dict[str, bytes],
    options: dict[str, Any],
    classes: list[str],
    labels: list[int],
) -> None:
    write_tar(tmp_path / "s/a.tar", [*sides.items(), *((f"{i}.jpg", jpeg(i)) for i in range(3))])
    manifest = adopt(tmp_path / "s", options=AdoptOptions(**options))
    one = ShardSet(tmp_path / "s")
    assert (manifest.classes, one.labels().tolist()) == (classes, labels)
    assert manifest.class_counts == [labels.count(number) for number in range(len(classes))]
    assert verify(tmp_path / "s", full=True) == []


def test_a_label_that_is_no_class_is_refused(folder: Path) -> None:
    with pytest.raises(DataError, match=r"part-0.tar has the label '2', which is none of 2"):
        adopt(folder, options=AdoptOptions(classes=("a", "b")))
    assert sorted(p.name for p in folder.iterdir()) == ["part-0.tar", "part-1.tar"]


def test_labels_of_many_shards_are_one_list(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for shard, label in enumerate([b"b", b"c", b"a", b"b"]):
        write_tar(tmp_path / f"s/{shard}.tar", [("0.cls", label), ("0.jpg", jpeg(shard))])
    alone = adopt(tmp_path / "s", tmp_path / "one")
    assert ShardSet(tmp_path / "one").labels().tolist() == [1, 2, 0, 1]
    assert alone == adopt(tmp_path / "s", tmp_path / "two", AdoptOptions(workers=2))
    files = [p.name for p in (tmp_path / "one").iterdir()]
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_elsewhere_by_links(folder: Path, tmp_path: Path) -> None:
    before = sorted(p.name for p in folder.iterdir())
    adopt(folder, tmp_path / "set")
    assert sorted(p.name for p in folder.iterdir()) == before
    assert verify(tmp_path / "set", full=True) == []
    with pytest.raises(UsageError, match="exists already"):
        adopt(folder, tmp_path / "set")


@pytest.mark.parametrize(
    ("text", "words"),
    [(b'{"y": [1, 2]}', "several labels"), (b'{"x": 1}', "No sample has a label in the field 'y'")],
)
def test_a_field_that_gives_no_label(
    tmp_path: Path, jpeg: Callable[..., bytes], text: bytes, words: str
) -> None:
    write_tar(tmp_path / "s/a.tar", [("0.json", text), ("0.jpg", jpeg(0))])
    with pytest.raises(DataError, match=words):
        adopt(tmp_path / "s", options=AdoptOptions(label_key="y"))
    assert adopt(tmp_path / "s", options=AdoptOptions(unlabelled=True)).classes == []
