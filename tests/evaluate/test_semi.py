"""Semi-supervised losses against the papers' algorithms as loops, and on two moons."""

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import UsageError
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.finetune import finetune
from fastmoco.evaluate.finetune_config import FinetuneConfig
from fastmoco.evaluate.noise import cut_out
from fastmoco.evaluate.semi import (
    AveragedWeights,
    SemiBatch,
    SemiConfig,
    fixmatch,
    mixmatch,
    pseudo,
)

SIDE, CLASSES, LABELLED, MORE = 6, 3, 4, 10


def noise(seed: int = 5) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


@pytest.fixture
def network() -> nn.Module:
    torch.manual_seed(3)
    return nn.Sequential(
        nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(64, CLASSES)
    ).double()


def make_batch(views: int, progress: float = 0.5) -> SemiBatch:
    random = torch.Generator().manual_seed(1)

    def images(count: int) -> torch.Tensor:
        return 2 * torch.randn(count, 3, SIDE, SIDE, generator=random, dtype=torch.float64)

    labels = torch.tensor([0, 2, 1, 2])
    weights = torch.tensor([1.0, 0.5, 2.0, 1.0], dtype=torch.float64)
    unlabelled = tuple(images(MORE) for _ in range(views))
    return SemiBatch(images(LABELLED), labels, weights, unlabelled, progress, noise())


def minus_log(logits: torch.Tensor, label: int) -> torch.Tensor:
    return torch.logsumexp(logits, 0) - logits[label]


def supervised(logits: torch.Tensor, batch: SemiBatch) -> torch.Tensor:
    terms = [batch.weights[i] * minus_log(logits[i], int(batch.labels[i])) for i in range(LABELLED)]
    return torch.stack(terms).sum() / LABELLED


def naive_fixmatch(network: nn.Module, batch: SemiBatch) -> torch.Tensor:
    weak, strong = batch.views
    logits = network(torch.cat([batch.images, weak, cut_out(strong, noise())]))
    loss = supervised(logits, batch)
    for i in range(MORE):
        certain = torch.softmax(logits[LABELLED + i].detach(), 0)
        if certain.max() >= 0.5:
            loss = loss + minus_log(logits[LABELLED + MORE + i], int(certain.argmax())) / MORE
    return loss


def naive_mixmatch(network: nn.Module, batch: SemiBatch) -> torch.Tensor:
    numbers, (first, second) = noise(), batch.views
    with torch.no_grad():
        logits = network(torch.cat([first, second]))
    guesses = []
    for i in range(MORE):
        mean = (torch.softmax(logits[i], 0) + torch.softmax(logits[MORE + i], 0)) / 2
        sharp = mean ** (1 / 0.5)
        guesses.append(sharp / sharp.sum())
    inputs = [*batch.images, *first, *second]
    targets = [torch.eye(CLASSES, dtype=torch.float64)[k] for k in batch.labels]
    targets += [*guesses, *guesses]
    order = numbers.permutation(len(inputs))
    shares = [max(share, 1 - share) for share in numbers.beta(0.75, 0.75, len(inputs))]
    assert min(shares) >= 0.5
    pairs = list(zip(shares, order, strict=True))
    mixed = [s * inputs[i] + (1 - s) * inputs[j] for i, (s, j) in enumerate(pairs)]
    wanted = [s * targets[i] + (1 - s) * targets[j] for i, (s, j) in enumerate(pairs)]
    probabilities = torch.softmax(network(torch.stack(mixed)), 1)
    loss = torch.zeros((), dtype=torch.float64)
    for i in range(LABELLED):
        term = -(wanted[i] * probabilities[i].log()).sum()
        loss = loss + batch.weights[i] * term / LABELLED
    weight = 75 * min(1, batch.progress / 0.4)
    for i in range(LABELLED, len(inputs)):
        square = ((probabilities[i] - wanted[i]) ** 2).sum() / CLASSES
        loss = loss + weight * square / (2 * MORE)
    return loss


def naive_pseudo(network: nn.Module, batch: SemiBatch) -> torch.Tensor:
    logits = network(torch.cat([batch.images, *batch.views]))
    loss = supervised(logits, batch)
    weight = 0.0 if batch.progress < 0.1 else min(3.0, 3 * (batch.progress - 0.1) / 0.5)
    for i in range(LABELLED, LABELLED + MORE):
        loss = loss + weight * minus_log(logits[i], int(logits[i].argmax())) / MORE
    return loss


@pytest.mark.parametrize("progress", [0.0, 0.3, 0.9])
@pytest.mark.parametrize(
    ("ours", "naive", "views"),
    [
        (lambda n, b: fixmatch(n, b, 0.5), naive_fixmatch, 2),
        (mixmatch, naive_mixmatch, 2),
        (pseudo, naive_pseudo, 1),
    ],
    ids=["fixmatch", "mixmatch", "pseudo"],
)
def test_loss_and_gradients_are_those_of_the_papers_algorithm(
    network: nn.Module, ours: Callable[..., Any], naive: Any, views: int, progress: float
) -> None:
    batch, results = make_batch(views, progress), []
    taken = ours(network, batch).taken
    assert taken.all() or 0 < taken.sum() < MORE  # of fixmatch, some
    for loss in (
        ours(network, replace(batch, noise=noise())).loss,
        naive(network, replace(batch, noise=noise())),
    ):
        network.zero_grad()
        loss.backward()
        results.append([loss.detach(), *(p.grad.clone() for p in network.parameters())])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("side", [5, 8])
def test_a_cut_out_is_a_square_of_half_the_side_around_a_place(side: int) -> None:
    images = torch.ones(40, 3, side, side)
    found = cut_out(images, noise(side))
    middles = noise(side).random((40, 2)) * side
    for image, (y, x) in zip(found, middles, strict=True):
        for row in range(side):
            for column in range(side):
                inside = abs(row + 0.5 - y) < side / 4 and abs(column + 0.5 - x) < side / 4
                assert bool((image[:, row, column] == 0).all()) == inside
    assert (images == 1).all()


def test_the_average_forgets_its_youth() -> None:
    network = nn.BatchNorm1d(2)
    mean, expected = AveragedWeights(network, 0.9), 1.0  # type: ignore[arg-type]
    for step in range(1, 30):
        nn.init.constant_(network.weight, step)
        network.running_mean.fill_(step)
        mean.update()
        keep = min(0.9, step / (9 + step)) if step > 1 else 0.0  # the first is copied
        expected = keep * expected + (1 - keep) * step
        assert mean.network.weight[0].item() == pytest.approx(expected)
        assert mean.network.running_mean[0].item() == pytest.approx(expected)


def moons(count: int, seed: int, spread: float = 0.08) -> tuple[torch.Tensor, torch.Tensor]:
    """Return points of two half circles, one inside the other's opening, and which is whose."""
    random = np.random.default_rng(seed)
    labels = np.arange(count) % 2
    angle = np.pi * random.random(count)
    upper = np.stack([np.cos(angle), np.sin(angle)], axis=1)
    points = np.where(labels[:, None] == 0, upper, [1, 0.5] - upper)
    points = points + random.normal(0, spread, points.shape)
    return torch.tensor(points, dtype=torch.float32), torch.tensor(labels)


def train_on_moons(method: str | None, seed: int) -> float:
    """Return the accuracy with three labels a class."""
    torch.manual_seed(seed)
    points, labels = moons(1000, seed)
    chosen = torch.cat([torch.where(labels == k)[0][:3] for k in (0, 1)])
    network = nn.Sequential(
        *(nn.Linear(2, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 2))
    )
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    second = 0.25 if method == "fixmatch" else 0.03
    for step in range(1500):
        rows = points[torch.randint(1000, (64,))]

        def shaken(by: float, rows: torch.Tensor = rows) -> torch.Tensor:
            return rows + by * torch.randn_like(rows)

        batch = SemiBatch(
            (points[chosen] + 0.03 * torch.randn(6, 2))[:, :, None, None],
            labels[chosen],
            torch.ones(6),
            tuple(shaken(by)[:, :, None, None] for by in (0.03, second)),
            step / 1500,
            np.random.default_rng(step),
        )

        def forward(images: torch.Tensor) -> torch.Tensor:
            return network(images.flatten(1))

        if method == "fixmatch":
            loss = fixmatch(forward, batch, 0.8).loss
        elif method == "mixmatch":
            loss = mixmatch(forward, batch, weight=1, ramp=1).loss
        else:
            loss = nn.functional.cross_entropy(forward(batch.images), batch.labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    unseen, truth = moons(1000, seed + 100)
    with torch.no_grad():
        return 100 * float((network(unseen).argmax(1) == truth).float().mean())


@pytest.mark.slow
@pytest.mark.timeout(1800)  # half a minute alone
def test_images_without_labels_tell_two_moons_apart(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("fastmoco.evaluate.semi.cut_out", lambda images, noise: images)
    alone, fix, mix = (
        [train_on_moons(method, seed) for seed in range(5)]
        for method in (None, "fixmatch", "mixmatch")
    )
    assert np.median(fix) >= 97 and np.median(fix) >= np.median(alone) + 10
    assert np.mean(mix) >= np.mean(alone) + 2


@pytest.mark.parametrize(("method", "steps"), [("fixmatch", 60), ("mixmatch", 10), ("pseudo", 10)])
def test_a_run_is_tuned_and_says_what_became_of_the_guesses(
    stripes: Evaluation, method: Any, steps: int
) -> None:
    semi = SemiConfig(method, ratio=2, threshold=0.6, ema=0.9)
    tuning = FinetuneConfig(fraction=0.2, steps=steps, batch=12, lr=0.05, semi=semi)
    row = finetune(stripes, tuning, unlabelled=stripes.train.set)
    assert row["protocol"]["semi"]["method"] == method
    assert row["unlabelled"]["samples"] == 120 and row["labels"]["images"] == 24
    looks = row["pseudo_labels"]
    assert [look["step"] for look in looks] == list(range(steps // 10, steps + 1, steps // 10))
    assert all(0 <= look["coverage"] <= 1 for look in looks)
    if method != "fixmatch":  # which take every guess, and need more steps than a test has
        assert {look["coverage"] for look in looks} == {1}
    else:
        assert row["top1"] > 64 and row["last_weights"]["top1"] > 64  # chance: 33 %
        assert looks[-1]["precision"] > 0.5


def test_labels_of_the_unlabelled_change_nothing_but_their_precision(
    stripes: Evaluation,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    semi = SemiConfig("fixmatch", ratio=2, threshold=0.4)
    tuning = FinetuneConfig(fraction=0.2, steps=10, batch=12, semi=semi)
    told = finetune(stripes, tuning, unlabelled=ShardSet(stripes.train.set.root))
    unlabelled = ShardSet(stripes.train.set.root)
    monkeypatch.setattr(unlabelled, "labels", lambda: np.full(120, -1, np.int32))
    blind = finetune(stripes, tuning, unlabelled=unlabelled)
    assert blind["top1"] == told["top1"] and blind["per_class"] == told["per_class"]
    assert "precision" not in blind["pseudo_labels"][-1]
    assert blind["pseudo_labels"][-1]["coverage"] == told["pseudo_labels"][-1]["coverage"]


def test_too_few_images_and_half_a_request_are_refused(
    stripes: Evaluation,
    stripe_sets: tuple[Path, Path],
    run: Callable[..., tuple[int, str, str]],
) -> None:
    tuning = FinetuneConfig(steps=3, batch=24, semi=SemiConfig("fixmatch"))
    with pytest.raises(UsageError, match="168 images without a label"):
        finetune(stripes, tuning, unlabelled=stripes.train.set)
    both = ["--semi", "pseudo", "--unlabelled", stripe_sets[0]]
    for words, told in (
        (both[:2], "--semi and --unlabelled SET go together"),
        (both[2:], "--semi and --unlabelled SET go together"),
        ([*both, "--noise"], "leave --noise out"),
    ):
        code, _, errors = run("finetune", stripes.run.root, *words)
        assert code == 2 and told in errors


def test_the_rate_falls_as_published() -> None:
    from fastmoco.evaluate.semi import falling

    assert falling(0, 100) == 1
    assert falling(100, 100) == pytest.approx(math.cos(7 * math.pi / 16))
