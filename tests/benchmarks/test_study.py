"""Studies: every shipped one names what exists, and the table compares equal seeds."""

import json
import shlex
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import study as module
import yaml
from typer.main import get_command

from fastmoco.cli import app
from fastmoco.config.loading import load_recipe

STUDIES = sorted((Path(module.__file__).parent / "studies").glob("*.yaml"))
NAMES = dict.fromkeys(("train", "test", "sets", "queries", "run"), "some/where") | {"seed": 0}


@pytest.mark.parametrize("path", STUDIES, ids=lambda path: path.stem)
def test_every_command_of_a_study_is_one_of_ours(path: Path) -> None:
    study = module.Study.model_validate(yaml.safe_load(path.read_text()))
    assert len(study.arms) > 1 and study.measures
    for arm in study.arms:
        for line in study.lines(arm):
            name, *words = shlex.split(line.format(**NAMES))
            command = get_command(app).commands[name]
            if name == "pretrain":
                load_recipe(words[0], words[1:])
            else:
                command.make_parser(command.make_context(name, words)).parse_args(words)


def test_arms_are_compared_seed_by_seed_and_run_once(tmp_path, monkeypatch, capsys) -> None:
    numbers = {"base": [50.0, 60.0, 70.0], "better": [51.0, 62.0, 73.0]}
    calls: list[str] = []

    def run(words: list[str], **_: object) -> None:
        folder, arm, seed = words[-3:]
        calls.append(f"{arm} {seed}")
        Path(folder).mkdir()
        row = {"knn_top1": numbers[arm][int(seed)], "epoch": 1}
        (Path(folder) / "metrics.jsonl").write_text(json.dumps(row) + "\n")

    monkeypatch.setattr(module, "subprocess", SimpleNamespace(run=run))
    about = {
        "about": "which",
        "commands": ["pretrain {run} {arm} {seed}"],
        "arms": {"base": "base", "better": "better"},
        "measures": {"kNN": "knn_top1"},
    }
    (tmp_path / "study.yaml").write_text(yaml.safe_dump(about))
    for _ in range(2):
        monkeypatch.setattr(
            sys, "argv", ["study.py", str(tmp_path / "study.yaml"), str(tmp_path / "out")]
        )
        assert module.main() == 0
    assert len(calls) == 6  # the second call found all done
    table = (tmp_path / "out" / "table.md").read_text()
    # Gaps 1, 2, 3: mean 2, deviation 1; Student's 0.975 point of 2 degrees of freedom is 4.303.
    half = 4.3027 / np.sqrt(3)
    assert (
        f"| better | 62.00 | 51.00 62.00 73.00 | +2.00 [{2 - half:+.2f}, {2 + half:+.2f}] |"
        in table
    )
    rows = [json.loads(line) for line in (tmp_path / "out" / "rows.jsonl").read_text().splitlines()]
    assert rows[0]["kind"] == "environment" and len(rows) == 7
