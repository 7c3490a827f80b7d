"""Co-training against its algorithm as loops, on two views of toy data, and as a command."""

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.label.cotrain import co_train
from fastmoco.label.head import Head, fit_head, fit_linear, pool_center, standardize
from fastmoco.label.pool import PoolFeatures
from fastmoco.label.threshold import take_surest
from fastmoco.label.uncertainty import judge

CLASSES = 3


def draw_views(seed: int, each: int, pool: int) -> tuple[list[PoolFeatures], torch.Tensor, ...]:
    """Two views, each with noise of its own; labels of what is known, and of the pool."""
    random = torch.Generator().manual_seed(seed)
    labels = torch.arange(CLASSES * each + pool) % CLASSES
    views = []
    for _ in range(2):
        centers = torch.randn(CLASSES, 12, generator=random, dtype=torch.float64)
        noise = torch.randn(len(labels), 12, generator=random, dtype=torch.float64)
        features = centers[labels] + 1.5 * noise
        rows = standardize(features, pool_center(features))
        views.append(PoolFeatures(rows[CLASSES * each :], rows[: CLASSES * each], 0))
    return views, labels[: CLASSES * each], labels[CLASSES * each :]


def naive(views, heads, labels, rounds, each):
    """Sets of labels as dictionaries from place to (label, confidence)."""
    learnt = [{}, {}]
    free = list(range(len(views[0].rows)))
    for _ in range(rounds):
        given = []
        for view, head, mine in zip(views, heads, learnt, strict=True):
            rows = torch.stack([*view.known, *(view.rows[i] for i in sorted(mine))])
            targets = [*labels.tolist(), *(mine[i][0] for i in sorted(mine))]
            fitted = fit_linear(rows, torch.tensor(targets), CLASSES, head.strength)
            now = Head(*fitted, temperature=head.temperature)
            p = now.probabilities(view.rows).numpy()
            taken = {}
            for label in range(CLASSES):
                said = [i for i in free if p[i].argmax() == label]
                for i in sorted(said, key=lambda i: (-p[i].max(), i))[:each]:
                    taken[i] = label, p[i].max()
            given.append(taken)
        learnt[0].update(given[1])
        learnt[1].update(given[0])
        free = [i for i in free if i not in given[0] and i not in given[1]]
    return learnt


@pytest.mark.parametrize("rounds", [1, 3, 50])
def test_it_is_the_algorithm_as_loops(rounds):
    """Of 50 rounds the pool is used up after few."""
    views, labels, _ = draw_views(0, 8, 60)
    heads = [fit_head(view.known, labels, CLASSES) for view in views]
    found = co_train(views, heads, labels, rounds, 3 * CLASSES + 1)
    for lessons, expected in zip(found, naive(views, heads, labels, rounds, 3), strict=True):
        assert lessons.places.tolist() == sorted(expected)
        assert lessons.labels.tolist() == [expected[i][0] for i in sorted(expected)]
        confidence = [expected[i][1] for i in sorted(expected)]
        np.testing.assert_allclose(lessons.confidence, confidence, atol=1e-6)
    both = np.union1d(found[0].places, found[1].places)
    assert len(both) == 60 if rounds == 50 else len(both) < 60


def accuracy(view: PoolFeatures, labels: torch.Tensor, places, more, truth, strength) -> float:
    rows = torch.cat([view.known, view.rows[places]])
    targets = torch.cat([labels, torch.as_tensor(more)])
    head = Head(*fit_linear(rows, targets, CLASSES, strength))
    return 100 * float((judge(head, view.rows).predicted == truth.numpy()).mean())


def test_two_views_teach_each_other_more_than_one_teaches_itself():
    """Few labels, and noise that the views do not share: what co-training was made for."""
    gains = {"co-training": [], "self-training": []}
    for seed in range(8):
        views, labels, truth = draw_views(seed, 4, 600)
        heads = [fit_head(view.known, labels, CLASSES) for view in views]
        taught = co_train(views, heads, labels, 3, 90)
        alone = [
            co_train([v, v], [h, h], labels, 3, 90)[0] for v, h in zip(views, heads, strict=True)
        ]
        for view, head, other, own in zip(views, heads, taught, alone, strict=True):
            base = accuracy(view, labels, labels[:0], labels[:0], truth, head.strength)
            for name, part in (("co-training", other), ("self-training", own)):
                after = accuracy(view, labels, part.places, part.labels, truth, head.strength)
                gains[name].append(after - base)
    mean = {name: np.mean(values) for name, values in gains.items()}
    assert mean["co-training"] >= 2 and mean["co-training"] >= mean["self-training"], mean


def test_weights_count():
    views, labels, _ = draw_views(1, 6, 60)
    heads = [fit_head(view.known, labels, CLASSES) for view in views]
    plain = co_train(views, heads, labels, 3, 9)
    ones = co_train(views, heads, labels, 3, 9, torch.ones(len(labels)).double())
    heavy = co_train(views, heads, labels, 3, 9, 1 + 9 * (torch.arange(len(labels)) % 2).double())
    assert plain[0].confidence.tolist() == pytest.approx(ones[0].confidence.tolist())
    assert plain[0].confidence.tolist() != pytest.approx(heavy[0].confidence.tolist(), abs=1e-3)
    assert len(take_surest(plain[0].confidence, plain[0].labels, 3)) == 9


def read(path: str) -> dict[int, str]:
    with Path(path).open(newline="") as stream:
        return {int(row["sample"]): row["label"] for row in csv.DictReader(stream)}


def test_the_command_writes_a_table_for_each_run(colored, run):
    words = ("pseudolabel", "run", "pool", "--with", "other", "--device", "cpu")
    code, out, err = run(*words, "--rounds", 2, "--per-round", 12, "--out", "co.csv")
    assert code == 0, err
    assert sorted(path.name for path in colored.glob("co*")) == [
        *("co.1.csv", "co.1.json", "co.2.csv", "co.2.json")
    ]
    first, second = read("co.1.csv"), read("co.2.csv")
    differently = sum(first[i] != second[i] for i in first.keys() & second.keys())
    for number, learner in ((1, "run"), (2, "other")):
        told = json.loads(Path(f"co.{number}.json").read_text())
        assert told["learner"] == learner and told["labels"] == 24
        assert told["called_differently"] == differently and told["truth"]["labels"] == 24
        assert set(told["classes"].values()) == {8}
    assert "run learns them from the other; how many are right cannot be told" in out
    before = [path.read_bytes() for path in sorted(colored.glob("co*"))]
    code, _, err = run(*words, "--out", "co.csv")
    assert code == 2 and "--replace" in err
    code, _, err = run(*words, "--rounds", 2, "--per-round", 12, "--out", "co.csv", "--replace")
    assert code == 0 and before == [path.read_bytes() for path in sorted(colored.glob("co*"))], err


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--rounds", 2), 2, "--rounds does nothing without --with RUN"),
        (("--per-round", 2), 2, "--per-round does nothing without"),
        (("--with", "other", "--agree", "other"), 2, "--agree does nothing beside --with RUN"),
        (("--with", "other", "--threshold", 0.5), 2, "--threshold does nothing beside"),
        (("--with", "other", "--per-round", 2), 2, "there are 3 classes: choose 3 or more"),
        (("--with", "absent"), 2, "absent is not a run folder"),
    ],
)
def test_what_does_not_fit_is_refused(colored, run, words, code, told):
    found, _, err = run("pseudolabel", "run", "pool", "--device", "cpu", *words)
    assert (found, told in err) == (code, True), err
    assert not list(colored.glob("*labels*"))
