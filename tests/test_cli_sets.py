"""The commands about a set that exists: verify, inspect, index, label, views."""

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from fastmoco.shardset import ShardSet

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copied(small_set: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set.root, tmp_path / "set"))


def test_verify(run: Run, copied: Path) -> None:
    assert run("verify", copied)[:2] == (
        0,
        f"{copied}: sound in sizes and counts; --full reads every image\n",
    )
    assert run("verify", copied, "--full", "--workers", 1)[:2] == (0, f"{copied}: sound\n")
    manifest = json.loads((copied / "manifest.json").read_text())
    del manifest["sha256"]  # as of an older version
    (copied / "manifest.json").write_text(json.dumps(manifest))
    code, out, _ = run("verify", copied)
    assert code == 0 and "written before there were hashes" in out and "names.txt" in out
    shards = ShardSet(copied)
    tar = copied / "shard-000000.tar"
    raw = bytearray(tar.read_bytes())
    raw[int(shards.samples["offset"][5]) + 300] ^= 1
    tar.write_bytes(raw)
    assert run("verify", copied)[0] == 0, "the size is as it was"
    code, out, err = run("verify", copied, "--full", "--workers", 1)
    assert code == 3 and shards.name_of(5) in out and "defect" in err and "Traceback" not in err


def test_inspect_draws_a_sheet(run: Run, copied: Path, tmp_path: Path) -> None:
    code, out, err = run("inspect", copied, "--sheet", tmp_path / "sheet.png", "--count", 9)
    assert (code, err) == (0, "")
    assert "24" in out and all(name in out for name in ("ape", "bee", "cow"))
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert len(sheet.convert("RGB").getcolors(2**20) or []) > 1000


def test_index_adopts_and_knows_the_classes(run: Run, small_set: ShardSet, tmp_path: Path) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    with tarfile.open(theirs / "a b.tar", "w") as tar:
        for row in range(6):
            image = small_set.root.parent / "source" / small_set.name_of(row)
            members = ((f"x/{row}.jpg", image.read_bytes()), (f"x/{row}.cls", b"%d" % (row % 2)))
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    code, out, err = run("index", theirs, "--workers", 1)
    assert code == 0, err
    assert "6 images, 2 classes, 1 shards" in out
    assert run("verify", theirs, "--full", "--workers", 1)[0] == 0
    code, _, err = run("index", theirs)
    assert code in (2, 3) and err.startswith("error: ") and "Traceback" not in err


def test_label(run: Run, copied: Path, tmp_path: Path) -> None:
    (tmp_path / "labels.csv").write_text("sample,label\n3,sun\n1,rain\n2,sun\n")
    arguments = ("label", copied, tmp_path / "labels.csv", "--name", "weather")
    code, out, _ = run(*arguments)
    assert code == 0 and "3 labels, 2 classes" in out
    assert "classes of its own (rain, sun), not the set's (ape, bee, cow)" in out
    assert ShardSet(copied).labels("weather").tolist()[:5] == [-1, 0, 1, 1, -1]
    code, _, err = run(*arguments[:-1], "again", "--classes", copied)
    assert code == 3 and "'sun' is none of 3 classes" in err
    (tmp_path / "bad.csv").write_text("name,label\nnowhere.jpg,ape\n")
    code, _, err = run("label", copied, tmp_path / "bad.csv", "--name", "other")
    assert code == 3 and "nowhere.jpg" in err and not (copied / "labels/other.npy").exists()


def test_views(run: Run, copied: Path, tmp_path: Path) -> None:
    png = tmp_path / "views.png"
    arguments = ("--recipe", "cifar10_r18", "--count", 2, "--out", png)
    code, out, err = run("views", copied, "executor=torchvision", *arguments)
    assert code == 0, err
    assert out.count("view 1: crop") == out.count("view 2: crop") == 2 and png.exists()


def test_names_give_a_terminal_no_orders(
    run: Run, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    """Nor do they mix up its lines: control characters, and marks that turn the direction."""
    odd = "a\x1b]0;pwned\x07\u202e"
    make_images(tmp_path / "in", (odd, "b"))
    assert run("shard", tmp_path / "in", tmp_path / "set")[0] == 0
    (tmp_path / "l.csv").write_text(f"name,label\nabsent\x1b[31m,{odd}\n")
    arguments = ("--recipe", "cifar10_r18", "--out", tmp_path / "views.png")
    for command in (
        ("inspect", tmp_path / "set"),
        ("views", tmp_path / "set", "executor=torchvision", *arguments),
        ("label", tmp_path / "set", tmp_path / "l.csv", "--name", "x"),
        ("shard", tmp_path / odd, tmp_path / "other"),
    ):
        _, out, err = run(*command)
        assert r"\x1b" in out + err, command
        assert not set(out + err) & set("\x1b\x07\u202e"), command
