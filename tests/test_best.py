"""The best checkpoint of a run that measures itself: kept, found by its path, and not forgotten."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fastmoco.evaluate.monitor import RunMonitor
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder

NUMBERS = {0: 99.0, 1: 5.0, 2: 9.0, 3: 7.0, 4: 8.0}  # by epoch; the untrained one does not count


@pytest.fixture
def scripted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """A monitor that says `NUMBERS`; the steps of the saves."""
    saves, save, log = [], RunFolder.save, RunFolder.log
    epochs = [0]

    def measure(self: RunMonitor, *given: Any) -> dict[str, float]:
        return {"rankme": NUMBERS[epochs[0]], "rankme_head": 10.0, "rankme_images": 24}

    def noted(self: RunFolder, state: Any, step: int, *others: Any) -> Path:
        saves.append(step)
        return save(self, state, step, *others)

    def logged(self: RunFolder, row: dict[str, Any]) -> None:
        epochs[0] += row["kind"] == "epoch"
        log(self, row)

    monkeypatch.setattr(RunMonitor, "__call__", measure)
    monkeypatch.setattr(RunFolder, "save", noted)
    monkeypatch.setattr(RunFolder, "log", logged)
    return saves


def names(root: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in (root / "checkpoints").iterdir())


def test_it_stays_through_pruning_and_commands_take_its_path(
    scripted: list[int], recipe: Path, tmp_path: Path, run: Callable[..., tuple[int, str, str]]
) -> None:
    root = tmp_path / "run"
    options = ("checkpoints.best=rankme", "checkpoints.keep=2", "monitor.every=1")
    assert main([str(recipe), *options]) == 0
    assert scripted == [2, 3, 4, 6, 8, 10, 12]
    assert names(root) == [6, 10, 12]
    best = root / "checkpoints" / "best"
    options = ("--cached", "--epochs", 1, "--device", "cpu")
    code, said, _ = run("probe", best, *options)
    assert code == 0 and f"step 6, recorded in {root / 'evaluations.jsonl'}" in said
    code, said, _ = run("export", best, tmp_path / "best.safetensors", "--to", "safetensors")
    assert code == 0 and "of step 6 for safetensors" in said
    code, said, _ = run("export", root, tmp_path / "last.safetensors", "--to", "safetensors")
    assert code == 0 and "of step 12 for" in said


def test_it_is_remembered_by_a_resumed_run(
    scripted: list[int], recipe: Path, tmp_path: Path
) -> None:
    options = ("checkpoints.best=rankme", "checkpoints.every=1000", "monitor.every=1")
    assert main([str(recipe), *options, "stop_epoch=2"]) == 0
    assert scripted == [3, 6]
    assert main([str(recipe), *options]) == 0
    assert scripted == [3, 6, 12] and names(tmp_path / "run") == [6, 12]  # none of epoch 3


def test_a_run_without_labels_says_how_it_goes(
    recipe: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(recipe), "monitor={}", "stop_epoch=1", "checkpoints.best=rankme_head"]) == 0
    said = capsys.readouterr().out
    assert "untrained  RankMe " in said and "kNN" not in said
    (first, last) = [row for row in RunFolder(tmp_path / "run").rows() if row["kind"] == "epoch"]
    assert first["rankme_images"] == last["rankme_images"] == 24
    assert first["rankme"] != last["rankme"] and last["uniformity"] < 0
    assert (tmp_path / "run" / "curves.png").is_file()
