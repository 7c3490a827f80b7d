"""`compare.py train`: the three arms do as many images; none is timed here."""

import json

import pytest
from compare import app
from comparisons import train as bench
from typer.testing import CliRunner

from fastmoco.errors import DataError

SMALL = [
    "encoder.image_size=32",
    "batch=8",
    "objective.bn_group=4",
    "objective.queue=16",
    "runtime.device=cpu",
]


@pytest.mark.slow
def test_bench_train_from_the_command_line(small_set, tmp_path):
    out = tmp_path / "rows.jsonl"
    options = ["--set", str(small_set.root), "--steps", "2", "--pairs", "1", "--out", str(out)]
    done = CliRunner().invoke(app, ["train", "demo", *SMALL, *options])
    assert done.exception is None, done.output
    *rows, report = map(json.loads, out.read_text().splitlines())
    assert [row["arm"] for row in rows] == ["fastmoco", "step alone", "loader alone"]
    assert [row["images"] for row in rows] == [16, 16, 16]
    assert [found["reference"] for found in report["comparisons"]] == ["step alone", "loader alone"]
    assert report["subject"]["set"] == "set" and report["subject"]["batch"] == 8
    assert str(small_set.root) not in out.read_text()


@pytest.mark.slow
def test_without_a_set_the_demos_patches_are_packed_and_removed():
    pytest.importorskip("skimage")
    with bench._folder(None) as root:
        recipe, opened = bench._recipe("demo", SMALL, root)
        assert len(opened) == 3800 and recipe.encoder.mean
    assert not root.exists()


def test_a_folder_that_is_no_set_is_refused(tmp_path):
    with pytest.raises(DataError, match="manifest"):
        bench.bench_train("demo", SMALL, tmp_path, steps=1, pairs=1)
