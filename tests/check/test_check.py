"""`fastmoco bench` and `fastmoco doctor`: they answer, and verdicts follow from the numbers."""

from collections.abc import Callable
from typing import Any

import pytest

from fastmoco.check import doctor, throughput
from fastmoco.check.doctor import examine
from fastmoco.check.throughput import Throughput, Timer
from fastmoco.config.loading import load_recipe
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError
from fastmoco.pretrain import resolve

Run = Callable[..., tuple[int, str, str]]
SMALL = (
    *("encoder.arch=resnet10", "encoder.image_size=32", "batch=8", "objective.bn_group=4"),
    *("objective.queue=16", "runtime.device=cpu", "runtime.threads=1"),
)


@pytest.fixture
def values(small_set: ShardSet) -> dict[str, Any]:
    made = load_recipe("demo", [f"data.sets=[{small_set.root}]", *SMALL, "monitor=null"])
    return resolve(made, small_set).model_dump(mode="json")


def test_bench_answers_on_the_users_own_set(run: Run, small_set: ShardSet) -> None:
    code, said, errors = run("bench", "demo", f"data.sets=[{small_set.root}]", *SMALL, "--steps", 2)
    assert code == 0, errors
    assert [line.split()[0] for line in said.splitlines()[:4]] == [
        *("loader", "step", "together", "data")
    ]
    assert "share the cores" in said or "sets the pace" in said


@pytest.mark.parametrize(
    ("loader", "step", "together", "gpu", "words"),
    [
        (900, 100, 99, True, "The step sets the pace"),
        (80, 100, 70, True, "try runtime.decode=mixed, more runtime.threads"),
        (80, 100, 70, False, "try more runtime.threads"),
        (300, 100, 60, False, "share the cores"),
        (300, 100, 60, True, "fewer runtime.threads"),
    ],
)
def test_the_verdict_follows_from_the_numbers(
    loader: float, step: float, together: float, gpu: bool, words: str
) -> None:
    assert words in Throughput(loader, step, together, 10, gpu).verdict()


def test_the_doctor_looks_at_everything(run: Run, small_set: ShardSet) -> None:
    code, said, errors = run("doctor", small_set.root)
    assert code == 0, errors
    for name in ("Python", "torch", "DALI", "GPU", "CPU cores", "memory", "disk", "reading"):
        assert f"\n{name}" in f"\n{said}", name


def test_the_doctor_names_what_is_missing(monkeypatch: pytest.MonkeyPatch, tmp_path) -> None:
    monkeypatch.setattr("fastmoco.check.doctor._version", lambda package: None)
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    findings = {finding.name: finding for finding in examine()}
    assert findings["torch"].found == "missing"
    assert findings["DALI"].found == "missing; a CPU needs none" and not findings["DALI"].remedy
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    assert "fastmoco[cuda13]" in doctor._dali().remedy
    with pytest.raises(DataError):
        list(examine(tmp_path))


@pytest.mark.parametrize("arm", ["together", "step_alone", "loader_alone"])
def test_an_arm_does_its_steps_and_a_warm_up(arm, values, monkeypatch):
    taken, drawn = [], []
    step, batches = throughput.Engine.step, throughput.Loader.batches

    def counted_step(self, query_view, key_view, number, ids):
        taken.append((number, query_view.shape, query_view.dtype, query_view.stride()))
        return step(self, query_view, key_view, number, ids)

    def counted_batches(self):
        for batch in batches(self):
            drawn.append(batch.step)
            yield batch

    monkeypatch.setattr(throughput.Engine, "step", counted_step)
    monkeypatch.setattr(throughput.Loader, "batches", counted_batches)
    section = Timer()
    found = getattr(throughput, arm)(section, values, steps=2)
    assert found["images"] == 16 and section.seconds > 0
    numbers = list(range(throughput.WARM_UP + 2))
    assert [number for number, *_ in taken] == (numbers if arm != "loader_alone" else [])
    assert drawn == (numbers if arm != "step_alone" else [])


def test_synthetic_batches_look_like_the_loaders(values):
    run = throughput._Run(values)
    real = next(run.loader.batches()).views
    for one, other in zip(real, run.synthetic()[0], strict=True):
        assert (one.shape, one.dtype, one.stride()) == (other.shape, other.dtype, other.stride())


def test_the_share_of_waiting_is_told(values):
    share = throughput.together(Timer(), values, steps=2)["details"]["data_wait_percent"]
    assert 0 < share < 100
