"""Runs as a user starts them: real processes, real kills, exit codes and words."""

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from copies import NO_PIXELS
from states import numbers, status, tensors

from fastmoco.config.loading import load_recipe
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import UsageError
from fastmoco.load.sampler import Plan
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine, check_bn_group

LAUNCHER = Path(__file__).parents[1] / "launch" / "pretrain.py"


def command(recipe: Path, *overrides: str, ranks: int = 1) -> list[str]:
    if ranks == 1:
        return [sys.executable, str(LAUNCHER), str(recipe), *overrides]
    torchrun = [sys.executable, "-m", "torch.distributed.run", f"--nproc_per_node={ranks}"]
    return [*torchrun, "--standalone", str(LAUNCHER), str(recipe), *overrides]


def run(recipe: Path, *overrides: str, ranks: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, *overrides, ranks=ranks), capture_output=True, text=True, timeout=240
    )


def final_state(root: Path) -> dict[str, torch.Tensor]:
    state, step = RunFolder(root).latest()
    assert step == 12
    return tensors(state)


@pytest.mark.slow
def test_sigkill_and_resume_end_bit_equal_to_a_run_in_one_go(recipe, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    assert run(recipe, f"out={whole}").returncode == 0
    process = subprocess.Popen(command(recipe, f"out={killed}"), stdout=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    # Between the checkpoints of steps 4 and 12, in the middle of an epoch of 3 steps.
    while not (killed / "checkpoints" / "step-000000004").exists():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    assert RunFolder(killed).latest()[1] < 12
    assert run(recipe, f"out={killed}").returncode == 0
    ours, theirs = final_state(killed), final_state(whole)
    assert ours.keys() == theirs.keys() and len(ours) > 100
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert numbers(killed) == numbers(whole)


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_train_as_one_does(recipe, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("runtime.precision=fp64", "monitor.validation=0.25", "checkpoints.best=rankme")
    assert run(recipe, f"out={one}", *options).returncode == 0
    done = run(recipe, f"out={two}", *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("untrained") == 1  # rank 0 alone talks
    ours, theirs = final_state(two), final_state(one)
    for name in theirs:
        assert torch.allclose(ours[name].double(), theirs[name].double(), rtol=0, atol=1e-9), name
    rows = list(zip(numbers(one), numbers(two), strict=True))
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-9) for a, b in rows if a["loss"])
    measured = [(a, b) for a, b in rows if "rankme" in a]
    names = ["rankme", "rankme_head", "rankme_images", "alpha_req", "alignment", "uniformity"]
    assert len(measured) == 3 and all("validation_top1" in row for pair in measured for row in pair)
    for a, b in measured:
        assert [a[n] for n in names] == pytest.approx([b[n] for n in names], rel=1e-4, abs=1e-6)
    best = [RunFolder(out / "checkpoints" / "best").latest()[1] for out in (one, two)]
    assert best[0] == best[1]


@pytest.mark.slow
def test_a_run_leaves_what_its_number_depends_on(recipe, tmp_path):
    done = run(recipe)
    assert done.returncode == 0, done.stderr
    folder = RunFolder(tmp_path / "run")
    assert folder.recipe().encoder.mean is not None  # resolved
    assert (folder.root / "versions.json").is_file()
    assert '"code": 0' in (folder.root / "status.json").read_text()
    kinds = [row["kind"] for row in folder.rows()]
    assert kinds.count("step") == 6 and kinds.count("epoch") == 5
    epochs = [row for row in folder.rows() if row["kind"] == "epoch"]
    assert [row["epoch"] for row in epochs if "knn_top1" in row] == [0, 2, 4]
    assert "Chance is a loss of log(21) = 3.04" in done.stdout
    again = run(recipe)
    assert again.returncode == 0 and "step 12" not in again.stdout  # nothing left to do


@pytest.mark.slow
def test_a_checkpoint_of_another_architecture_is_exit_4(recipe, tmp_path):
    assert run(recipe, "schedule.epochs=1").returncode == 0
    done = run(recipe, "encoder.arch=resnet18")
    assert done.returncode == 4
    assert "arch was resnet10, now it is resnet18" in done.stderr
    assert "Traceback" not in done.stderr
    assert "finished step 3" in (tmp_path / "run" / "status.json").read_text()


def test_what_changes_on_the_way_is_told_and_kept(recipe, capsys, tmp_path):
    out = tmp_path / "run"
    assert main([str(recipe), "monitor=null", "stop_epoch=2"]) == 0
    assert (
        main([str(recipe), "monitor=null", "objective.temperature=0.2", "objective.momentum=0.5"])
        == 0
    )
    said = capsys.readouterr().out
    assert "from step 6 on objective.temperature: 0.07 -> 0.2\n" in said
    assert (
        "from step 6 on objective.momentum: 0.9 -> 0.5\n" in said
        and "stop_epoch: 2 -> None" in said
    )
    kept = [load_recipe(str(path)) for path in sorted((out / "configs").iterdir())]
    assert [one.objective.temperature for one in kept] == [0.07, 0.2]
    assert main([str(recipe), "monitor=null", "stop_epoch=2"]) == 0
    words = "already at step 12, past the end of this recipe (step 6, stop_epoch 2): nothing to do"
    assert words in capsys.readouterr().out
    assert status(out) == {"code": 0, "message": words}


def test_the_steps_go_on_while_a_checkpoint_is_written(recipe, tmp_path, monkeypatch):
    """The first one is held until the run waits for it at the next one, two steps later."""
    events, beyond = [], threading.Event()
    take, save = Engine.step, RunFolder.save

    def step(self: Engine, query: object, key: object, number: int, ids: object) -> object:
        events.append(f"step {number + 1}")
        if number + 1 == 4:
            beyond.set()
        return take(self, query, key, number, ids)

    def held(self: RunFolder, state: dict, number: int, *others: object) -> Path:
        assert beyond.wait(30), "the step waits for the checkpoint"
        time.sleep(0.3)  # time for a run that does not wait
        path = save(self, state, number, *others)
        events.append(f"saved {number}")
        return path

    monkeypatch.setattr(Engine, "step", step)
    monkeypatch.setattr(RunFolder, "save", held)
    assert main([str(recipe), "monitor=null", "checkpoints.keep=9"]) == 0
    at = events.index
    assert at("step 4") < at("saved 2") < at("step 5")
    assert events[-1] == "saved 12"  # before the run let go of its folder
    assert len(list((tmp_path / "run" / "checkpoints").iterdir())) == 6


def fails(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main(arguments)
    return code, capsys.readouterr().err


def test_usage_errors_are_exit_2_in_words(recipe, capsys):
    assert fails(capsys, str(recipe), "batch=32") == (
        2,
        "error: batch 32 is larger than the data (24 images): lower `batch` or add images.\n",
    )
    code, words = fails(capsys, str(recipe), "bacth=8")
    assert code == 2 and "did you mean 'batch'" in words
    code, words = fails(capsys, str(recipe), "encoder.arch=resnet19")
    assert code == 2 and "no ResNet 'resnet19'" in words
    code, words = fails(capsys)
    assert code == 2 and "RECIPE" in words


def test_a_missing_set_is_exit_3_and_says_how_to_make_one(recipe, capsys):
    code, words = fails(capsys, str(recipe), "data.sets=[nowhere]")
    assert code == 3 and "`fastmoco shard`" in words


def test_cuda_without_a_gpu_is_exit_2(recipe, capsys):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU")
    code, words = fails(capsys, str(recipe), "runtime.device=cuda")
    assert code == 2 and "set runtime.device=cpu" in words


@pytest.mark.parametrize("choice", ["auto", "cuda"])
def test_a_driver_too_old_for_torch_is_exit_2_in_a_line(recipe, capsys, monkeypatch, choice):
    """torch counts the GPUs of any driver (NVML does), and raises where it first uses one."""

    def init() -> None:
        raise RuntimeError(
            "The NVIDIA driver on your system is too old (found version 12020). Please update your "
            "GPU driver by downloading and installing a new version from the URL: http://...\n"
        )

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 8)
    monkeypatch.setattr(torch.cuda, "init", init)
    code, words = fails(capsys, str(recipe), f"runtime.device={choice}")
    assert code == 2 and words.count("\n") == 1
    assert "too old (found version 12020); this torch is built for CUDA" in words
    assert "update the driver" in words and "set runtime.device=cpu" in words


def test_a_run_folder_in_use_is_exit_2(recipe, capsys, tmp_path):
    with RunFolder(tmp_path / "run").locked():
        code, words = fails(capsys, str(recipe))
    assert code == 2 and "in use by another process" in words


@pytest.mark.skipif(os.geteuid() == 0, reason="root may write anywhere")
def test_a_read_only_run_folder_is_exit_2(recipe, capsys, tmp_path):
    tmp_path.chmod(0o500)
    code, words = fails(capsys, str(recipe))
    assert code == 2 and "Cannot write" in words


def test_a_rank_holds_a_whole_number_of_bn_groups():
    recipe = load_recipe("moco_v2_imagenet_r50")  # 256 in groups of 32
    for ranks in (1, 2, 4, 8):
        check_bn_group(recipe, ranks)
    for ranks, fitting in ((3, 2), (5, 4), (16, 8)):
        with pytest.raises(UsageError, match=f"start {fitting} ranks"):
            check_bn_group(recipe, ranks)


def test_divergence_is_exit_5(recipe, capsys):
    code, words = fails(
        capsys, str(recipe), "optimizer.lr=1e30", "runtime.max_skipped=2", "monitor=null"
    )
    assert code == 5 and "steps in a row gave a non-finite gradient" in words


@pytest.fixture
def damaged(recipe, small_set, tmp_path) -> int:
    """The id of a sample that is zeroed in the recipe's own copy of the data."""
    root = Path(shutil.copytree(small_set.root, tmp_path / "damaged", ignore=NO_PIXELS))
    row, entry = 11, small_set.samples[11]
    with (root / "shard-000000.tar").open("r+b") as shard:
        shard.seek(int(entry["offset"]))
        shard.write(bytes(int(entry["size"])))
    values = yaml.safe_load(recipe.read_text())
    recipe.write_text(yaml.safe_dump(values | {"data": {"sets": [str(root)]}}))
    return row


def test_a_damaged_image_ends_the_run_unless_told_otherwise(recipe, damaged, capsys, tmp_path):
    assert main([str(recipe)]) == 3
    assert "sample 11 (cow/" in capsys.readouterr().err
    assert main([str(recipe), "data.max_bad_images=1"]) == 0
    assert capsys.readouterr().out.count("goes on without sample 11 (cow/") == 1
    folder = RunFolder(tmp_path / "run")
    (told,) = [row for row in folder.rows() if row["kind"] == "bad"]
    assert told["ids"] == [11]
    assert folder.latest()[0]["bad"] == [11]


@pytest.mark.slow
@pytest.mark.dist
def test_two_ranks_know_of_the_same_damage(recipe, damaged, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    options = ("data.max_bad_images=1", "runtime.precision=fp64")
    assert run(recipe, f"out={one}", *options).returncode == 0
    done = run(recipe, f"out={two}", *options, ranks=2)
    assert done.returncode == 0, done.stderr
    assert RunFolder(two).latest()[0]["bad"] == [11]
    rows = zip(numbers(one), numbers(two), strict=True)
    assert all(a["loss"] == pytest.approx(b["loss"], abs=1e-9) for a, b in rows if a.get("loss"))


@pytest.mark.slow
@pytest.mark.dist
def test_the_ranks_share_one_budget(recipe, damaged, tmp_path):
    """Two damaged samples, of which one batch of two ranks holds one each."""
    values = yaml.safe_load(recipe.read_text())
    root = Path(values["data"]["sets"][0])
    shown = Plan(24, 8, 0).order(np.arange(24)).tolist()
    place = shown.index(damaged)
    other = shown[place - place % 8 + (place % 8 + 4) % 8]
    entry = ShardSet(root, check=False).samples[other]
    with (root / "shard-000000.tar").open("r+b") as shard:
        shard.seek(int(entry["offset"]))
        shard.write(bytes(int(entry["size"])))
    done = run(recipe, "data.max_bad_images=1", ranks=2)
    assert done.returncode != 0
    told = status(tmp_path / "run")
    assert (
        told["code"] == 3
        and "2 damaged images are more than data.max_bad_images=1" in told["message"]
    )


def test_a_changed_subset_is_another_run(recipe, capsys, tmp_path):
    (tmp_path / "ids.txt").write_text("\n".join(str(i) for i in range(16)))
    options = [f"data.subset.ids={tmp_path}/ids.txt", "schedule.epochs=1"]
    assert main([str(recipe), *options]) == 0
    assert RunFolder(tmp_path / "run").latest()[1] == 2  # steps of 8 in 16 samples
    (tmp_path / "ids.txt").write_text("\n".join(str(i) for i in range(1, 17)))
    assert main([str(recipe), *options]) == 4
    assert "order was" in capsys.readouterr().err


@pytest.fixture
def weighted(recipe: Path, tmp_path: Path) -> str:
    """An override that shows half of the 24 samples three times as often as the others."""
    lines = [f"{sample},{1 + 2 * (sample % 2)}" for sample in range(24)]
    (tmp_path / "weights.csv").write_text("\n".join(["sample,weight", *lines]) + "\n")
    return f"data.weights={tmp_path}/weights.csv"


@pytest.mark.slow
@pytest.mark.dist
def test_weights_on_two_ranks_and_after_a_restart(recipe, weighted, tmp_path):
    """The run of one rank in one go, that of two, and one that was stopped in between."""
    one, two, halves = (tmp_path / name for name in ("one", "two", "halves"))
    arguments = [str(recipe), "monitor=null", "runtime.precision=fp64", weighted]
    assert main([*arguments, f"out={one}"]) == 0
    assert main([*arguments, f"out={halves}", "stop_epoch=2"]) == 0
    assert main([*arguments, f"out={halves}"]) == 0
    done = run(*arguments, f"out={two}", ranks=2)
    assert done.returncode == 0, done.stderr
    wanted, stopped, shared = (final_state(root) for root in (one, halves, two))
    assert all(torch.equal(wanted[name], stopped[name]) for name in wanted)
    for name in wanted:
        gap = (shared[name].double() - wanted[name].double()).abs().max()
        assert gap < 1e-9, name


def test_changed_weights_are_another_run(recipe, weighted, capsys, tmp_path):
    arguments = [str(recipe), "monitor=null", "schedule.epochs=1", weighted]
    assert main(arguments) == 0
    file = tmp_path / "weights.csv"
    file.write_text(file.read_text().replace("\n23,3\n", "\n23,3.01\n"))
    assert main(arguments) == 4
    assert "order was" in capsys.readouterr().err
    file.unlink()
    assert main(arguments) == 3
    assert "weights.csv cannot be read as numbers" in capsys.readouterr().err
