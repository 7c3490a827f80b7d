"""`compare.py pack`: the arms do the same work, and the rows tell nothing of the machine."""

import json
import signal
import socket
import subprocess
import sys
import time
from getpass import getuser
from io import BytesIO
from pathlib import Path

import compare
import numpy as np
import psutil
import pytest
from compare import app
from comparisons import pack as bench
from harness.arm import Section
from harness.images import names_of, repeated
from PIL import Image
from typer.testing import CliRunner

from fastmoco.core.environment import digest_of_inputs
from fastmoco.errors import DataError, UsageError


@pytest.fixture(scope="module")
def photos(tmp_path_factory, make_images):
    return make_images(tmp_path_factory.mktemp("bench") / "photos", per_class=3, size=(80, 64))


def packed(function, source, scratch, short_side=None):
    section = Section()
    result = function(section, str(source), str(scratch), short_side, 90)
    assert section.seconds > 0
    assert not list(scratch.iterdir())
    return result


def test_the_arms_keep_the_same_bytes(photos, tmp_path):
    arms = (bench.ours, bench.plain, bench.pooled)
    ours, *others = [packed(arm, photos, tmp_path) for arm in arms]
    assert ours["images"] == ours["check"]["labelled"] == 6
    for other in others:
        assert other["images"] == ours["images"]
        assert other["details"] == ours["details"]
        assert other["check"].keys() == ours["check"].keys()
        for key, value in ours["check"].items():
            assert other["check"][key] == pytest.approx(value), key  # added up in another order
    contents = [path.read_bytes() for path in photos.rglob("*.jpg")]
    assert ours["details"]["stored_bytes"] == sum(map(len, contents))


def test_the_arms_shrink_alike(photos, tmp_path):
    ours, plain = [packed(arm, photos, tmp_path, 32) for arm in (bench.ours, bench.plain)]
    assert (plain["check"]["mean_width"], plain["check"]["mean_height"]) == (40, 32)
    for key, value in ours["check"].items():
        assert plain["check"][key] == pytest.approx(value, abs=0.5), key


def test_the_plain_loop_averages_when_it_shrinks():
    stripes = Image.fromarray(np.tile(np.array([0, 255], dtype=np.uint8), (64, 32)))
    small = np.asarray(Image.open(BytesIO(bench._shrunk(stripes, 16, 95))))
    assert small.shape == (16, 16, 3)
    assert np.abs(small[:, 2:-2].astype(int) - 127).max() < 20


def test_the_plain_loop_leaves_out_what_it_cannot_read(photos, tmp_path, make_images):
    source = make_images(tmp_path / "flat", classes=(), per_class=3)
    (source / "0001.jpg").write_bytes(b"<html>")
    (tmp_path / "scratch").mkdir()
    found = packed(bench.plain, source, tmp_path / "scratch")
    assert (found["images"], found["check"]["labelled"]) == (2, 0)


def test_repeated_images_are_links_in_their_class(photos, tmp_path):
    names = names_of(photos)
    root = repeated(photos, names, 3, tmp_path)
    copies = names_of(root)
    assert len(copies) == 18
    assert "cat/2-0001.jpg" in copies
    assert (root / "cat/2-0001.jpg").samefile(photos / "cat/0001.jpg")
    assert repeated(photos, names, 1, tmp_path) == photos


def test_the_proof_sees_another_image(make_images, tmp_path):
    (tmp_path / "scratch").mkdir()
    sources = (
        make_images(tmp_path / "one", classes=(), per_class=2),
        make_images(tmp_path / "two", classes=("x", "y"), per_class=1),
    )
    one, two = (packed(bench.plain, source, tmp_path / "scratch") for source in sources)
    assert one["details"]["images_digest"] != two["details"]["images_digest"]
    assert one["check"]["mean"] != pytest.approx(two["check"]["mean"], abs=0.5)


def test_the_mean_is_that_of_the_full_images(photos, tmp_path):
    found = packed(bench.plain, photos, tmp_path)
    means = [np.asarray(Image.open(path)).mean((0, 1)) for path in photos.rglob("*.jpg")]
    assert found["check"]["mean"] == pytest.approx(np.mean(means, axis=0), abs=0.5)


def test_user_errors(tmp_path):
    settings = bench.Settings()
    with pytest.raises(UsageError, match="is not a folder"):
        bench.bench_pack(tmp_path / "none", settings, 1)
    with pytest.raises(DataError, match="holds no images"):
        bench.bench_pack(tmp_path, settings, 1)


def test_the_digest_of_the_inputs_knows_names_and_sizes():
    files = [("a", 1), ("b", 2)]
    assert digest_of_inputs(files) == digest_of_inputs(iter(files))
    assert digest_of_inputs(files) != digest_of_inputs([("a", 1), ("b", 3)])


@pytest.fixture
def tiny_arms(monkeypatch, make_arm):
    """Replaces the arms by programs that only print a result."""

    def replace_by(first, second):
        arms = {"first": make_arm(first), "second": make_arm(second)}
        monkeypatch.setattr(bench, "_arms", lambda root, scratch, settings: arms)

    return replace_by


def test_rows_are_appended_and_hold_no_absolute_path(photos, tmp_path, tiny_arms):
    tiny_arms('more = {"seconds": 1.0}', 'more = {"seconds": 2.0}')
    out = tmp_path / "results" / "rows.jsonl"
    command = ["pack", str(photos), "--pairs", "1", "--repeat", "2", "--out", str(out)]
    for _ in range(2):
        ran = CliRunner().invoke(app, command, catch_exceptions=False)
        assert ran.exit_code == 0
    assert "speed 2.000x [2.000, 2.000]" in ran.stdout
    assert "too few pairs for a claim" in ran.stdout
    rows = [json.loads(line) for line in out.read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["measurement", "measurement", "report"] * 2
    report = rows[-1]
    assert report["subject"] | {"inputs_sha256": ""} == {
        "source": "photos",
        "images": 12,
        "inputs_sha256": "",
        "short_side": None,
        "quality": 90,
        "repeat": 2,
        "pool": False,
    }
    assert report["comparisons"][0]["speed"]["median"] == 2.0
    assert report["environment"]["cpu"] and report["environment"]["versions"]["torch"]
    assert str(tmp_path) not in out.read_text()
    private = (socket.gethostname(), getuser())
    assert not [text for text in strings(rows) if text.startswith("/") or text in private]
    assert list(photos.parent.iterdir()) == [photos]


def strings(value):
    if isinstance(value, dict):
        value = [*value.keys(), *value.values()]
    if isinstance(value, list):
        return [text for item in value for text in strings(item)]
    return [value] if isinstance(value, str) else []


def test_unequal_counts_end_with_exit_code_3(photos, tmp_path, tiny_arms):
    tiny_arms("", 'more = {"images": 11}')
    out = tmp_path / "rows.jsonl"
    ran = CliRunner().invoke(app, ["pack", str(photos), "--pairs", "1", "--out", str(out)])
    assert isinstance(ran.exception, DataError)
    assert ran.exception.exit_code == 3
    assert "NOT THE SAME WORK: images: 11 in second, 10 in first" in ran.stdout
    assert json.loads(out.read_text().splitlines()[-1])["same_work"] is False


def test_an_unwritable_result_file_is_told_at_once(photos, tmp_path):
    ran = CliRunner().invoke(app, ["pack", str(photos), "--out", str(tmp_path)])
    assert isinstance(ran.exception, UsageError)
    assert "cannot be written" in str(ran.exception)


def test_an_arm_against_itself_tells_the_smallest_effect(photos, tiny_arms):
    tiny_arms("", "1 / 0")
    ran = CliRunner().invoke(app, ["pack", str(photos), "--pairs", "1", "--aa"])
    assert ran.exit_code == 0
    assert "The smallest effect that this machine can show: 0.0 %" in ran.stdout


def test_a_bench_that_is_told_to_end_leaves_nothing_behind(photos):
    script = Path(compare.__file__)
    command = [sys.executable, str(script), "pack", str(photos), "--repeat=3000"]
    with subprocess.Popen(command) as bench_run:
        tree = arms_of(bench_run.pid)
        bench_run.terminate()
        status = bench_run.wait(timeout=60)
    _, left = psutil.wait_procs(tree, timeout=10)
    for process in left:
        process.kill()
    assert (status, left) == (128 + signal.SIGTERM, [])
    assert not list(photos.parent.glob(".fastmoco-bench-*"))


def arms_of(pid):
    """Wait until a measurement has begun; return all processes of it."""
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        tree = psutil.Process(pid).children(recursive=True)
        if any("harness.arm" in process.cmdline() for process in tree[1:]):
            return tree
        time.sleep(0.05)
    raise AssertionError("no measurement began")
