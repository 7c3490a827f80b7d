"""Checkpoints that can be trusted: whole, verified, of this run."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml

from fastmoco.config.loading import load_recipe
from fastmoco.errors import CheckpointError, UsageError
from fastmoco.runs.run_folder import RunFolder

MARKS = {"batch": 8, "arch": "resnet18"}


def save(run: RunFolder, *steps: int, keep: int = 2) -> None:
    for step in steps:
        run.save({"weights": torch.full((4096,), float(step))}, step, MARKS, keep)


@pytest.fixture
def run(tmp_path: Path) -> RunFolder:
    folder = RunFolder(tmp_path / "run")
    folder.checkpoints.mkdir(parents=True)
    return folder


def test_the_newest_comes_back_and_old_ones_go(run):
    save(run, 1, 2, 10)
    state, step = run.latest(MARKS)
    assert step == 10 and torch.equal(state["weights"], torch.full((4096,), 10.0))
    assert [p.name for p in sorted(run.checkpoints.iterdir())] == [
        "step-000000002",
        "step-000000010",
    ]


def save_measured(run: RunFolder, **numbers: float | None) -> None:
    """Save steps 1, 2, ...: `save_measured(run, a=3.0, b=None, ...)`; None: not measured."""
    for step, number in enumerate(numbers.values(), 1):
        measured = {} if number is None else {"rankme": number, "rankme_images": 24}
        run.save({"weights": torch.full((8,), float(step))}, step, MARKS, 2, measured, "rankme")


def steps(run: RunFolder) -> list[int]:
    return sorted(int(path.name[5:]) for path in run.checkpoints.glob("step-*"))


def test_the_best_one_stays_beside_the_newest_until_a_better_one_comes(run):
    save_measured(run, a=3.0, b=5.0, c=None, d=5.0, e=4.0)
    assert steps(run) == [2, 4, 5], "of two equal ones the older"
    assert run.latest(MARKS)[1] == 5
    assert run.measured_best("rankme", 5)["rankme"] == 5.0
    assert run.measured_best("rankme", 1) == run.measured_best("knn_top1", 5) == {}
    save(run, 6)  # by a recipe that has no best any more
    assert steps(run) == [5, 6]


def test_numbers_over_other_counts_of_images_are_not_compared(run):
    save_measured(run, a=9.0, b=1.0, c=2.0)
    assert steps(run) == [1, 2, 3]
    more = {"rankme": 4.0, "rankme_images": 25}
    run.save({"weights": torch.zeros(8)}, 4, MARKS, 2, more, "rankme")
    assert steps(run) == [3, 4] and run.measured_best("rankme", 4) == more


def test_a_checkpoint_can_be_named(run, recipe):
    run.describe(load_recipe(str(recipe), ["checkpoints.best=rankme"]), {})
    save_measured(run, a=1.0, b=5.0, c=4.0, d=3.0)
    named = RunFolder(run.checkpoints / "best")
    assert named.root == run.root and named.latest()[1] == 2
    assert RunFolder(run.checkpoints / "step-000000003").latest()[1] == 3
    with pytest.raises(CheckpointError, match=r"no step-000000001 in .*there are: step-000000002"):
        RunFolder(run.checkpoints / "step-000000001").latest()
    (run.checkpoints / "step-000000002" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match=r"step-000000002 .*is damaged"):
        named.latest()
    with pytest.raises(UsageError, match=f"names a checkpoint; name its run: out={run.root}"):
        named.locked().__enter__()
    run.describe(load_recipe(str(recipe)), {})
    with pytest.raises(CheckpointError, match=r"best one is known of runs with checkpoints\.best"):
        named.latest()


def test_a_run_in_a_folder_that_is_called_checkpoints_is_a_run(tmp_path):
    root = tmp_path / "checkpoints" / "best"
    assert RunFolder(root).root == root


def test_no_checkpoint_is_no_error(run):
    assert run.latest(MARKS) is None


@pytest.mark.parametrize("where", [0, 5000, -1])
def test_a_flipped_byte_falls_back_to_the_one_before(run, where):
    save(run, 1, 2)
    path = run.checkpoints / "step-000000002" / "state.pt"
    content = bytearray(path.read_bytes())
    content[where] ^= 1
    path.write_bytes(content)
    assert run.latest(MARKS)[1] == 1


@pytest.mark.parametrize("name", ["state.pt", "manifest.json"])
def test_a_truncated_or_missing_file_falls_back(run, name):
    save(run, 1, 2, 3, keep=3)
    first, second = (run.checkpoints / f"step-00000000{n}" / name for n in (3, 2))
    first.write_bytes(first.read_bytes()[:-20])
    second.unlink()
    assert run.latest(MARKS)[1] == 1


def test_all_damaged_is_refused_and_named(run):
    save(run, 1)
    (run.checkpoints / "step-000000001" / "state.pt").write_bytes(b"")
    with pytest.raises(CheckpointError, match="step-000000001"):
        run.latest(MARKS)


def test_another_run_is_refused_with_field_old_and_new(run):
    save(run, 1)
    with pytest.raises(CheckpointError, match="arch was resnet18, now it is resnet50"):
        run.latest({**MARKS, "arch": "resnet50"})


def test_a_newer_format_is_refused_in_words(run):
    save(run, 1)
    path = run.checkpoints / "step-000000001" / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"format_version": 99}))
    with pytest.raises(CheckpointError, match="upgrade fastmoco"):
        run.latest(MARKS)


def test_a_pickle_in_a_checkpoint_is_not_run(run, tmp_path):
    sentinel = tmp_path / "sentinel"

    class Bomb:
        def __reduce__(self):
            return (Path.touch, (sentinel,))

    run.save({"bomb": Bomb()}, 1, MARKS, keep=2)
    with pytest.raises(Exception, match="Weights only load failed"):
        run.latest(MARKS)
    assert not sentinel.exists()


@pytest.mark.parametrize(
    "moment", ["torch.save", "fastmoco.runs.checkpoints.write_json", "pathlib.Path.rename"]
)
def test_sigkill_while_saving_keeps_the_last_good_one(run, moment):
    save(run, 1)
    module, name = moment.rsplit(".", 1)
    target = "pathlib.Path" if module == "pathlib.Path" else module
    code = f"""
import os, signal, torch, pathlib, fastmoco.runs.run_folder
from fastmoco.runs.run_folder import RunFolder
real = {target}.{name}
def dies(*a, **k):
    if {name!r} == "save":
        real(*a, **k)
    os.kill(os.getpid(), signal.SIGKILL)
{target}.{name} = dies
RunFolder({str(run.root)!r}).save({{"weights": torch.zeros(4096)}}, 2, {MARKS!r}, 2)
"""
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -9
    assert run.latest(MARKS)[1] == 1
    with run.locked():
        assert [p.name for p in run.checkpoints.iterdir()] == ["step-000000001"]


@pytest.mark.parametrize("moment", ["pathlib.Path.rename", "shutil.rmtree"])
def test_sigkill_while_saving_keeps_the_best_one_too(run, recipe, moment):
    """Before the new one has its name, and after it has, while old ones go."""
    run.describe(load_recipe(str(recipe), ["checkpoints.best=rankme"]), {})
    save_measured(run, a=5.0, b=1.0, c=2.0)
    _, name = moment.rsplit(".", 1)
    code = f"""
import os, pathlib, shutil, signal, torch
from fastmoco.runs.run_folder import RunFolder
real = {moment}
def dies(path, *a, **k):
    if "step-" in str(path) and path.exists() and not path.name.startswith("."):
        real(path / "state.pt" if {name!r} == "rmtree" else path, *a, **k)
        os.kill(os.getpid(), signal.SIGKILL)
    if {name!r} == "rename":
        os.kill(os.getpid(), signal.SIGKILL)
    real(path, *a, **k)
{moment} = dies
measured = {{"rankme": 3.0, "rankme_images": 24}}
RunFolder({str(run.root)!r}).save({{"w": torch.zeros(8)}}, 4, {MARKS!r}, 2, measured, "rankme")
"""
    died = subprocess.run([sys.executable, "-c", code], check=False)
    assert died.returncode == -9
    saved = moment == "shutil.rmtree"
    assert run.latest(MARKS)[1] == (4 if saved else 3)
    assert RunFolder(run.checkpoints / "best").latest()[1] == 1
    save_measured(run, a=5.0, b=1.0, c=2.0, d=3.0)  # as the resumed run does
    assert steps(run) == [1, 3, 4]


def test_two_processes_cannot_hold_one_folder_and_a_dead_one_lets_go(run):
    code = f"""
import time
from fastmoco.runs.run_folder import RunFolder
with RunFolder({str(run.root)!r}).locked():
    print("held", flush=True)
    time.sleep(60)
"""
    holder = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    with holder:
        assert holder.stdout.readline() == "held\n"
        with pytest.raises(UsageError, match="in use by another process"), run.locked():
            pass
        holder.kill()
    with run.locked():
        pass


def test_metrics_after_the_checkpoint_are_dropped_and_a_cut_row_is_skipped(run):
    for step in (1, 2, 3):
        run.log({"step": step})
    with run.metrics.open("a") as stream:
        stream.write('{"step": 4, "lo')
    run.rewind(2)
    assert run.rows() == [{"step": 1}, {"step": 2}]


def test_each_recipe_is_kept_by_the_step_that_it_held_from(run):
    def start(step: int, t: float) -> list[str]:
        return run.describe(load_recipe("demo", [f"objective.temperature={t}"]), {}, step)

    def kept() -> dict[int, float]:
        paths = sorted(run.configs.glob("*"))
        return {int(p.stem[5:]): load_recipe(str(p)).objective.temperature for p in paths}

    assert start(0, 0.1) == start(0, 0.2) == start(24, 0.2) == [] and not kept()
    assert start(30, 0.3) == ["objective.temperature: 0.2 -> 0.3"]
    assert start(36, 0.3) == []
    assert start(48, 0.4) == ["objective.temperature: 0.3 -> 0.4"]
    assert kept() == {0: 0.2, 30: 0.3, 48: 0.4} and run.recipe().objective.temperature == 0.4
    assert start(36, 0.5) == ["objective.temperature: 0.3 -> 0.5"]  # 48 was damaged
    assert kept() == {0: 0.2, 30: 0.3, 36: 0.5}
    assert start(30, 0.2) == [] and kept() == {0: 0.2}
    assert run.recipe().objective.temperature == 0.2


def test_a_folder_without_a_run_is_refused(tmp_path):
    with pytest.raises(UsageError, match="not a run folder"):
        RunFolder(tmp_path).recipe()


def test_a_step_in_the_manifest_that_was_changed_is_damage(run):
    save(run, 1, 2)
    path = run.checkpoints / "step-000000002" / "manifest.json"
    path.write_text(path.read_text().replace('"step": 2', '"step": 3'))
    assert run.latest(MARKS)[1] == 1
    assert run.damaged == ["step-000000002"]
    path.write_text("[]")
    assert run.latest(MARKS)[1] == 1


def test_damaged_newer_ones_do_not_push_out_good_ones(run):
    save(run, 8, 10, 12, keep=3)
    for step in (10, 12):
        (run.checkpoints / f"step-{step:09d}" / "state.pt").write_bytes(b"")
    assert run.latest(MARKS)[1] == 8
    save(run, 9, keep=2)
    assert run.latest(MARKS)[1] == 9
    (run.checkpoints / "step-000000009" / "state.pt").write_bytes(b"")
    assert run.latest(MARKS)[1] == 8


def test_a_checkpoint_that_reads_back_otherwise_is_no_checkpoint(run, monkeypatch):
    save(run, 1, 2)
    monkeypatch.setattr("fastmoco.runs.checkpoints.hash_file", lambda path: "another")
    with pytest.raises(OSError, match="other bytes than were written"):
        save(run, 3)
    monkeypatch.undo()
    assert run.latest(MARKS)[1] == 2
    assert len(list(run.checkpoints.iterdir())) == 2  # none went, none half-written came


def test_a_number_that_is_not_finite_is_written_as_null(run):
    run.log({"kind": "step", "step": 1, "loss": float("nan"), "lr": 0.1})
    with run.metrics.open("a") as stream:
        stream.write('{"kind": "st\n{"kind": "step", "step": 2}\n')  # a full disk, then room
    assert [row.get("loss", "none") for row in run.rows()] == [None, "none"]


def test_a_run_of_before_encoder_json_is_read(run, recipe):
    resolved = load_recipe(str(recipe))
    run.describe(resolved, {})
    (run.root / "encoder.json").unlink()
    flat = {"name": "old", "data": ["x"], "out": "y", "views": [{}, {}], "optimizer": {"lr": 0.1}}
    old = flat | {"schedule": {"epochs": 1}, "arch": "resnet18", "stem": "small", "queue": 512}
    run.config.write_text(yaml.safe_dump(old))
    assert (run.spec().arch, run.spec().stem) == ("resnet18", "small")
    assert run.recipe().objective.queue == 512
