"""The check of a GPU, without one: what it does about failures, and what its page may say."""

import json
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import gpu_check
import pytest
from gpu_phases import checkpoint, page, setup, suite
from gpu_phases.catalog import PHASES, SETUP, Phase, Table
from gpu_phases.measure import profile_of
from gpu_phases.page import NOTHING, page_of
from gpu_phases.task import Task
from torchvision.datasets import ImageFolder

SCRIPT = Path(gpu_check.__file__)
EXTRAS = "matplotlib onnx psutil pyarrow scipy skimage sklearn timm transformers wandb webdataset"
FAKE = """
import os
from gpu_phases.task import Item, Unavailable

def lack():
    raise Unavailable("not given")

def fail():
    raise ValueError("too warm\\nfor this")

def steps(task):
    yield {"value": 3.0}
    yield {"item": "fake/later row", "value": 4.0}

def items(task):
    return {
        "fake/good": Item(lambda: {"value": float("nan")}),
        "fake/lacks": Item(lack),
        "fake/raises": Item(fail),
        "fake/dies": Item(lambda: os.abort()),
        "fake/rows": Item(lambda: steps(task)),
        "fake/too long": Item(lambda: {}, least=1e6),
        "fake/last": Item(lambda: {"value": 5.0}),
    }
"""
PHASE = Phase("x", "fake_phase", "Fake", 1.0, 1.0, (Table("fake", (("value", "value", ".1f"),)),))


@pytest.fixture
def check(tmp_path, monkeypatch):
    (tmp_path / "fake_phase.py").write_text(FAKE)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(gpu_check, "GRACE_S", 0.0)
    return gpu_check.Check(Task(tmp_path, tmp_path, True, 0.0), "command")


def test_a_phase_goes_on_behind_what_fails(check, tmp_path):
    check.run_phase(PHASE, time.time() + 1000)
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["item"], row["status"]) for row in rows] == [
        ("fake/good", "measured"),
        ("fake/lacks", "not measured"),
        ("fake/raises", "failed"),
        ("fake/dies", "failed"),
        ("fake/rows", "measured"),
        ("fake/later row", "measured"),
        ("fake/too long", "not measured"),
        ("fake/last", "measured"),
    ]
    assert rows[0]["value"] is None and rows[5]["value"] == 4.0
    reasons = [row.get("reason") for row in rows]
    assert reasons[1:3] == ["not given", "ValueError: too warm"]
    assert "SIGABRT" in reasons[3] and reasons[6] == "no time left"
    assert "for this" in (tmp_path / "log.txt").read_text()


def test_a_phase_that_hangs_is_ended(check, tmp_path):
    (tmp_path / "fake_phase.py").write_text("import time\ntime.sleep(1000)")
    check.run_phase(PHASE, time.time() + 1)
    (row,) = check.rows
    assert row["status"] == "failed" and "no result within 1 s" in row["reason"]


def test_a_phase_that_cannot_start_fails_once(check):
    check.run_phase(replace(PHASE, module="no_such_phase"), time.time() + 60)
    (row,) = check.rows
    assert row["status"] == "failed" and "exit code 1" in row["reason"]


@pytest.mark.parametrize(("minutes", "skipped"), [(10, ""), (2, "bhf")])
def test_phases_fit_into_the_time(check, tmp_path, monkeypatch, minutes, skipped):
    now = 1000.0
    monkeypatch.setattr(gpu_check, "GRACE_S", 15.0)
    monkeypatch.setattr(gpu_check.time, "time", lambda: now)
    check._began, ran = now, []

    def run_phase(phase: Phase, until: float, spared: object) -> None:
        nonlocal now
        assert until - now >= phase.least
        now = until - phase.seconds / 10  # a little less than it may take
        ran.append(phase.letter)

    monkeypatch.setattr(check, "run_phase", run_phase)
    (tmp_path / "log.txt").touch()
    assert check.run(PHASES, minutes) == 0
    assert now <= 1000 + 60 * minutes - 15
    assert ran == [p.letter for p in (SETUP, *PHASES) if p.letter not in skipped]
    assert {row["phase"] for row in check.rows} == set(skipped)


def get_rows(phase: str, **items: dict) -> list[dict]:
    return [{"phase": phase, "item": name.replace("_", "/"), **row} for name, row in items.items()]


def test_the_page_invents_nothing():
    measured = {"status": "measured", "images_per_s": 1234.0, "ms": None, "bytes_per_image": 659e6}
    rows = get_rows(
        "c",
        step_one={**measured, "flop_per_image": 32.5e9},
        step_two={"status": "failed", "reason": "a|b", "images_per_s": 77.0},
        step_three={"status": "not measured", "reason": "no time left"},
    )
    told = page_of(rows, PHASES, "command", "today", dry=False)
    one, two, three = (
        next(line for line in told.splitlines() if line.startswith(f"| {name} "))
        for name in ("one", "two", "three")
    )
    assert one.count(NOTHING) == 5 and "1,234" in one  # all but the figure that is there
    assert "77" not in told and f"{NOTHING} (failed)" in two
    assert f"{NOTHING} (no time left)" in three
    assert "- c, step/two: a\\|b" in told and "1 failed" in told
    for phase in PHASES:
        if phase.letter != "c":
            assert f"- {phase.letter}, {phase.title}: {NOTHING}" in told


def test_the_roofline_is_the_lower_of_two_bounds():
    work = {"bytes_per_image": 1e6, "flop_per_image": 1e9, "images_per_s": 100.0}
    step = {"phase": "c", "item": "step/x", "status": "measured", **work}

    def share(copy: float, matmul: float) -> float:
        rates = {"rate/copy": copy, "rate/bf16 matmul": matmul}
        known = [{"phase": "a", "item": name, "value": rate} for name, rate in rates.items()]
        return page.with_roofline([*known, step])[-1]["roofline"]

    assert share(1.0, 100.0) == pytest.approx(10.0)  # 1 GB/s are 1000 img/s
    assert share(100.0, 0.5) == pytest.approx(20.0)  # 0.5 TFLOP/s are 500
    assert "roofline" not in page.with_roofline([step])[0]


def test_kernels_and_waits_of_a_trace():
    def event(cat: str, name: str, ts: float, dur: float = 1.0) -> dict:
        return {"cat": cat, "name": name, "ts": ts, "dur": dur}

    events = [
        event("user_annotation", "what is counted", 10.0, 100.0),
        event("gpu_user_annotation", "what is counted", 10.0, 100.0),
        event("kernel", "gemm", 20.0, 3000.0),
        event("kernel", "add", 30.0, 500.0),
        event("kernel", "add", 200.0, 500.0),  # still of what was asked for
        event("gpu_memcpy", "Memcpy", 40.0),
        event("cuda_runtime", "cudaLaunchKernel", 19.0),
        event("cuda_runtime", "cudaStreamSynchronize", 50.0),
        event("cuda_runtime", "cudaDeviceSynchronize", 111.0),  # our own
        {"name": "process_name"},
    ]
    found = profile_of(events)
    assert (found.kernels, found.waits) == (3, 1)
    assert found.top == [("gemm", 1, 3.0), ("add", 2, 1.0)]
    assert profile_of(events[:2]).kernels is None


def test_what_a_checkpoint_costs():
    steps = [900.0, *[10.0] * 3, 40.0, 20.0, 10.0, 10.0, 30.0, 10.0, 10.0, 10.0]
    found = checkpoint.cost(steps, every=4)
    assert found == {"ms": 10.0, "longest_ms": 40.0, "extra_ms": 30.0, "saves": 2}
    with pytest.raises(RuntimeError, match="3 steps"):
        checkpoint.cost(steps[:3], every=4)


def test_results_of_pytest(tmp_path):
    report = tmp_path / "report.xml"
    report.write_text(
        "<testsuites><testsuite><testcase classname='m' name='good'/>"
        "<testcase classname='m' name='off'><skipped message='no'/></testcase>"
        "<testcase classname='m' name='bad'><failure message='1 != 2&#10;more'/>"
        "<error message='and'/></testcase></testsuite></testsuites>"
    )
    counts, *failed = suite.results(report, 7.0)
    assert counts == {"passed": 1, "failed": 1, "skipped": 1, "seconds": 7.0}
    assert [row["reason"] for row in failed] == ["1 != 2", "and"]


@pytest.mark.parametrize(
    "folders",
    [(), ("one",), ("a", "b"), ("images", "masks"), ("train/a", "train/b", "val/a", "val/b")],
)
def test_given_photographs_may_lie_in_any_folders(tmp_path, make_images, folders):
    make_images(tmp_path / "photos", folders)
    task = Task(tmp_path / "work", tmp_path, True, 0.0, photos=tmp_path / "photos")
    task.work.mkdir()
    images = setup.photographs(task)["images"]
    assert images >= setup.TOY_IMAGES and len(ImageFolder(task.images)) == images
    assert setup.packed(task)["images"] == images


def test_of_many_given_photographs_a_part_is_taken(tmp_path, make_images):
    make_images(tmp_path / "photos", per_class=2 * setup.TOY_IMAGES)
    task = Task(tmp_path / "work", tmp_path, True, 0.0, photos=tmp_path / "photos")
    assert setup.photographs(task)["images"] == 2 * setup.TOY_IMAGES


def test_tests_of_a_gpu_do_without_what_the_check_does_not_ask_for(tmp_path, monkeypatch):
    absent = f"import sys; sys.modules.update(dict.fromkeys({EXTRAS.split()}))"
    (tmp_path / "absent.py").write_text(absent)
    monkeypatch.setenv("PYTHONPATH", f"{SCRIPT.parents[1]}:{tmp_path}")
    command = [sys.executable, "-m", "pytest", "--collect-only", "-p", "absent", *suite.files()]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + ran.stderr


def test_what_is_missing_is_named(monkeypatch):
    absent = {"pytest_timeout", "sklearn"}
    monkeypatch.setattr(gpu_check, "_found", lambda module: module not in absent)
    told = sorted(gpu_check.missing(PHASES))
    assert len(told) == 2 and "pytest-timeout" in told[0] and "--photos" in told[1]
    assert len(gpu_check.missing(PHASES, given=True)) == 1
    assert not gpu_check.missing([phase for phase in PHASES if phase.letter == "c"])


def test_it_refuses_what_it_cannot_do(tmp_path, capsys):
    (tmp_path / "rows.jsonl").touch()
    assert gpu_check.main(["--dry", "--only", "a,y", "--out", str(tmp_path)]) == 2
    told = capsys.readouterr().err
    assert "no phase 'y'" in told and "holds a check already" in told


@pytest.mark.slow
def test_a_dry_run_ends_with_a_page(tmp_path):
    command = [sys.executable, SCRIPT, "--dry", "--only", "a,d,g", "--out", tmp_path]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stdout + (tmp_path / "log.txt").read_text()
    told = (tmp_path / "page.md").read_text()
    assert "Nothing failed." in told and "A dry run" in told
    rows = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert {row["phase"] for row in rows} == {SETUP.letter, "a", "d", "g"}
    assert {row["status"] for row in rows} == {"measured"}
    assert str(tmp_path) not in json.dumps(rows)
