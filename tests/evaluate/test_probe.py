"""The linear probe: parallel heads against separate plain loops, scores against scikit-learn."""

import pytest
import torch
from sklearn.metrics import accuracy_score, top_k_accuracy_score
from torch import nn

from fastmoco.errors import DivergedError
from fastmoco.evaluate.probe import (
    Heads,
    ProbeConfig,
    Score,
    cached_epochs,
    get_best,
    judge,
    probe_cached,
    record,
    scores,
    train_cached,
    train_heads,
)

CLASSES, DIM = 10, 12
RATES = (1 / 64, 0.25, 3.0)  # the heads hold them in fp32
Pair = tuple[torch.Tensor, torch.Tensor]


def clusters(n: int, seed: int, spread: float = 2.0) -> Pair:
    """Return features that gather around a center for each label."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.randint(CLASSES, (n,), generator=generator)
    centers = torch.randn(CLASSES, DIM, generator=torch.Generator().manual_seed(99))
    return centers[labels] + spread * torch.randn(n, DIM, generator=generator), labels


@pytest.fixture(scope="module")
def train() -> Pair:
    return clusters(203, seed=1)


@pytest.fixture(scope="module")
def held_out() -> Pair:
    return clusters(150, seed=2)


def plain_loop(heads: Heads, number: int, data: Pair, protocol: ProbeConfig) -> nn.Linear:
    """Train one head alone, with plain torch, from the same start and in the same order."""
    rows = slice(number * CLASSES, (number + 1) * CLASSES)
    head = nn.Linear(DIM, CLASSES, dtype=torch.float64)
    head.weight.data.copy_(heads.weight[rows])
    head.bias.data.copy_(heads.bias[rows])
    optimizer = torch.optim.SGD(head.parameters(), lr=RATES[number], momentum=0.9)
    milestones = [int(0.6 * protocol.epochs), int(0.8 * protocol.epochs)]
    schedule = torch.optim.lr_scheduler.MultiStepLR(optimizer, milestones, gamma=0.1)
    for batches in cached_epochs(data, protocol):
        for features, labels in batches:
            optimizer.zero_grad()
            nn.functional.cross_entropy(head(features), labels).backward()
            optimizer.step()
        schedule.step()
    return head


def test_each_head_trains_as_if_alone(train: Pair) -> None:
    """In float64: at the highest rate the rounding of fp32 grows a thousandfold."""
    protocol = ProbeConfig(epochs=10, lrs=RATES, batch=50)
    heads = Heads(DIM, CLASSES, RATES).double()
    data = train[0].double(), train[1]
    alone = [plain_loop(heads, number, data, protocol) for number in range(3)]
    train_heads(heads, cached_epochs(data, protocol), 5, protocol)
    weights, biases = heads.weight.view(3, CLASSES, DIM), heads.bias.view(3, CLASSES)
    for number, head in enumerate(alone):
        torch.testing.assert_close(weights[number], head.weight, rtol=1e-9, atol=1e-9)
        torch.testing.assert_close(biases[number], head.bias, rtol=1e-9, atol=1e-9)
    assert not torch.allclose(weights[0], weights[1], atol=0.05)


@pytest.mark.parametrize("epochs", [5, 10, 100])
def test_the_rate_falls_at_60_and_80_percent(epochs: int) -> None:
    rates = [ProbeConfig(epochs=epochs).rate(4 * epoch + 3, 4) for epoch in range(epochs)]
    first, second = 6 * epochs // 10, 8 * epochs // 10
    expected = [1.0] * first + [0.1] * (second - first) + [0.01] * (epochs - second)
    assert rates == pytest.approx(expected)


@pytest.mark.parametrize("warmup", [0.0, 1.5])
def test_the_cosine_is_torchs_after_a_linear_rise(warmup: float) -> None:
    per_epoch, rise = 4, int(4 * warmup)
    protocol = ProbeConfig(epochs=5, schedule="cosine", warmup=warmup)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 20 - rise)
    expected = [(step + 1) / rise for step in range(rise)]
    for _ in range(20 - rise):
        expected.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        theirs.step()
    assert [protocol.rate(step, per_epoch) for step in range(20)] == pytest.approx(expected)


def test_steps_follow_a_warmup() -> None:
    rates = [ProbeConfig(epochs=10, warmup=2).rate(step, 3) for step in range(30)]
    assert rates[:6] == pytest.approx([n / 6 for n in range(1, 7)])
    assert rates[6:] == pytest.approx([1.0] * 12 + [0.1] * 6 + [0.01] * 6)


def test_ten_rates_or_more_are_the_default_and_the_papers_is_among_them() -> None:
    assert len(ProbeConfig.lrs) >= 10 and 30.0 in ProbeConfig.lrs


def test_a_head_that_diverged_has_no_number() -> None:
    heads = Heads(DIM, CLASSES, (0.1, 1.0))
    with torch.no_grad():
        heads.weight[:CLASSES] = torch.nan
    found = scores(heads, judge(heads, torch.randn(2000, DIM), torch.arange(2000) % CLASSES))
    assert get_best(found) == found[1]
    assert record(found, ProbeConfig())["learning_rates"][0] == {"lr": 0.1, "diverged": True}
    with pytest.raises(DivergedError, match=r"at every learning rate \(0\.1\): lower --lr"):
        get_best(found[:1])


def test_an_epoch_holds_every_sample_once_in_a_new_order(train: Pair) -> None:
    features, labels = torch.arange(203.0)[:, None], torch.arange(203)
    epochs = [
        torch.cat([part[1] for part in batches])
        for batches in cached_epochs((features, labels), ProbeConfig(epochs=3, batch=50))
    ]
    assert all(torch.equal(order.sort().values, labels) for order in epochs)
    assert not torch.equal(epochs[0], epochs[1])
    again = next(cached_epochs((features, labels), ProbeConfig(epochs=1, batch=50)))
    assert torch.equal(torch.cat([part[0] for part in again])[:, 0].long(), epochs[0])


def test_scores_are_scikit_learns(train: Pair, held_out: Pair) -> None:
    protocol = ProbeConfig(epochs=2, lrs=RATES, batch=50)
    heads = Heads(DIM, CLASSES, RATES)
    train_heads(heads, cached_epochs(train, protocol), 5, protocol)
    for number, score in enumerate(scores(heads, judge(heads, *held_out))):
        logits = heads(held_out[0])[:, number].detach().numpy()
        top5 = top_k_accuracy_score(held_out[1], logits, k=5, labels=range(CLASSES))
        assert score.lr == RATES[number]
        assert score.top1 == pytest.approx(100 * accuracy_score(held_out[1], logits.argmax(1)))
        assert score.top5 == pytest.approx(100 * top5)
        assert score.top1 < score.top5 < 100


def test_two_classes_have_a_top5() -> None:
    heads = Heads(DIM, 2, (0.1,))
    (score,) = scores(heads, judge(heads, torch.randn(6, DIM), torch.tensor([0, 1] * 3)))
    assert score.top5 == 100


def test_features_that_know_the_label_beat_features_that_do_not(
    train: Pair, held_out: Pair
) -> None:
    protocol = ProbeConfig(epochs=10, lrs=RATES, batch=50)
    informed = get_best(probe_cached(train, held_out, CLASSES, protocol))
    generator = torch.Generator().manual_seed(5)
    noise = [
        (torch.randn(len(f), DIM, generator=generator), labels) for f, labels in (train, held_out)
    ]
    blind = probe_cached(*noise, CLASSES, protocol)
    # Three standard errors of 150 guesses, and the best of three rates.
    assert max(score.top1 for score in blind) < 10 + 9
    assert informed.top1 > 35


def test_progress_is_told_after_each_epoch(train: Pair) -> None:
    told: list[int] = []
    train_cached(train, CLASSES, ProbeConfig(epochs=3, lrs=(0.1,)), told.append)
    assert told == [1, 2, 3]


def test_a_record_holds_the_best_rate_and_the_protocol() -> None:
    found = [Score(0.1, 40.0, 80.0), Score(1.0, 55.0, 90.0), Score(10.0, 50.0, 95.0)]
    row = record(found, ProbeConfig(epochs=7, features="cached"))
    assert row["kind"] == "probe" and row["best"] == {"lr": 1.0, "top1": 55.0, "top5": 90.0}
    assert [entry["lr"] for entry in row["learning_rates"]] == [0.1, 1.0, 10.0]
    assert row["protocol"]["epochs"] == 7 and row["protocol"]["features"] == "cached"
    assert row["protocol"]["best_by"] == "test"


def test_a_weight_of_2_is_the_sample_twice(train: Pair) -> None:
    """In full batches, where order plays no part."""
    features, labels = train[0].double(), train[1]
    twice = torch.arange(len(labels)) % 3 == 0
    weights = 1 + twice.double()
    copies = torch.cat([features, features[twice]]), torch.cat([labels, labels[twice]])
    found = []
    for samples in (copies, (features, labels, weights / weights.mean())):
        protocol = ProbeConfig(epochs=10, lrs=RATES, batch=len(samples[0]))
        heads = Heads(DIM, CLASSES, RATES).double()
        train_heads(heads, cached_epochs(samples, protocol), 1, protocol)
        found.append(heads.weight.detach())
    torch.testing.assert_close(*found, rtol=1e-12, atol=1e-12)
