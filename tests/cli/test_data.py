"""The commands about a set that exists: verify, inspect, index, label, views."""

import io
import json
import re
import shlex
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from copies import NO_PIXELS
from PIL import Image

from fastmoco.dataset.shard_set import ShardSet

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def copied(small_set: ShardSet, tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_set.root, tmp_path / "set", ignore=NO_PIXELS))


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
    assert code == 3 and shards.get_name(5) in out and "defect" in err and "Traceback" not in err


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
            image = small_set.root.parent / "source" / small_set.get_name(row)
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


def test_what_an_error_about_labels_tells_to_do_works(
    run: Run, copied: Path, tmp_path: Path
) -> None:
    names = ["ape/0003.jpg", "bee/0001.jpg"]

    def told(*lines: str, option: tuple[object, ...] = ()) -> tuple[int, str]:
        (tmp_path / "l.csv").write_text("\n".join(lines))
        code, out, err = run("label", copied, tmp_path / "l.csv", "--name", "x", *option)
        return code, out + err

    code, words = told("path,label", *(f"/their disk/{name},{name[:3]}" for name in names))
    (root,) = re.findall("pass --root (.*)[.]", words)
    assert code == 3
    rows = [f"/their disk/{name},{name[:3]}" for name in names]
    assert told("path,label", *rows, option=("--root", *shlex.split(root)))[0] == 0
    code, words = told("id,label", "3,ape", "5,bee", option=("--replace",))
    assert code == 3 and "call the column `sample`" in words
    code, words = told("sample,label", "3,ape", "5,bee")
    assert code == 2 and "--replace" in words
    assert told("sample,label", "3,ape", "5,bee", option=("--replace",))[0] == 0
    code, words = told("sample,label", "3,0", "5,1", option=("--replace",))
    assert code == 0 and "pass --classes SET" in words
    assert told("sample,label", "3,0", "5,1", option=("--replace", "--classes", copied))[0] == 0
    assert ShardSet(copied).labels("x")[[3, 5]].tolist() == [0, 1]
    code, words = told("sample,label", "3,ape", "5,dog", option=("--replace",))
    assert code == 3 and "--classes FILE" in words
    code, words = told("sample,label", "3,APE", "5,DOG", option=("--replace",))
    assert code == 3 and "in case only" in words and "--classes FILE" in words
    (tmp_path / "c.txt").write_text("APE\nDOG\n")
    option = ("--replace", "--classes", tmp_path / "c.txt")
    assert told("sample,label", "3,APE", "5,DOG", option=option)[0] == 0


def test_views(run: Run, copied: Path, tmp_path: Path) -> None:
    png = tmp_path / "views.png"
    arguments = ("--recipe", "cifar10_r18", "--count", 2, "--out", png)
    code, out, err = run("views", copied, "runtime.executor=fused", *arguments)
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
        ("views", tmp_path / "set", "runtime.executor=fused", *arguments),
        ("label", tmp_path / "set", tmp_path / "l.csv", "--name", "x"),
        ("shard", tmp_path / odd, tmp_path / "other"),
    ):
        _, out, err = run(*command)
        assert r"\x1b" in out + err, command
        assert not set(out + err) & set("\x1b\x07\u202e"), command
