"""Fine-tuning and its baseline: on images that can be learnt, and on several processes."""

import json
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.ops import stochastic_depth

from fastmoco.config.encoder import EncoderSpec
from fastmoco.core.distributed import World
from fastmoco.core.rng import Stream, philox
from fastmoco.errors import UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.finetune import Trial, _losses, finetune
from fastmoco.evaluate.finetune_config import FinetuneConfig
from fastmoco.evaluate.labelled_loader import Crops
from fastmoco.evaluate.noise import cut_out, noisy, strong
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., RunFolder]
QUICK = FinetuneConfig(steps=12, batch=12, seed=1)


@pytest.mark.parametrize("from_scratch", [False, True])
def test_it_learns_and_says_how(stripes: Evaluation, from_scratch: bool) -> None:
    """Chance is 33 %: five standard errors of 60 guesses end at 64 %."""
    tuning = FinetuneConfig(steps=60, batch=24, from_scratch=from_scratch, lr=0.05)
    told: list[tuple[int, int]] = []
    row = finetune(stripes, tuning, lambda done, of: told.append((done, of)))
    assert row["top1"] > 80
    assert row["kind"] == "finetune" and row["budget"] == {"steps": 60, "images_seen": 1440}
    assert row["protocol"]["from_scratch"] is from_scratch
    assert (row["protocol"]["lr"], row["protocol"]["epochs"]) == (0.05, 12)
    assert row["protocol"]["head_lr"] == pytest.approx(0.05 if from_scratch else 0.25)
    assert len(row["per_class"]) == 3 and row["top5"] == 100
    assert told[-1] == (60, 60) and len(told) == 60
    lines = (stripes.run.root / "evaluations.jsonl").read_text().splitlines()
    assert json.loads(lines[-1]) == json.loads(json.dumps(row))
    stored = np.load(stripes.run.root / row["predictions"])
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


def test_an_untrained_network_would_not_pass(stripes: Evaluation) -> None:
    row = finetune(stripes, FinetuneConfig(steps=1, batch=24, from_scratch=True, lr=1e-9))
    assert row["top1"] < 64


@pytest.mark.parametrize(("fraction", "each"), [(0.1, 4), (0.01, 1), (0.5, 20)])
def test_a_fraction_is_of_every_class(stripes: Evaluation, fraction: float, each: int) -> None:
    row = finetune(stripes, replace(QUICK, steps=1, fraction=fraction))
    assert row["labels"] == {
        "images": 3 * each,
        "per_class": {"down": each, "flat": each, "none": each},
    }
    assert row["protocol"]["batch"] == min(12, 3 * each)


def test_everything_moves_and_is_saved(stripes: Evaluation, tmp_path: Path) -> None:
    finetune(stripes, QUICK, save=tmp_path / "tuned")
    weights = torch.load(tmp_path / "tuned" / "weights.pt", weights_only=True)
    before = stripes.encoder.backbone.state_dict()
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
        finetune(stripes, QUICK, save=tmp_path / "tuned")


def test_it_starts_from_the_run_or_from_its_seed(stripes: Evaluation) -> None:
    from fastmoco.evaluate.finetune import _network

    pretrained, scratch, again, other = (
        _network(stripes, replace(QUICK, from_scratch=fresh, seed=seed)).state_dict()
        for fresh, seed in ((False, 1), (True, 1), (True, 1), (True, 2))
    )
    key = "backbone.layer2.0.conv1.weight"
    assert torch.equal(pretrained[key], stripes.encoder.state_dict()[key])
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
def test_normalization_and_size_are_written_down(stripes: Evaluation, normalize: Any) -> None:
    row = finetune(stripes, replace(QUICK, steps=1, normalize=normalize, size=24))
    means = {
        "run": stripes.preprocessing.mean,
        "imagenet": (0.485, 0.456, 0.406),
        "set": tuple(stripes.train.set.manifest.mean),
    }
    assert tuple(row["protocol"]["mean"]) == means[normalize]
    assert row["protocol"]["size"] == 24
    assert stripes.preprocessing.size == 16


def test_it_leaves_its_curve(stripes: Evaluation) -> None:
    """20 rows, the last of them of the tested network."""
    row = finetune(stripes, FinetuneConfig(steps=50, batch=24, from_scratch=True, lr=0.05))
    lines = (stripes.run.root / row["curve"]).read_text().splitlines()
    found = [json.loads(line) for line in lines]
    assert [one["step"] for one in found] == [(5 * n + 1) // 2 for n in range(1, 21)]
    assert found[-1]["test_top1"] == row["top1"] and found[-1]["test_images"] == 60
    assert 0.5 * found[0]["loss"] > found[-1]["loss"]
    assert found[-1]["train_top1"] > 80 > found[0]["train_top1"]
    row = finetune(stripes, FinetuneConfig(steps=2, batch=24, from_scratch=True, lr=1e-9))
    lines = (stripes.run.root / row["curve"]).read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in lines]
    assert losses == pytest.approx(2 * [np.log(3)], abs=0.1)  # of untrained weights: no sum of both


def test_a_rate_is_chosen_by_labels_held_out(stripes: Evaluation) -> None:
    """There need be no test set for it."""
    from fastmoco.evaluate.finetune import _choose

    tuning = FinetuneConfig(steps=40, batch=24, from_scratch=True, lrs=(1e-9, 0.05))
    untested = replace(stripes, test=None)  # type: ignore[arg-type]
    chosen = _choose(untested, stripes.train, None, tuning, lambda done, steps: None)
    assert (chosen["lr"], chosen["by"], chosen["images"]) == (0.05, "holdout", 12)
    low, high = (one["top1"] for one in chosen["candidates"])
    assert low < 64 and high > 80


def test_the_chosen_rate_is_trained_again_on_all_labels(stripes: Evaluation) -> None:
    """As if it alone were given."""
    row = finetune(stripes, replace(QUICK, steps=3, lrs=(0.01, 0.02)))
    lr = row["chosen"]["lr"]
    alone = finetune(stripes, replace(QUICK, steps=3, lr=lr, lrs=(lr,)))
    found = []
    for one in (row, alone):
        with np.load(stripes.run.root / one["predictions"]) as stored:
            found.append(stored["confidence"].tolist())
    assert found[0] == found[1]
    assert row["labels"]["images"] == 120 and "chosen" not in alone


def test_by_folds_where_labels_are_few_and_by_the_test_set_if_asked(stripes: Evaluation) -> None:
    tuning = FinetuneConfig(steps=2, batch=6, fraction=0.075, lrs=(0.01, 0.02))
    row = finetune(stripes, tuning)
    assert (row["chosen"]["by"], row["chosen"]["images"]) == ("folds", 9)
    row = finetune(stripes, replace(tuning, choose="test"))
    assert (row["chosen"]["by"], row["chosen"]["images"]) == ("test", 60)
    chosen = max(row["chosen"]["candidates"], key=lambda one: (one["top1"], -one["lr"]))
    assert (row["protocol"]["lr"], row["top1"]) == (chosen["lr"], chosen["top1"])


def test_every_class_equally_often(stripes: Evaluation) -> None:
    """In an epoch of its own, each image of a class as often as others but for one time."""
    counts = (40, 12, 5)
    train = stripes.train
    places = [np.flatnonzero(train.labels == label)[:n] for label, n in enumerate(counts)]
    uneven = train.take(np.sort(np.concatenate(places)))
    for even, each in ((True, [40, 40, 40]), (False, list(counts))):
        crops = Crops(uneven, None, 1, 3, stripes.preprocessing, even=even)
        ids = crops.plan.order(np.arange(crops.plan.samples))
        labels = uneven.labels[np.searchsorted(uneven.ids, ids)]
        assert np.bincount(labels).tolist() == each
        times = np.unique(ids, return_counts=True)[1]
        assert len(times) == 57 and set(times.tolist()) <= ({1, 3, 4, 8} if even else {1})
    row = finetune(replace(stripes, train=uneven), replace(QUICK, even=True))
    assert row["protocol"]["even"] and row["budget"]["steps"] == 12


@pytest.mark.parametrize(("arch", "blocks"), [("resnet10", 4), ("resnet50", 16)])
def test_noise_drops_features_and_branches_while_training(
    arch: str, blocks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Block l of L for the share 0.2 l / L of the samples; half of the features before the head."""
    torch.manual_seed(0)
    network = Encoder(EncoderSpec(arch=arch, stem="small-stride2", head="linear", dim=3)).train()
    names, images = list(network.state_dict()), torch.randn(30, 3, 16, 16)
    last = {"resnet10": "bn2", "resnet50": "bn3"}[arch]
    rates: list[float] = []

    def note(branch: torch.Tensor, rate: float, mode: str, training: bool) -> torch.Tensor:
        rates.append(rate)
        return stochastic_depth(branch, rate, mode, training)

    monkeypatch.setattr("fastmoco.evaluate.noise.stochastic_depth", note)
    seen: dict[str, torch.Tensor] = {}
    network.backbone.register_forward_hook(lambda m, given, out: seen.update(features=out))
    before, state = network(images), torch.get_rng_state()
    with noisy(network, 3), torch.no_grad():
        assert list(network.state_dict()) == names
        branch = network.backbone.layer4[-1].get_submodule(last)
        hook = branch.register_forward_hook(lambda m, given, out: seen.update(branch=out + 0))
        network.head.register_forward_hook(lambda m, given, out: seen.update(shown=given[0]))
        first, second = network(images), network(images)
        hook.remove()
        assert rates == pytest.approx([0.2 * n / blocks for n in range(1, blocks + 1)] * 2)
        quiet = network.eval()(images)
    skipped = (seen["branch"] == 0).flatten(1).all(dim=1)
    assert 0 < skipped.sum() < 20
    assert torch.equal(torch.get_rng_state(), state) and not torch.equal(first, second)
    assert torch.equal(network(images), quiet), "in evaluation mode nothing is dropped"
    assert torch.equal(seen["features"], seen["shown"])
    with noisy(network.train(), 3), torch.no_grad():
        assert torch.equal(network(images), first)
        kept = (seen["shown"] != 0)[seen["features"] > 0].float().mean()
    assert kept == pytest.approx(0.5, abs=0.05)
    assert torch.equal(network(images), before), "and no hook stays"


def test_noise_is_refused_where_there_are_no_blocks_to_drop() -> None:
    pytest.importorskip("timm")
    network = Encoder(EncoderSpec(arch="timm:efficientnet_b0", image_size=64))
    with (
        pytest.raises(UsageError, match=r"blocks of a ResNet.*leave --noise out"),
        noisy(network, 0),
    ):
        pass


def test_with_noise_views_are_strong_and_have_a_hole(stripes: Evaluation) -> None:
    quick = replace(QUICK, steps=2, noise=True)
    rows = [finetune(stripes, replace(quick, noise=noise)) for noise in (True, True, False)]
    assert rows[0]["protocol"]["noise"]
    found = [np.load(stripes.run.root / row["predictions"])["confidence"].tolist() for row in rows]
    assert found[0] == found[1] != found[2], "the same seed, the same noise"
    trial, shown = Trial.of(stripes, stripes.train, None, quick), list[torch.Tensor]()

    def keep(images: torch.Tensor) -> torch.Tensor:
        shown.append(images)
        return images.mean(dim=(2, 3))

    given = (stripes.train, None, 24, quick.seed, stripes.preprocessing)
    for cut in (True, False):
        crops = Crops(*given, view=trial.protocol.view(16), cut=cut)
        next(_losses(keep, crops))
    holed, whole = shown
    numbers = np.random.Generator(philox(quick.seed, Stream.NOISE))
    assert torch.equal(holed, cut_out(whole, numbers)) and not torch.equal(holed, whole)
    assert trial.protocol.view(16) == strong(16)


def test_a_weight_of_2_is_the_sample_twice() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    labels, twice = torch.arange(7) % 3, torch.arange(7) % 2 == 0
    weights = 1 + twice.double()
    given: list[Any] = [
        (logits, labels, weights / weights.mean()),
        (torch.cat([logits, logits[twice]]), torch.cat([labels, labels[twice]])),
    ]
    crops: Any = SimpleNamespace(batches=lambda: iter(given))
    (weighted, *_), (copies, *_) = _losses(lambda images: images, crops)
    torch.testing.assert_close(weighted, copies, rtol=1e-12, atol=1e-12)


def test_ranks_that_cannot_share_a_batch_are_refused(stripes: Evaluation) -> None:
    three = replace(stripes, world=World(size=3))
    with pytest.raises(UsageError, match="3 processes cannot share a batch of 8 evenly"):
        finetune(three, FinetuneConfig(steps=1, batch=8))
    with pytest.raises(UsageError, match="4 images on 3 processes leave BatchNorm nothing"):
        finetune(three, FinetuneConfig(steps=1, batch=4))


@pytest.mark.slow
@pytest.mark.dist
def test_two_processes_give_the_probes_and_knns_numbers_of_one(
    make_run: Make, stripe_sets: tuple[Path, Path], tmp_path: Path
) -> None:
    """Gradients are averaged, bank and queries divided; rank 0 alone writes and talks."""
    run = make_run(executor="fused").root
    which = ["--train", str(stripe_sets[0]), "--test", str(stripe_sets[1])]
    probe = [
        "probe",
        str(run),
        *which,
        *["--epochs", "2", "--batch", "12", "--lr", "0.1", "--lr", "1"],
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
