"""`fastmoco bench train`: the three arms do as many images, and none of them is timed here."""

import json

import pytest
from typer.testing import CliRunner

from fastmoco.bench import train as bench
from fastmoco.bench.arm import Section
from fastmoco.bench.commands import app
from fastmoco.errors import DataError

SMALL = [
    "encoder.image_size=32",
    "batch=8",
    "objective.bn_group=4",
    "objective.queue=16",
    "runtime.device=cpu",
]


@pytest.fixture
def recipe(small_set) -> dict:
    made, _ = bench._recipe("demo", SMALL, small_set.root)
    return made.model_dump(mode="json")


@pytest.mark.parametrize("arm", ["together", "step_alone", "loader_alone"])
def test_an_arm_does_its_steps_and_a_warm_up(arm, recipe, monkeypatch):
    taken, drawn = [], []
    step, batches = bench.Engine.step, bench.Loader.batches

    def counted_step(self, query_view, key_view, number):
        taken.append((number, query_view.shape, query_view.dtype, query_view.stride()))
        return step(self, query_view, key_view, number)

    def counted_batches(self):
        for batch in batches(self):
            drawn.append(batch.step)
            yield batch

    monkeypatch.setattr(bench.Engine, "step", counted_step)
    monkeypatch.setattr(bench.Loader, "batches", counted_batches)
    section = Section()
    found = getattr(bench, arm)(section, recipe, steps=2)
    assert found["images"] == 16 and section.seconds > 0
    numbers = list(range(bench.WARM_UP + 2))
    assert [number for number, *_ in taken] == (numbers if arm != "loader_alone" else [])
    assert drawn == (numbers if arm != "step_alone" else [])


def test_synthetic_batches_look_like_the_loaders(recipe):
    run = bench._Run(recipe)
    real = next(run.batches()).views
    for one, other in zip(real, run.synthetic()[0], strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_the_share_of_waiting_is_told(recipe):
    share = bench.together(Section(), recipe, steps=2)["details"]["data_wait_percent"]
    assert 0 < share < 100


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
