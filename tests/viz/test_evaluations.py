"""A run's evaluations as the report draws them: accuracy against labels, and trainings."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from parsed_page import Parsed

from fastmoco.runs.run_folder import RunFolder
from fastmoco.viz.report import report


def test_accuracy_against_labels_and_how_each_was_trained(
    make_run: Callable[..., RunFolder],
    run: Callable[..., tuple[int, str, str]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = make_run(tmp_path / "run").root
    probe = ("probe", root, "--cached", "--epochs", 3, "--lr", 1, "--lr", 10, "--per-class")
    tune = ("finetune", root, "--steps", 3, "--batch", 8, "--per-class")
    for words in ((*probe, 2), (*probe, 5), (*tune, 2), (*tune, 5, "--noise"), ("knn", root)):
        code, _, err = run(*words, "--device", "cpu")
        assert code == 0, err
    path = root / "evaluations.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    odd = json.dumps(rows[0] | {"step": 3, "top1": 99.0, "curve": None})
    path.write_text(odd + "\n" + path.read_text())
    drawn: list[tuple[str, list[float], list[float]]] = []
    plot = Axes.plot

    def note(self, x, y, *style, **more):  # type: ignore[no-untyped-def]
        drawn.append((more.get("label", ""), np.array(x).tolist(), np.array(y).tolist()))
        return plot(self, x, y, *style, **more)

    monkeypatch.setattr(Axes, "plot", note)
    page = Parsed(report(root, device="cpu"))
    text = " ".join(page.text["numbers"].split())
    assert "; 1 evaluations of others are not in it" in text
    assert ("probe", [8, 20], [rows[0]["top1"], rows[1]["top1"]]) in drawn
    assert ("fine-tuned", [8], [rows[2]["top1"]]) in drawn
    assert ("fine-tuned, noise", [20], [rows[3]["top1"]]) in drawn
    assert ("knn", [40], [rows[4]["top1"]]) in drawn
    for row in rows[:4]:
        curve = [json.loads(line) for line in (root / row["curve"]).read_text().splitlines()]
        if row["kind"] == "probe":
            for place, lr in enumerate((1, 10)):
                of = [point["test_top1"][place] for point in curve]
                assert (f"test, lr {lr}", [1, 2, 3], of) in drawn
            chosen = (1, 10).index(row["chosen"]["lr"])
            of = [point["train_top1"][chosen] for point in curve]
            assert ("training images", [1, 2, 3], of) in drawn
        else:
            of = [point["test_top1"] for point in curve]
            assert (f"test, lr {row['protocol']['lr']:g}", [1, 2, 3], of) in drawn
    assert len(page.alts["numbers"]) == 5
    titles = ["fine-tuned, noise, 20 labels (0004)", "fine-tuned, 8 labels (0003)"]
    assert [alt.split(":")[0] for alt in page.alts["numbers"][1:3]] == titles


def test_without_two_numbers_of_labels_there_is_no_such_picture(page: Path) -> None:
    assert not (page.parent / "accuracy.png").exists()
    assert not list(page.parent.glob("training_*.png"))
