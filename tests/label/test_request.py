"""A request on disk: all of it or nothing, whenever the process dies and whatever it replaces."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.label.request import Request, check_request, describe, write_request
from fastmoco.label.uncertainty import Beliefs

BESIDE = ("request.details.csv", "request.json", "request.png")


def make_request(root: Path, ids: list[int]) -> Request:
    columns = (np.linspace(0.1, 0.9, len(ids)) for _ in range(3))
    beliefs = Beliefs(np.zeros(len(ids), np.int64), *columns)
    about = {"seed": len(ids)}
    return Request(
        ShardSet(root), np.array(ids), "margin", "", 24, ["ape"], None, beliefs, None, [], about
    )


def read_all(folder: Path) -> dict[str, bytes]:
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file()
    }


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, sys.argv[1])
from test_request import make_request
from fastmoco.label.request import write_request

root, folder, moment = Path(sys.argv[2]), Path(sys.argv[3]), 0
while True:
    here, moment = folder / str(moment), moment + 1
    here.mkdir()
    write_request(make_request(root, [3, 1]), here / "request.csv", here / "look")
    child = os.fork()
    if not child:
        calls = []
        def dying(name):
            call = getattr(os, name)
            def counted(*arguments, **options):
                calls.append(name)
                if len(calls) == moment:
                    os.kill(os.getpid(), signal.SIGKILL)
                return call(*arguments, **options)
            setattr(os, name, counted)
        for name in ("replace", "rename", "unlink", "fsync", "rmdir", "mkdir"):
            dying(name)
        write_request(make_request(root, [7, 5, 2]), here / "request.csv", here / "look")
        os._exit(0)
    status = os.waitpid(child, 0)[1]
    if os.WIFEXITED(status):
        sys.exit(os.WEXITSTATUS(status))
    assert os.WTERMSIG(status) == signal.SIGKILL
"""


def test_a_killed_process_leaves_a_whole_request_or_none(small_set, tmp_path):
    """Killed at every change of a file's name, while it replaces another request."""
    old, new = tmp_path / "old", tmp_path / "new"
    for folder, ids in ((old, [3, 1]), (new, [7, 5, 2])):
        folder.mkdir()
        request = make_request(small_set.root, ids)
        write_request(request, folder / "request.csv", folder / "look")
    moments = tmp_path / "moments"
    moments.mkdir()
    words = [KILLED, str(Path(__file__).parent), str(small_set.root), str(moments)]
    done = subprocess.run([sys.executable, "-c", *words], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    seen = set()
    for folder in moments.iterdir():
        left = {
            name: content
            for name, content in read_all(folder).items()
            if not name.startswith(".")  # what was begun
        }
        if "request.csv" in left:
            assert left in (read_all(old), read_all(new)), folder
        seen.add(("request.csv" in left, left == read_all(new)))
        write_request(
            make_request(small_set.root, [7, 5, 2]), folder / "request.csv", folder / "look"
        )
        assert read_all(folder) == read_all(new), "and the next attempt is clean"
    assert (
        seen == {(True, False), (False, False), (True, True)} and len(list(moments.iterdir())) > 9
    )


def test_an_image_that_cannot_be_read_costs_nothing(copied, tmp_path):
    folder = tmp_path / "requests"
    out, look = folder / "request.csv", folder / "look"
    write_request(make_request(copied.root, [3, 1]), out, look)
    before = read_all(folder)
    row = copied.samples[5]
    shard = copied.root / copied.manifest.shards[int(row["shard"])].name
    content = bytearray(shard.read_bytes())
    content[int(row["offset"]) + 40] ^= 255
    shard.write_bytes(content)
    with pytest.raises(DataError, match=r"sample 5 \(.*cannot be read.*Copy the set again"):
        write_request(make_request(copied.root, [2, 5]), out, look)
    assert read_all(folder) == before


def test_the_sheet_shows_the_64_most_wanted(small_set, tmp_path):
    ids = np.arange(70) % 24
    write_request(make_request(small_set.root, ids.tolist()), tmp_path / "request.csv")
    with Image.open(tmp_path / "request.png") as sheet:
        assert sheet.size == (8 * (128 + 8) + 8, 8 * (128 + 16 + 8) + 8)
        cells = [sheet.crop((x, y, x + 128, y + 128)) for y in (8, 160) for x in (8, 144)]
    # 40 x 32 by whole factors, in the middle of the cell
    for cell, sample in zip(cells, (0, 1, 8, 9), strict=True):
        entry = small_set.samples[sample]
        shard = small_set.root / small_set.manifest.shards[int(entry["shard"])].name
        start = int(entry["offset"])
        stored = shard.read_bytes()[start : start + int(entry["size"])]
        (tmp_path / "one.jpg").write_bytes(stored)
        with Image.open(tmp_path / "one.jpg") as image:
            expected = image.convert("RGB").resize((120, 96), Image.Resampling.NEAREST)
        assert cell.crop((4, 16, 124, 112)).tobytes() == expected.tobytes()


def test_the_json_says_what_decided(small_set, tmp_path):
    request = make_request(small_set.root, [3, 1])
    write_request(request, tmp_path / "request.csv")
    told = json.loads((tmp_path / "request.json").read_text())
    assert told == {
        **{"seed": 2, "strategy": "margin", "why": "", "candidates": 24},
        **{"classifier": None, "warnings": []},
    }


def test_what_is_taken_is_refused_before_the_work(small_set, tmp_path):
    out, look = tmp_path / "request.csv", tmp_path / "look"
    write_request(make_request(small_set.root, [3, 1]), out, look)
    for name in ("request.csv", *BESIDE):
        alone = tmp_path / "alone"
        alone.mkdir()
        shutil.copy(tmp_path / name, alone)
        with pytest.raises(UsageError, match=f"{name} exists.*--replace"):
            check_request(alone / "request.csv", None, False)
        check_request(alone / "request.csv", None, True)
        shutil.rmtree(alone)
    with pytest.raises(UsageError, match=r"look exists: choose another --images, or pass --repl"):
        check_request(tmp_path / "other.csv", look, False)
    check_request(out, look, True)
    (look / "mine.txt").write_text("kept")
    with pytest.raises(UsageError, match="look is not of a request"):
        check_request(out, look, True)
    (tmp_path / "request.png").write_bytes(b"a photograph")
    with pytest.raises(UsageError, match=r"request.png exists and was not drawn here"):
        check_request(out, None, True)
    with pytest.raises(UsageError, match="choose another place"):
        check_request(tmp_path / "request.png/request.csv", None, False)


def test_what_is_said_of_it(small_set, tmp_path):
    request, out = make_request(small_set.root, [3, 1, 4]), tmp_path / "request.csv"
    assert describe(request, out) == [
        f"{out}: 3 of 24 candidates by margin, 3 to 3 of a predicted class",
        "  of those asked for: confidence up to 0.90, margin up to 0.900, entropy from 0.10",
        f"  look first: {tmp_path}/request.png, the 3 most wanted",
        f"fill in `label`, then: fastmoco label {small_set.root} {out} --name asked",
    ]
