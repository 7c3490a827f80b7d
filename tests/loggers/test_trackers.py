"""The same numbers in TensorBoard and Weights & Biases as in metrics.jsonl."""

import sys

import pytest

from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder

SHORT = ("schedule.epochs=2", "monitor=null")


@pytest.mark.filterwarnings("ignore")  # of their packages
def test_tensorboard_holds_what_metrics_jsonl_holds(recipe, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert main([str(recipe), *SHORT, "runtime.trackers=[tensorboard]"]) == 0
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    rows = [row for row in RunFolder(tmp_path / "run").rows() if row["kind"] == "step"]
    for name in ("loss", "lr", "pretext_top5", "memory_mb"):
        found = {event.step: event.value for event in events.Scalars(f"train/{name}")}
        assert found == pytest.approx({row["step"]: row[name] for row in rows}, rel=1e-6)
    assert [event.step for event in events.Scalars("epoch/loss")] == [3, 6]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_wandb_works_offline(recipe, tmp_path, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    monkeypatch.setenv("WANDB_SILENT", "true")
    assert main([str(recipe), *SHORT, "runtime.trackers=[wandb]"]) == 0
    (record,) = (tmp_path / "run").glob("wandb/offline-run-*/run-*.wandb")
    assert b"train/loss" in record.read_bytes()


def test_a_missing_package_is_exit_2_and_named(recipe, capsys, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert main([str(recipe), *SHORT, "runtime.trackers=[wandb]"]) == 2
    assert "pip install 'fastmoco[trackers]'" in capsys.readouterr().err
