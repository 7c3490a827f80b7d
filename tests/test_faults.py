"""What happens to runs happens to these: kills, signals, full disks, dead peers, damage."""

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import ranked
import torch
from states import numbers, status, tensors

from fastmoco.runs.run_folder import RunFolder

pytestmark = pytest.mark.slow
STEPS = 12


def end_of(root: Path) -> tuple[dict[str, torch.Tensor], list[dict]]:
    """Return the last state of a run and its metrics without what depends on the clock."""
    state, step = RunFolder(root).latest()
    return {"step": torch.tensor(step), **tensors(state)}, numbers(root)


def same_end(one: Path, other: Path) -> bool:
    (ours, mine), (theirs, others) = end_of(one), end_of(other)
    assert len(ours) > 100 and len(mine) > 5
    bits = ours.keys() == theirs.keys() and all(torch.equal(ours[n], theirs[n]) for n in ours)
    return bits and mine == others


@pytest.fixture
def log(tmp_path: Path) -> Path:
    return tmp_path / "log"


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("kept") / "whole"


@pytest.fixture
def whole(recipe: Path, tmp_path: Path, log: Path, kept: Path) -> Path:
    """A run in one go; each test has a copy of its own."""
    if not kept.exists():
        assert ranked.finish(ranked.start(log, str(recipe), f"out={kept}")) == [0], ranked.words(
            log
        )
    return shutil.copytree(kept, tmp_path / "whole")


def wait_for(path: Path, timeout_s: float = 60) -> None:
    deadline = time.monotonic() + timeout_s
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.01)


@pytest.mark.parametrize("where", ["sync", "rename", "purge"])
def test_a_kill_while_saving_costs_that_checkpoint_alone(recipe, tmp_path, log, whole, where):
    out = tmp_path / "killed"
    command = (str(recipe), f"out={out}")
    fault = f"kill_in_save:{where}"
    assert ranked.finish(ranked.start(log, *command, fault=fault)) == [-signal.SIGKILL]
    state, step = RunFolder(out).latest()
    assert state and step == (6 if where == "purge" else 2)
    assert ranked.finish(ranked.start(log, *command)) == [0], ranked.words(log)
    assert same_end(out, whole)
    assert not list((out / "checkpoints").glob(".*"))  # nothing half-written is left


@pytest.mark.dist
@pytest.mark.parametrize(
    ("number", "codes"),
    [(signal.SIGTERM, [0, 0]), (signal.SIGUSR1, [0, 0]), (signal.SIGINT, [130, 0])],
)
def test_a_signal_to_one_rank_stops_both_at_one_step(recipe, tmp_path, log, number, codes):
    out = tmp_path / "run"
    command = (str(recipe), f"out={out}", "checkpoints.every=1000")
    ranks = ranked.start(log, *command, ranks=2, fault="slow:0.5")
    wait_for(out / "metrics.jsonl")
    time.sleep(2)  # past the untrained kNN, into the steps
    os.kill(ranks[1].pid, number)
    began = time.monotonic()
    assert ranked.finish(ranks) == codes, ranked.words(log)
    assert time.monotonic() - began < 10
    stopped = RunFolder(out).latest()[1]
    assert 0 < stopped < STEPS
    assert status(out)["code"] == codes[0]
    assert f"at step {stopped} of 12" in status(out)["message"]
    # A job script starts again by the marker: not what a person has ended.
    assert (out / "stopped").exists() == (number != signal.SIGINT)
    assert ranked.finish(ranked.start(log, *command, ranks=2)) == [0, 0], ranked.words(log)
    assert RunFolder(out).latest()[1] == STEPS
    assert not (out / "stopped").exists()


@pytest.mark.dist
def test_checkpoints_by_the_clock_are_those_of_rank_0s_clock(recipe, tmp_path, log):
    out = tmp_path / "run"
    clock = (
        "checkpoints.every=null",
        "checkpoints.minutes=1",
        "checkpoints.keep=9",
        "monitor=null",
    )
    command = (str(recipe), f"out={out}", *clock)
    ranks = ranked.start(log, *command, ranks=2, fault="skewed_clock:20")
    assert ranked.finish(ranks) == [0, 0], ranked.words(log)
    steps = sorted(int(path.name[5:]) for path in (out / "checkpoints").iterdir())
    assert steps == [4, 7, 10, 12]  # a step after each third; rank 1's minute is every step


@pytest.mark.dist
def test_a_signal_during_the_monitor_is_not_kept_waiting(recipe, tmp_path, log):
    """On one of two ranks, in the untrained kNN, which would take 24 s and more."""
    out = tmp_path / "run"
    ranks = ranked.start(log, str(recipe), f"out={out}", ranks=2, fault="slow_monitor:1")
    wait_for(out / "config.yaml")
    time.sleep(3)
    assert not RunFolder(out).rows()
    os.kill(ranks[1].pid, signal.SIGTERM)
    began = time.monotonic()
    assert ranked.finish(ranks) == [0, 0], ranked.words(log)
    assert time.monotonic() - began < 10
    assert "step 1 of 12" in (out / "stopped").read_text()
    assert "knn_top1" not in RunFolder(out).rows()[0]


@pytest.mark.dist
def test_torchrun_hands_a_signal_on_to_its_ranks(recipe, tmp_path):
    """As a Slurm job meets it: the launcher is told, the ranks save and leave the marker."""
    out = tmp_path / "run"
    launcher = Path(__file__).parents[1] / "launch" / "pretrain.py"
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    options = [f"out={out}", "schedule.epochs=1000", "monitor=null"]
    process = subprocess.Popen(
        [*torchrun, str(launcher), str(recipe), *options],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    wait_for(out / "checkpoints" / "step-000000002", timeout_s=120)
    process.send_signal(signal.SIGTERM)
    process.wait(40)
    assert "of 3000: the same command goes on" in (out / "stopped").read_text()
    assert status(out)["code"] == 0


def test_a_second_signal_ends_the_run_at_once(recipe, tmp_path, log):
    out = tmp_path / "run"
    ranks = ranked.start(log, str(recipe), f"out={out}", fault="stall:0,3")
    wait_for(out / "checkpoints" / "step-000000002")
    time.sleep(1)
    os.kill(ranks[0].pid, signal.SIGTERM)
    os.kill(ranks[0].pid, signal.SIGTERM)  # the launcher's echo of the first
    time.sleep(1.5)
    assert ranks[0].is_alive()
    os.kill(ranks[0].pid, signal.SIGTERM)
    assert ranked.finish(ranks, timeout_s=10) == [128 + signal.SIGTERM]


def test_a_full_disk_costs_a_checkpoint_and_not_the_run(recipe, tmp_path, log, whole):
    out = tmp_path / "run"
    ranks = ranked.start(log, str(recipe), f"out={out}", fault="full_disk:2,3")
    assert ranked.finish(ranks) == [0]
    assert "No checkpoint of step 4 (File too large): make room." in ranked.words(log)
    assert "step-000000002" in ranked.words(log)  # the one that it would go on from
    rows = RunFolder(out).rows()
    assert [row["step"] for row in rows if row["kind"] == "unsaved"] == [4, 6]
    ours, theirs = end_of(out)[0], end_of(whole)[0]
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)


def test_a_disk_that_stays_full_is_exit_4_at_the_end(recipe, tmp_path, log):
    out = tmp_path / "run"
    ranks = ranked.start(log, str(recipe), f"out={out}", fault="full_disk:2,3,4,5,6")
    assert ranked.finish(ranks) == [4]
    assert status(out)["code"] == 4 and "step-000000002" in status(out)["message"]
    assert RunFolder(out).latest()[1] == 2
    assert max(row["step"] for row in RunFolder(out).rows()) == STEPS  # it went on to its end
    assert "Traceback" not in ranked.words(log)


def test_a_damaged_checkpoint_is_named_and_passed_over(recipe, tmp_path, log, whole):
    path = whole / "checkpoints" / "step-000000012" / "state.pt"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert ranked.finish(ranked.start(log, str(recipe), f"out={whole}")) == [0]
    assert "step-000000012 is damaged" in ranked.words(log)
    assert "going on from step 10" in ranked.words(log)
    assert RunFolder(whole).latest()[1] == STEPS


@pytest.mark.dist
def test_a_dead_rank_ends_the_others(recipe, tmp_path, log):
    out = tmp_path / "run"
    command = (str(recipe), f"out={out}", "runtime.stall_s=30")
    began = time.monotonic()
    codes = ranked.finish(ranked.start(log, *command, ranks=2, fault="die:1,5"), 60)
    assert codes[1] == 9 and codes[0] not in (0, -signal.SIGKILL)
    assert time.monotonic() - began < 60
    assert status(out)["code"] == 1 and "step-000000004" in status(out)["message"]


@pytest.mark.dist
@pytest.mark.parametrize("ranks", [1, 2])
def test_a_stalled_rank_ends_the_run_and_shows_where_it_stood(recipe, tmp_path, log, ranks):
    command = (str(recipe), f"out={tmp_path / 'run'}", "monitor=null", "runtime.stall_s=6")
    stalled = ranks - 1
    started = ranked.start(log, *command, ranks=ranks, fault=f"stall:{stalled},5")
    codes = ranked.finish(started, 90)
    assert codes[stalled] == 1 and all(code not in (0, -signal.SIGKILL) for code in codes)
    assert "Timeout (0:00:06)!" in ranked.words(log, stalled)
    assert "ranked.py" in ranked.words(log, stalled)  # the line that sleeps


@pytest.mark.dist
def test_a_run_goes_on_with_another_number_of_ranks(recipe, tmp_path, log):
    """Stopped after six steps, then on one, two and four ranks: the same losses to 1e-9."""
    begun = tmp_path / "begun"
    options = (
        "runtime.precision=fp64",
        "batch=16",
        "runtime.log_every=1",
        "schedule.epochs=10",
        "monitor=null",
    )
    first = (*options, "stop_epoch=6")
    ranked.finish(ranked.start(log, str(recipe), f"out={begun}", *first, ranks=2))
    assert RunFolder(begun).latest()[1] == 6
    losses = {}
    for ranks in (1, 2, 4):
        out = tmp_path / f"on{ranks}"
        shutil.copytree(begun, out)
        started = ranked.start(log, str(recipe), f"out={out}", *options, ranks=ranks)
        assert ranked.finish(started) == [0] * ranks, ranked.words(log)
        rows = [row for row in RunFolder(out).rows() if row["kind"] == "step"]
        losses[ranks] = [row["loss"] for row in rows]
        assert [row["step"] for row in rows] == list(range(1, 11))
    for ranks in (1, 4):
        assert losses[ranks] == pytest.approx(losses[2], abs=1e-9)


@pytest.mark.dist
@pytest.mark.timeout(600)
def test_ten_kills_leave_one_lineage(recipe, tmp_path, log):
    """Two ranks, SIGKILLed at random moments: the end is that of the run in one go, bit by bit."""
    options = ("schedule.epochs=36", "monitor=null", "checkpoints.every=3", "runtime.log_every=3")
    calm, killed = tmp_path / "calm", tmp_path / "killed"
    ranks = ranked.start(log, str(recipe), f"out={calm}", *options, ranks=2)
    assert ranked.finish(ranks, 240) == [0, 0], ranked.words(log)
    moments, reached = random.Random(0), set()
    for kill in range(10):
        command = (str(recipe), f"out={killed}", *options)
        ranks = ranked.start(log, *command, ranks=2, fault="slow:0.05")
        if kill % 3:  # in its steps and saves; every third one while it starts
            wait_for(killed / "checkpoints" / f"step-{max(reached | {0}) + 3:09d}")
        time.sleep(moments.uniform(0, 1))
        assert any(rank.is_alive() for rank in ranks), f"over before kill {kill}"
        for rank in ranks:
            rank.kill()
        ranked.finish(ranks)
        found = RunFolder(killed).latest()
        reached.add(found[1] if found else 0)
    assert len(reached) > 5, "the kills have to meet the run in its steps"
    ranks = ranked.start(log, str(recipe), f"out={killed}", *options, ranks=2)
    assert ranked.finish(ranks, 240) == [0, 0], ranked.words(log)
    assert same_end(killed, calm)
