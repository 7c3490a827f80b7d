"""Shards that others wrote, where they cannot be adopted: plain words, and nothing left behind."""

import os
import shutil
import signal
import subprocess
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image
from tars import write_tar

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.adopt import adopt

Picture = Callable[..., Image.Image]


def test_what_is_refused(folder: Path, tmp_path: Path, small_set: ShardSet) -> None:
    (tmp_path / "empty").mkdir()
    for place, words in (
        (tmp_path / "empty", "holds no"),
        (tmp_path / "absent", "is not a folder"),
        (small_set.root, "is a shard set already"),
    ):
        with pytest.raises(UsageError, match=words):
            adopt(place)
    (folder / "part-0.idx").write_text("v1.2 0\n")
    with pytest.raises(UsageError, match=r"\(part-0.idx\): move them away, or .* --out"):
        adopt(folder)
    assert (folder / "part-0.idx").read_text() == "v1.2 0\n"
    (folder / "more.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"compressed shards \(more.tar.gz\).*gzip -d"):
        adopt(folder)


def test_a_folder_is_adopted_once(folder: Path) -> None:
    adopt(folder)
    with pytest.raises(UsageError, match="is a shard set already"):
        adopt(folder)


@pytest.mark.parametrize("part", [0.0, 0.3, 0.6, 0.9, "mark"])
def test_a_cut_shard_is_refused(folder: Path, part: float | str) -> None:
    path = folder / "part-1.tar"
    with tarfile.open(path) as tar:
        end = max(m.offset_data + -(-m.size // 512) * 512 for m in tar)
    os.truncate(path, end if isinstance(part, str) else int(part * end))
    with pytest.raises(DataError, match=r"1 shard\(s\) are damaged(?s:.*)part-1.tar is cut off"):
        adopt(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["part-0.tar", "part-1.tar"]


def test_a_damaged_header_is_refused(folder: Path) -> None:
    path = folder / "part-0.tar"
    raw = bytearray(path.read_bytes())
    with tarfile.open(path) as tar:
        raw[tar.getmembers()[4].offset + 5] ^= 1
    path.write_bytes(raw)
    with pytest.raises(DataError, match=r"part-0.tar has a damaged header at byte \d+"):
        adopt(folder)


def test_a_huge_claim_is_not_believed(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    for kind in (tarfile.REGTYPE, tarfile.GNUTYPE_LONGNAME, tarfile.XHDTYPE):
        info = tarfile.TarInfo("a.jpg")
        info.type, info.size = kind, 10 * 2**30
        path = tmp_path / "s/a.tar"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(info.tobuf() + bytes(2048))
        with pytest.raises(DataError, match=r"is cut off inside|has a damaged header"):
            adopt(tmp_path / "s")


def test_a_name_of_two_megabytes_is_not_read(tmp_path: Path, jpeg: Callable[..., bytes]) -> None:
    name = "x" * 2**21 + ".jpg"
    write_tar(tmp_path / "s/a.tar", [(name, jpeg(0))], tarfile.GNU_FORMAT)
    with pytest.raises(DataError, match="has a damaged header at byte 0"):
        adopt(tmp_path / "s")


def test_nothing_fit_is_refused(tmp_path: Path) -> None:
    write_tar(tmp_path / "s/a.tar", [("a.jpg", b"x"), ("b.txt", b"y")])
    with pytest.raises(DataError, match=r"no image that can(?s:.*)'a.tar!a.jpg' is not an image"):
        adopt(tmp_path / "s")
    assert sorted(p.name for p in (tmp_path / "s").iterdir()) == ["a.tar"]


STALLED = """
import sys, time
from pathlib import Path
import fastmoco.pack.adopt as station

moment = sys.argv[2]
def stall(*_):
    print("stalled", flush=True)
    time.sleep(120)
if moment == "rename":
    renames = iter(range(100))
    rename = Path.rename
    Path.rename = lambda path, to: stall() if next(renames) == 3 else rename(path, to)
out = Path(sys.argv[3]) if sys.argv[3:] else None
station.adopt(Path(sys.argv[1]), out, on_progress=stall if moment == "check" else None)
"""


@pytest.mark.parametrize(
    ("moment", "number"),
    [("check", signal.SIGKILL), ("check", signal.SIGINT), ("rename", signal.SIGKILL)],
)
def test_an_interrupted_call_leaves_no_set(
    folder: Path, tmp_path: Path, moment: str, number: signal.Signals
) -> None:
    command = [sys.executable, "-c", STALLED, str(folder), moment]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"stalled\n"
        process.send_signal(number)
    assert not (folder / "manifest.json").exists()
    if (moment, number) == ("check", signal.SIGINT):
        assert sorted(p.name for p in folder.iterdir()) == ["part-0.tar", "part-1.tar"]
    notes = folder / "names.txt"
    notes.write_text("my own notes")
    with pytest.raises(UsageError, match=r"names.txt"):
        adopt(folder)
    assert notes.read_text() == "my own notes", "a stranger's file, though a call was killed here"
    notes.unlink()
    adopt(folder)
    whole = tmp_path / "whole"
    whole.mkdir()
    for tar in folder.glob("*.tar"):
        shutil.copy(tar, whole)
    adopt(whole)
    assert {p.name: p.read_bytes() for p in folder.iterdir()} == {
        p.name: p.read_bytes() for p in whole.iterdir()
    }


@pytest.mark.parametrize("elsewhere", [False, True])
def test_two_calls_at_once(folder: Path, tmp_path: Path, elsewhere: bool) -> None:
    out = tmp_path / "out" if elsewhere else None
    command = [sys.executable, "-c", STALLED, str(folder), "check", *[str(out)] * elsewhere]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"stalled\n"
        before = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        with pytest.raises(UsageError, match="Another process is writing"):
            adopt(folder, out)
        after = {path: path.read_bytes() for path in tmp_path.rglob("*.*") if path.is_file()}
        process.kill()
    assert before == after
    adopt(folder, out)


def test_a_full_disk_is_plain_words(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import fastmoco.pack.finalize as station

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(station, "write_manifest", full)
    with pytest.raises(DataError, match="cannot be written: No space left on device"):
        adopt(folder)
    assert sorted(p.name for p in folder.iterdir()) == ["part-0.tar", "part-1.tar"]
