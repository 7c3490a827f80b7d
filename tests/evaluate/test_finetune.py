"""Fine-tuning and its baseline: on images that can be learnt, and on several processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from fastmoco.errors import UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.finetune import FinetuneConfig, finetune
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., RunFolder]
QUICK = FinetuneConfig(steps=12, batch=12, seed=1)


def stripes(root: Path, per_class: int, seed: int) -> Path:
    """Write images of noise over stripes: three directions, which neither crop nor flip changes."""
    random = np.random.default_rng(seed)
    down, across = np.mgrid[:24, :24]
    for name, along in (("down", across), ("flat", down), ("none", 0 * down)):
        (root / name).mkdir(parents=True)
        for number in range(per_class):
            wave = 90 * np.sin(1.6 * along + random.uniform(0, 6)) if along.any() else 0 * down
            levels = 128 + wave[..., None] + random.normal(0, 25, (24, 24, 3))
            image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
            image.save(root / name / f"{seed}-{number:03d}.png")
    return root


@pytest.fixture(scope="module")
def sets(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("stripes")
    for name, per_class, seed in (("train", 40, 1), ("test", 20, 2)):
        pack(stripes(root / "source" / name, per_class, seed), root / name, PackOptions())
    return root / "train", root / "test"


@pytest.fixture
def evaluation(make_run: Make, sets: tuple[Path, Path]) -> Evaluation:
    return Evaluation.open(make_run(executor="fused").root, *sets)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_it_learns_and_says_how(evaluation: Evaluation, from_scratch: bool) -> None:
    """Chance is 33 %: five standard errors of 60 guesses end at 64 %."""
    tuning = FinetuneConfig(steps=60, batch=24, from_scratch=from_scratch, lr=0.05)
    told: list[tuple[int, int]] = []
    row = finetune(evaluation, tuning, lambda done, of: told.append((done, of)))
    assert row["top1"] > 80
    assert row["kind"] == "finetune" and row["budget"] == {"steps": 60, "images_seen": 1440}
    assert row["protocol"]["from_scratch"] is from_scratch
    assert (row["protocol"]["lr"], row["protocol"]["epochs"]) == (0.05, 12)
    assert row["protocol"]["head_lr"] == pytest.approx(0.05 if from_scratch else 0.25)
    assert len(row["per_class"]) == 3 and row["top5"] == 100
    assert told[-1] == (60, 60) and len(told) == 60
    lines = (evaluation.run.root / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(row))
    stored = np.load(evaluation.run.root / row["predictions"])
    assert stored["confusion"].sum() == 60
    assert 100 * (stored["label"] == stored["predicted"]).mean() == pytest.approx(row["top1"])


def test_rates_are_scaled_to_the_batch_and_given_ones_are_not() -> None:
    quarter, scratch, given = (
        tuning.resolved(1000, 16)
        for tuning in (
            FinetuneConfig(batch=64),
            FinetuneConfig(batch=512, from_scratch=True),
            FinetuneConfig(batch=64, lr=0.3),
        )
    )
    assert (quarter.lr, quarter.head_lr) == (0.005, 0.025)
    assert (scratch.lr, scratch.head_lr) == (0.2, 0.2)
    assert (given.lr, given.head_lr) == (0.3, 1.5)


def test_an_untrained_network_would_not_pass(evaluation: Evaluation) -> None:
    row = finetune(evaluation, FinetuneConfig(steps=1, batch=24, from_scratch=True, lr=1e-9))
    assert row["top1"] < 64


@pytest.mark.parametrize(("fraction", "each"), [(0.1, 4), (0.01, 1), (0.5, 20)])
def test_a_fraction_is_of_every_class(evaluation: Evaluation, fraction: float, each: int) -> None:
    row = finetune(evaluation, replace(QUICK, steps=1, fraction=fraction))
    assert row["labels"] == {
        "images": 3 * each,
        "per_class": {"down": each, "flat": each, "none": each},
    }
    assert row["protocol"]["batch"] == min(12, 3 * each)


def test_everything_moves_and_is_saved(evaluation: Evaluation, tmp_path: Path) -> None:
    finetune(evaluation, QUICK, save=tmp_path / "tuned")
    weights = torch.load(tmp_path / "tuned" / "weights.pt", weights_only=True)
    before = evaluation.encoder.backbone.state_dict()
    moved = {
        name
        for name, tensor in before.items()
        if not torch.equal(tensor, weights[f"backbone.{name}"])
    }
    assert {name for name in before if "num_batches" not in name} == moved
    assert weights["head.weight"].shape == (3, 512)
    spec = json.loads((tmp_path / "tuned" / "encoder.json").read_text())
    assert (spec["head"], spec["dim"], spec["image_size"]) == ("linear", 3, 16)
    classes = json.loads((tmp_path / "tuned" / "classes.json").read_text())
    assert classes == ["down", "flat", "none"]
    with pytest.raises(UsageError, match=r"exists: choose another folder by --save"):
        finetune(evaluation, QUICK, save=tmp_path / "tuned")


def test_it_starts_from_the_run_or_from_its_seed(evaluation: Evaluation) -> None:
    from fastmoco.evaluate.finetune import _network

    pretrained, scratch, again, other = (
        _network(evaluation, replace(QUICK, from_scratch=fresh, seed=seed)).state_dict()
        for fresh, seed in ((False, 1), (True, 1), (True, 1), (True, 2))
    )
    key = "backbone.layer2.0.conv1.weight"
    assert torch.equal(pretrained[key], evaluation.encoder.state_dict()[key])
    assert torch.equal(scratch[key], again[key])
    assert not torch.equal(scratch[key], other[key])
    assert not torch.equal(scratch[key], pretrained[key])


def test_the_budget_is_steps_then_epochs_then_a_floor() -> None:
    budgets = [
        FinetuneConfig(**given, batch=10).resolved(500, 32).steps
        for given in ({"steps": 7, "epochs": 3}, {"epochs": 3}, {})
    ]
    assert budgets == [7, 150, 1500]
    assert FinetuneConfig(batch=10).resolved(20, 32).steps == 1000


@pytest.mark.parametrize("normalize", ["run", "imagenet", "set"])
def test_normalization_and_size_are_written_down(evaluation: Evaluation, normalize: Any) -> None:
    row = finetune(evaluation, replace(QUICK, steps=1, normalize=normalize, size=24))
    means = {
        "run": evaluation.preprocessing.mean,
        "imagenet": (0.485, 0.456, 0.406),
        "set": tuple(evaluation.train.set.manifest.mean),
    }
    assert tuple(row["protocol"]["mean"]) == means[normalize]
    assert row["protocol"]["size"] == 24
    assert evaluation.preprocessing.size == 16


def test_it_leaves_its_curve(evaluation: Evaluation) -> None:
    """20 rows, the last of them of the tested network."""
    row = finetune(evaluation, FinetuneConfig(steps=50, batch=24, from_scratch=True, lr=0.05))
    lines = (evaluation.run.root / row["curve"]).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["step"] for one in found] == [(5 * n + 1) // 2 for n in range(1, 21)]
    assert found[-1]["test_top1"] == row["top1"] and found[-1]["test_images"] == 60
    assert 0.5 * found[0]["loss"] > found[-1]["loss"]
    assert found[-1]["train_top1"] > 80 > found[0]["train_top1"]
    row = finetune(evaluation, FinetuneConfig(steps=2, batch=24, from_scratch=True, lr=1e-9))
    lines = (evaluation.run.root / row["curve"]).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(2 * [np.log(3)], abs=0.1)  # of untrained weights: no sum of both


def test_a_rate_is_chosen_by_labels_held_out(evaluation: Evaluation) -> None:
    """There need be no test set for it."""
    from fastmoco.evaluate.finetune import _choose

    tuning = FinetuneConfig(steps=40, batch=24, from_scratch=True, lrs=(1e-9, 0.05))
    untested = replace(evaluation, test=None)  # type: ignore[arg-type]
    chosen = _choose(untested, evaluation.train, tuning, lambda done, steps: None)
    assert (chosen["lr"], chosen["by"], chosen["images"]) == (0.05, "holdout", 12)
    low, high = (one["top1"] for one in chosen["candidates"])
    assert low < 64 and high > 80


def test_the_chosen_rate_is_trained_again_on_all_labels(evaluation: Evaluation) -> None:
    """As if it alone were given."""
    row = finetune(evaluation, replace(QUICK, steps=3, lrs=(0.01, 0.02)))
    lr = row["chosen"]["lr"]
    alone = finetune(evaluation, replace(QUICK, steps=3, lr=lr, lrs=(lr,)))
    found = []
    for one in (row, alone):
        with np.load(evaluation.run.root / one["predictions"]) as stored:
            found.append(stored["confidence"].tolist())
    assert found[0] == found[1]
    assert row["labels"]["images"] == 120 and "chosen" not in alone


def test_by_folds_where_labels_are_few_and_by_the_test_set_if_asked(evaluation: Evaluation) -> None:
    tuning = FinetuneConfig(steps=2, batch=6, fraction=0.075, lrs=(0.01, 0.02))
    row = finetune(evaluation, tuning)
    assert (row["chosen"]["by"], row["chosen"]["images"]) == ("folds", 9)
    row = finetune(evaluation, replace(tuning, choose="test"))
    assert (row["chosen"]["by"], row["chosen"]["images"]) == ("test", 60)
    chosen = max(row["chosen"]["candidates"], key=lambda one: (one["top1"], -one["lr"]))
    assert (row["protocol"]["lr"], row["top1"]) == (chosen["lr"], chosen["top1"])


def test_every_class_equally_often(evaluation: Evaluation) -> None:
    """In an epoch of its own, each image of a class as often as others but for one time."""
    counts = (40, 12, 5)
    train = evaluation.train
    places = [np.flatnonzero(train.labels == label)[:n] for label, n in enumerate(counts)]
    uneven = train.take(np.sort(np.concatenate(places)))
    for even, each in ((True, [40, 40, 40]), (False, list(counts))):
        crops = Crops(uneven, None, 1, 3, evaluation.preprocessing, even=even)
        ids = crops.plan.order(np.arange(crops.plan.samples))
        labels = uneven.labels[np.searchsorted(uneven.ids, ids)]
        assert np.bincount(labels).tolist() == each
        times = np.unique(ids, return_counts=True)[1]
        assert len(times) == 57 and set(times.tolist()) <= ({1, 3, 4, 8} if even else {1})
    row = finetune(replace(evaluation, train=uneven), replace(QUICK, even=True))
    assert row["protocol"]["even"] and row["budget"]["steps"] == 12


def test_a_weight_of_2_is_the_sample_twice() -> None:
    from fastmoco.evaluate.finetune import _loss

    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels, twice = torch.arange(7) % 3, torch.arange(7) % 2 == 0
    weights = 1 + twice.double()
    copies = torch.cat([logits, logits[twice]]), torch.cat([labels, labels[twice]])
    weighted = _loss(logits, labels, weights / weights.mean())
    torch.testing.assert_close(weighted, _loss(*copies), rtol=1e-12, atol=1e-12)


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_probes_and_knns_numbers_of_one(
    make_run: Make, sets: tuple[Path, Path], tmp_path: Path
) -> None:
    """Gradients are averaged, bank and queries divided; rank 0 alone writes and talks."""
    run = make_run(executor="fused").root
    which = ["--train", str(sets[0]), "--test", str(sets[1])]
    probe = [
        "probe",
        str(run),
        *which,
        "--epochs",
        "2",
        "--batch",
        "12",
        "--lr",
        "0.1",
        "--lr",
        "1",
    ]
    knn = ["knn", str(run), *which, "--k", "7"]
    rates = ["--lr", "0.01", "--lr", "0.02", "--evenly"]
    tune = ["finetune", str(run), *which, "--steps", "3", "--batch", "8", *rates]
    torchrun = ["-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    main = "import sys; from fastmoco.cli import main; sys.argv[0] = 'fastmoco'; main()"
    (tmp_path / "main.py").write_text(main)
    for command in (probe, knn, tune):
        for start in ([], torchrun):
            done = subprocess.run(
                [sys.executable, *start, str(tmp_path / "main.py"), *command],
                capture_output=True,
                text=True,
                timeout=280,
            )
            assert done.returncode == 0, done.stderr
            assert done.stdout.count("recorded in") == 1
    rows = [json.loads(line) for line in (run / "evaluations.jsonl").read_text().splitlines()]
    assert [row["kind"] for row in rows] == ["probe", "probe", "knn", "knn", "finetune", "finetune"]
    for one, two in (rows[:2], rows[2:4]):
        first, second = (np.load(run / row["predictions"]) for row in (one, two))
        np.testing.assert_allclose(second["confidence"], first["confidence"], atol=1e-4)
        assert np.array_equal(second["predicted"], first["predicted"])
        assert two["top1"] == one["top1"]
    assert rows[0]["chosen"] == rows[1]["chosen"] and rows[0]["chosen"]["by"] == "holdout"
    assert [row["chosen"]["images"] for row in rows[4:]] == [12, 12]
    assert [row["protocol"]["bn_batch"] for row in rows[4:]] == [8, 4]
