"""Hostile and odd inputs as files, zip members and tar members: each judged by rule."""

import io
import json
import os
import pickle
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import encoded

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

KEPT, CONVERTED = "kept", "converted"
NOT_AN_IMAGE, BROKEN = "is not an image", "cannot be decoded"

Corpus = dict[str, tuple[bytes, str]]


class Bomb:
    """Runs a command in whoever unpickles it."""

    def __init__(self, sentinel: Path) -> None:
        self.sentinel = sentinel

    def __reduce__(self) -> tuple[Callable[[str], int], tuple[str]]:
        return os.system, (f"touch {self.sentinel}",)


def png_claiming(width: int, height: int) -> bytes:
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4


def with_frame(jpeg: bytes, marker: int, precision: int = 8) -> bytes:
    """The same JPEG under another coding process, or with another depth: no decoder agrees."""
    at = jpeg.index(b"\xff\xc0")
    return (
        jpeg[: at + 1]
        + bytes([marker])
        + jpeg[at + 2 : at + 4]
        + bytes([precision])
        + (jpeg[at + 5 :])
    )


def cut_jpegs(jpeg: bytes) -> Corpus:
    """Cuts through every part: header, tables, frame, scan."""
    marks = [1, 2, 3, 20, jpeg.index(b"\xff\xdb") + 9, jpeg.index(b"\xff\xc4") + 9]
    scan = jpeg.index(b"\xff\xda")
    marks += [jpeg.index(b"\xff\xc0") + 6, scan + 1, scan + 14, (scan + len(jpeg)) // 2]
    return {f"cut at {at}.jpg": (jpeg[:at], f"{NOT_AN_IMAGE}|{BROKEN}") for at in marks}


def pictures(image: Image.Image) -> Corpus:
    alpha = image.convert("RGBA")
    alpha.putalpha(Image.linear_gradient("L").resize(image.size))
    deep = Image.fromarray(np.arange(256 * 20, dtype=np.uint16).reshape(20, 256) * 12)
    frames = {"save_all": True, "append_images": [image.rotate(90), image.rotate(180)]}
    turned = Image.Exif()
    turned[0x0112] = 8
    return {
        "plain.jpg": (encoded(image, "JPEG"), KEPT),
        "progressive.jpg": (encoded(image, "JPEG", progressive=True), KEPT),
        "gray.jpg": (encoded(image.convert("L"), "JPEG"), KEPT),
        "restart markers.jpg": (encoded(image, "JPEG", restart_marker_blocks=2), KEPT),
        "cmyk.jpg": (encoded(image.convert("CMYK"), "JPEG"), CONVERTED),
        "turned.jpg": (encoded(image, "JPEG", exif=turned), CONVERTED),
        "turned.png": (encoded(image, "PNG", exif=turned), CONVERTED),
        "plain.png": (encoded(image, "PNG"), KEPT),
        "alpha.png": (encoded(alpha, "PNG"), KEPT),
        "gray alpha.png": (encoded(alpha.convert("LA"), "PNG"), KEPT),
        "palette.png": (encoded(image.quantize(90), "PNG"), KEPT),
        "2-bit palette.png": (encoded(image.quantize(4), "PNG"), CONVERTED),
        "black and white.png": (encoded(image.convert("1"), "PNG"), CONVERTED),
        "16-bit.png": (encoded(deep, "PNG"), CONVERTED),
        "16-bit.tiff": (encoded(deep, "TIFF"), CONVERTED),
        "pages.tiff": (encoded(image, "TIFF", **frames), CONVERTED),
        "plain.gif": (encoded(image, "GIF"), CONVERTED),
        "moving.gif": (encoded(image, "GIF", **frames), CONVERTED),
        "moving.png": (encoded(image, "PNG", **frames), CONVERTED),
        "moving.webp": (encoded(image, "WEBP", **frames), CONVERTED),
        "still.webp": (encoded(image, "WEBP"), KEPT),
        "alpha.webp": (encoded(alpha, "WEBP", lossless=True), KEPT),
        "plain.bmp": (encoded(image, "BMP"), CONVERTED),
        "plain.ppm": (encoded(image, "PPM"), CONVERTED),
        "one pixel.png": (encoded(image.crop((0, 0, 1, 1)), "PNG"), KEPT),
        "one pixel.jpg": (encoded(image.crop((0, 0, 1, 1)), "JPEG"), KEPT),
        "thin.jpg": (encoded(image.resize((3, 500)), "JPEG"), KEPT),
        "really a png.jpg": (encoded(image, "PNG"), KEPT),
    }


def hostile(image: Image.Image, sentinel: Path) -> Corpus:
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    scan = jpeg.index(b"\xff\xda")
    return {
        "nothing.jpg": (b"", NOT_AN_IMAGE),
        "zeros.jpg": (bytes(5000), NOT_AN_IMAGE),
        "page.jpg": (b"<html><body>404 not found</body></html>" * 9, NOT_AN_IMAGE),
        "pickle.png": (pickle.dumps(Bomb(sentinel)), NOT_AN_IMAGE),
        "script.png": (b"#!/bin/sh\ntouch sentinel\n", NOT_AN_IMAGE),
        "postscript.jpg": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", NOT_AN_IMAGE),
        "icon.png": (encoded(image, "ICO"), NOT_AN_IMAGE),
        "svg.png": (b'<svg xmlns="http://www.w3.org/2000/svg"></svg>', NOT_AN_IMAGE),
        "bomb.png": (png_claiming(50_000, 50_000), "more than 100 million pixels"),
        "long.png": (png_claiming(70_000, 100), "a side of more than 65535"),
        "no size.png": (png_claiming(0, 0), f"{NOT_AN_IMAGE}|{BROKEN}|smaller"),
        "12-bit.jpg": (with_frame(jpeg, 0xC1, 12), f"{NOT_AN_IMAGE}|{BROKEN}"),
        "arithmetic.jpg": (with_frame(jpeg, 0xC9), f"{CONVERTED}|{NOT_AN_IMAGE}|{BROKEN}"),
        "lossless.jpg": (with_frame(jpeg, 0xC3), f"{NOT_AN_IMAGE}|{BROKEN}"),
        "stray bytes.jpg": (jpeg.replace(b"\xff\xc0", b"??\xff\xc0"), CONVERTED),
        "bytes behind.jpg": (jpeg + b"\0" * 3000 + b"PK\3\4", KEPT),
        "no end.jpg": (jpeg[:-2], f"{KEPT}|{BROKEN}"),
        "half zeroed.jpg": (jpeg[: scan + 60] + bytes(len(jpeg) - scan - 62) + b"\xff\xd9", KEPT),
        "bad checksum.png": (png[:60] + bytes([png[60] ^ 1]) + png[61:], BROKEN),
        "bad end.png": (png[:-1] + b"?", CONVERTED),
        "cut.png": (png[: len(png) // 2], BROKEN),
        "cut.webp": (encoded(image, "WEBP")[:60], f"{NOT_AN_IMAGE}|{BROKEN}"),
        "cut.gif": (encoded(image, "GIF")[:80], f"{NOT_AN_IMAGE}|{BROKEN}"),
        "cut.bmp": (encoded(image, "BMP")[:500], BROKEN),
        "cut.tiff": (encoded(image, "TIFF")[:200], f"{NOT_AN_IMAGE}|{BROKEN}"),
    }


def flipped(image: Image.Image) -> Corpus:
    jpeg, generator, found = encoded(image, "JPEG"), np.random.default_rng(5), {}
    for trial in range(12):
        damaged = bytearray(jpeg)
        damaged[int(generator.integers(2, len(jpeg)))] ^= 1 << int(generator.integers(8))
        found[f"flipped {trial}.jpg"] = (bytes(damaged), f"{KEPT}|{CONVERTED}|{BROKEN}|is not")
    return found


def named(image: Image.Image) -> Corpus:
    content = encoded(image, "JPEG")
    names = (
        "a b.jpg",
        "a.b.c.jpg",
        "ünï😀.jpg",
        "new\nline.jpg",
        "-rf.jpg",
        "%s$HOME.jpg",
        "CON.JPG",
    )
    return {name: (content + name.encode(), KEPT) for name in names}


@pytest.fixture
def corpus(make_picture: Callable[..., Image.Image], tmp_path: Path) -> Corpus:
    image = make_picture(1, (40, 32))
    found = {
        **pictures(image),
        **hostile(image, tmp_path / "sentinel"),
        **cut_jpegs(encoded(image, "JPEG")),
        **flipped(image),
        **named(image),
    }
    assert len(found) >= 60
    return found


def as_folder(corpus: Corpus, root: Path) -> Path:
    root.mkdir()
    for name, (content, _) in corpus.items():
        (root / name).write_bytes(content)
    return root


def as_zip(corpus: Corpus, root: Path) -> Path:
    with zipfile.ZipFile(root.with_suffix(".zip"), "w") as archive:
        for number, (name, (content, _)) in enumerate(corpus.items()):
            method = zipfile.ZIP_DEFLATED if number % 2 else zipfile.ZIP_STORED
            archive.writestr(name, content, method)
    return root.with_suffix(".zip")


def as_tar(corpus: Corpus, root: Path) -> Path:
    with tarfile.open(root.with_suffix(".tar"), "w", format=tarfile.PAX_FORMAT) as archive:
        for name, (content, _) in corpus.items():
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return root.with_suffix(".tar")


def dali_pixels(shards: ShardSet) -> list[np.ndarray]:
    """Decode every sample by DALI's own reader and index."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    tars = [str(shards.root / shard.name) for shard in shards.manifest.shards]
    with pipeline:
        encoded = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["jpg;png;webp"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(fn.decoders.image(encoded, adjust_orientation=False))
    pipeline.build()
    return [np.array(pipeline.run()[0].at(0)) for _ in range(len(shards))]


def stored(shards: ShardSet, row: int) -> bytes:
    sample = shards.samples[row]
    tar = (shards.root / shards.manifest.shards[sample["shard"]].name).read_bytes()
    return tar[int(sample["offset"]) : int(sample["offset"]) + int(sample["size"])]


@pytest.mark.parametrize("form", [as_folder, as_zip, as_tar])
def test_each_input_is_accepted_or_refused_by_rule(
    corpus: Corpus, tmp_path: Path, form: Callable[[Corpus, Path], Path]
) -> None:
    source, out = form(corpus, tmp_path / "source"), tmp_path / "set"
    pack(source, out, PackOptions(max_rejects=100, shard_mb=1, workers=2))
    shards = ShardSet(out)
    verdicts = {shards.get_name(row): stored(shards, row) for row in range(len(shards))}
    lines = (out / "rejects.jsonl").read_text().splitlines()
    reasons = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    assert not set(verdicts) & set(reasons) and set(verdicts) | set(reasons) == set(corpus)
    for name, (content, expected) in corpus.items():
        found = KEPT if verdicts.get(name) == content else CONVERTED
        found = reasons.get(name, found)
        assert any(part in found for part in expected.split("|")), (name, expected, found)
    assert not (tmp_path / "sentinel").exists()
    assert {path.name for path in tmp_path.iterdir()} == {source.name, "set"}
    check_pixels(shards)


def check_pixels(shards: ShardSet) -> None:
    for row, found in enumerate(dali_pixels(shards)):
        with Image.open(io.BytesIO(stored(shards, row))) as image:
            expected = np.asarray(image.convert("RGB"))
        assert found.shape == expected.shape, shards.get_name(row)
        np.testing.assert_array_equal(found, expected, err_msg=shards.get_name(row))


def test_too_many_refusals_stop_the_pack(corpus: Corpus, tmp_path: Path) -> None:
    source = as_folder(corpus, tmp_path / "source")
    with pytest.raises(DataError, match=r"34 of 82 .* more than 10,.*--max-rejects 34"):
        pack(source, tmp_path / "set", PackOptions())
    assert {path.name for path in tmp_path.iterdir()} == {"source"}


def test_members_that_leave_the_archive(tmp_path: Path) -> None:
    content = encoded(Image.new("RGB", (8, 8), "red"), "PNG")
    with tarfile.open(tmp_path / "source.tar", "w") as archive:
        for name in ("ok.png", "../up.png", "/abs.png", "a/../../b.png"):
            info = tarfile.TarInfo(name)
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        archive.addfile(link)
    pack(tmp_path / "source.tar", tmp_path / "set", PackOptions())
    assert [ShardSet(tmp_path / "set").get_name(0), len(ShardSet(tmp_path / "set"))] == [
        "ok.png",
        1,
    ]
    lines = (tmp_path / "set/rejects.jsonl").read_text().splitlines()
    reasons = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    assert "leaves the archive" in reasons["../up.png"] and "is a link" in reasons["link.png"]
    assert {path.name for path in tmp_path.iterdir()} == {"source.tar", "set"}


def test_a_tar_that_claims_ten_gigabytes_is_damaged(tmp_path: Path) -> None:
    huge = tarfile.TarInfo("huge.png")
    huge.size = 10 * 2**30
    (tmp_path / "source.tar").write_bytes(huge.tobuf() + bytes(10240))
    with pytest.raises(DataError, match="cannot be read as a tar: unexpected end"):
        pack(tmp_path / "source.tar", tmp_path / "set", PackOptions())


def test_a_zip_member_that_grows_past_its_claim_is_damaged(tmp_path: Path) -> None:
    path = tmp_path / "source.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("ok.png", encoded(Image.new("RGB", (8, 8)), "PNG"))
        archive.writestr("bomb.png", bytes(10**7))
    raw = bytearray(path.read_bytes())
    entry = raw.rindex(b"PK\x01\x02")
    raw[entry + 24 : entry + 28] = struct.pack("<I", 1000)  # the size when unpacked
    path.write_bytes(raw)
    pack(path, tmp_path / "set", PackOptions())
    assert json.loads((tmp_path / "set/rejects.jsonl").read_text()) == {
        "name": "bomb.png",
        "reason": "is damaged in the archive",
    }
