"""No output can end a run: display, metrics, curves, trackers; and none is written over others'."""

import io
import os
import subprocess
import sys

import numpy as np
import pytest
from PIL import Image
from states import status

from fastmoco.core.streams import LastingStream, lasting_output
from fastmoco.core.terminal import echo
from fastmoco.loggers import trackers
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder

SHORT = ("schedule.epochs=1", "monitor=null", "runtime.executor=fused", "runtime.log_every=1")


@pytest.mark.parametrize("kind", ["full", "closed"])
def test_a_log_that_cannot_be_written_does_not_end_the_run(
    kind, recipe, tmp_path, capsys, monkeypatch
):
    reader, writer = os.pipe()
    os.close(reader)
    where = os.open("/dev/full", os.O_WRONLY) if kind == "full" else writer
    # By lines it fails in a write, else in a flush.
    with (
        os.fdopen(where, "w", buffering=1 if kind == "full" else -1) as stream,
        monkeypatch.context() as patch,
    ):
        patch.setattr(sys, "stdout", stream)
        assert main([str(recipe), *SHORT]) == 0
    told = "warning: the output is lost from here on (No space left on device)"
    assert capsys.readouterr().err.count(told) == (kind == "full")
    assert status(tmp_path / "run") == {"code": 0, "message": "finished step 3, epoch 1"}
    assert len(RunFolder(tmp_path / "run").rows()) == 4


def test_a_letter_that_the_terminal_lacks_is_escaped(monkeypatch):
    written = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(written, encoding="cp1251"))
    with lasting_output() as output:
        echo("Ж, é")
        assert output.lost is None
    assert written.getvalue().splitlines() == ["Ж, \\xe9".encode("cp1251")]


def test_a_result_that_cannot_be_shown_is_no_success(small_set, run, monkeypatch):
    with open("/dev/full", "w") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        code, _, err = run("inspect", small_set.root)
    assert code == 2 and "the result could not be shown: No space left on device" in err
    assert not isinstance(sys.stdout, LastingStream)


def test_metrics_curves_and_trackers_warn_once_and_the_run_goes_on(
    recipe, tmp_path, capsys, monkeypatch
):
    def broken(*_: object) -> None:
        raise ConnectionError("the service is gone")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(
        trackers, "_tensorboard", lambda *_: trackers.Tracker("tensorboard", broken, broken)
    )
    monkeypatch.setattr(trackers, "_wandb", broken)
    monkeypatch.setattr(trackers, "find_spec", lambda name: True)
    monkeypatch.setattr(RunFolder, "log", full)
    (tmp_path / "run" / "curves.png").mkdir(parents=True)
    assert main([str(recipe), *SHORT, "runtime.trackers=[tensorboard,wandb]"]) == 0
    err = capsys.readouterr().err
    for what in ("rows of metrics.jsonl (No space", "curves.png (Is a", "some numbers in tensor"):
        assert err.count(f"warning: goes on without {what}") == 1, err
    assert "warning: goes on without wandb (the service is gone)" in err
    assert status(tmp_path / "run")["code"] == 0


def test_a_start_that_finds_no_room_is_exit_2(recipe, tmp_path, capsys):
    (tmp_path / "run" / "status.json").mkdir(parents=True)
    assert main([str(recipe), *SHORT]) == 2
    assert "Cannot write to the run folder" in capsys.readouterr().err


def test_what_the_system_refuses_is_one_line(recipe, tmp_path, capsys, monkeypatch):
    def refused(*_: object) -> None:
        raise PermissionError(13, "Permission denied", "there")

    for step in ("Engine", "load_recipe"):
        monkeypatch.setattr(f"fastmoco.pretrain.{step}", refused)
        assert main([str(recipe), *SHORT]) == status(tmp_path / "run")["code"] == 2
        err = capsys.readouterr().err
        assert err == "error: there: Permission denied: make room, or choose another place\n"


def test_a_refused_start_leaves_a_run_as_it_was(recipe, tmp_path, capsys):
    root = tmp_path / "run"
    assert main([str(recipe), *SHORT]) == 0
    (root / "stopped").write_text("x")
    before = {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()}
    assert main([str(recipe), *SHORT, "encoder.dim=24"]) == 4
    assert before == {p.name: p.read_bytes() for p in root.iterdir() if p.is_file()}
    (root / "checkpoints").rename(tmp_path / "elsewhere")
    assert main([str(recipe), *SHORT]) == 2
    assert "of a run that ended, and its checkpoints are gone" in capsys.readouterr().err
    assert (root / "metrics.jsonl").read_bytes() == before["metrics.jsonl"]
    # Killed before its first checkpoint, it starts anew; what it had logged stays.
    (root / "status.json").write_text('{"code": null, "message": "running"}')
    assert main([str(recipe), *SHORT]) == 0
    assert (root / "metrics-1.jsonl").read_bytes() == before["metrics.jsonl"]
    assert "metrics.jsonl: now metrics-1.jsonl" in capsys.readouterr().out


def test_lines_of_a_log_are_not_broken(recipe, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "30")
    assert main([str(recipe), *SHORT]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line[:6] for line in lines if line.startswith("step ")] == [
        "step 1",
        "step 2",
        "step 3",
    ]
    assert all(line.endswith("%") for line in lines if line.startswith("step "))
    assert any("that is expected." in line and "Chance" in line for line in lines)


def test_help_is_no_error(capsys):
    assert main(["--help"]) == 0
    assert capsys.readouterr().out.startswith("usage: pretrain RECIPE")
    assert main([]) == 2
    asked = [sys.executable, "-m", "fastmoco", "--version"]
    assert (
        subprocess.run(asked, capture_output=True, text=True, check=True).stdout[:9] == "fastmoco "
    )


def test_plots_replace_plots_of_ours_alone(small_set, run, tmp_path, monkeypatch):
    views = (
        "views",
        small_set.root,
        "--recipe",
        "cifar10_r18",
        "runtime.executor=fused",
        "--count",
        1,
    )
    sheet = ("inspect", small_set.root, "--count", 2)
    for command, option in ((views, "--out"), (sheet, "--sheet")):
        for name in ("look", "look.yaml"):
            code, _, err = run(*command, option, tmp_path / name)
            assert code == 2 and "must end in .png" in err
        theirs = tmp_path / "theirs.png"
        Image.fromarray(np.zeros((4, 4), np.uint8)).save(theirs)
        before = theirs.read_bytes()
        code, _, err = run(*command, option, theirs)
        assert code == 2 and "was not drawn here" in err and theirs.read_bytes() == before
        for _ in range(2):
            code, _, err = run(*command, option, tmp_path / "ours.png")
            assert code == 0, err
        code, _, err = run(*command, option, theirs / "under" / "a file.png")
        assert code == 2 and "error: " in err
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(*views, "--out", tmp_path / "ours.png")
    assert code == 2 and "pip install 'fastmoco[report]'" in err
