"""What the loop asks each epoch: the parts that it is made of, on one rank and on several."""

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from threads import on_ranks
from torch.nn.functional import normalize

from fastmoco.config.data import Subset
from fastmoco.config.monitor import Monitor
from fastmoco.config.recipe import View
from fastmoco.core.distributed import World
from fastmoco.dataset.shard_set import LABEL_DTYPE, ConcatShardSets, ShardSet, write_labels
from fastmoco.evaluate import knn as neighbors
from fastmoco.evaluate import monitor as module
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import never
from fastmoco.evaluate.knn import KNNClassifier
from fastmoco.evaluate.label_free import Moments, alignment, alpha_req, lidar, rankme, uniformity
from fastmoco.evaluate.monitor import RunMonitor
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.loggers.collapse import find_collapse
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

Open = Callable[..., RunMonitor]


@pytest.fixture
def evaluation(
    make_run: Callable[..., RunFolder], small_set: ShardSet, unseen_set: ShardSet
) -> Evaluation:
    run = make_run(data=[str(small_set.root)], seed=3, views=[{}, {"scale": [0.8, 1], "flip": 0}])
    return Evaluation.open(run.root, small_set.root, unseen_set.root)


@pytest.fixture
def open_monitor(evaluation: Evaluation) -> Open:
    """`open_monitor(world=World(), subset=None, bank=..., ...)`."""

    def make(world: World = World(), subset: Subset | None = None, **options: Any) -> RunMonitor:
        recipe = evaluation.recipe
        data = recipe.data.model_copy(update={"subset": subset})
        recipe = recipe.model_copy(update={"monitor": Monitor(**options), "data": data})
        settings = evaluation.preprocessing.settings
        loader = Loader.of(recipe, ConcatShardSets.open(recipe.data.sets), settings)
        return RunMonitor.open(recipe, loader, evaluation.preprocessing, world)

    return make


def in_order(epoch: int, indices: np.ndarray) -> np.ndarray:
    """Return the ids of an order that changes nothing."""
    return indices


def heads(evaluation: Evaluation, seed: int, count: int, views: int) -> list[torch.Tensor]:
    """Return the heads of the training stream's first views, under a seed, in id order."""
    recipe = evaluation.recipe
    plan = Plan(count, count, seed, in_order)
    data = ConcatShardSets([evaluation.train.set])
    spec = {"size": 16, "mean": recipe.encoder.mean, "std": recipe.encoder.std}
    settings = evaluation.preprocessing.settings
    turns = [recipe.views[number % 2] for number in range(views)]
    batches = Loader(data, plan, turns, **spec, settings=settings).batches()
    with torch.no_grad():
        return [evaluation.encoder(view) for view in next(batches).views]


def test_a_run_without_labels_is_measured_on_its_own_images(
    open_monitor: Open, evaluation: Evaluation
) -> None:
    numbers = open_monitor()(evaluation.encoder, never)
    backbone, head = (evaluation.features(evaluation.train, f)[0] for f in ("backbone", "head"))
    first, second = (normalize(v, dim=1) for v in heads(evaluation, 3 ^ 1 << 62, 24, 2))
    expected = {
        "rankme": rankme(Moments.of(backbone)),
        "rankme_head": rankme(Moments.of(head)),
        "rankme_images": 24,
        "alpha_req": alpha_req(Moments.of(backbone)),
        "alignment": alignment(first, second),
        "uniformity": uniformity(first),
    }
    assert numbers == pytest.approx(expected, rel=1e-5)
    ten = heads(evaluation, 3 ^ 1 << 62, 24, 10)
    with_lidar = open_monitor(lidar=True)(evaluation.encoder, never)
    assert with_lidar == pytest.approx(expected | {"lidar": lidar(torch.stack(ten, 1))}, rel=1e-5)
    assert numbers["rankme"] > 2 and numbers["alignment"] > 1e-3


def test_a_run_of_one_view_is_measured_by_two_draws_of_it(
    open_monitor: Open, evaluation: Evaluation
) -> None:
    """As that of a memory bank is."""
    monitor = open_monitor()
    alone = replace(monitor, views=monitor.views[:1])(evaluation.encoder, never)
    twice = replace(monitor, views=[monitor.views[0]] * 2)(evaluation.encoder, never)
    assert alone == twice and alone["alignment"] > 0


def test_the_images_are_those_of_the_subset_or_of_the_bank(
    open_monitor: Open, unseen_set: ShardSet
) -> None:
    assert open_monitor(subset=Subset(fraction=0.5)).ids.tolist() != list(range(12))
    assert len(open_monitor(subset=Subset(fraction=0.5)).ids) == 12
    other = open_monitor(bank=unseen_set.root)
    assert other.data.set_ids == [unseen_set.manifest.set_id] and len(other.ids) == 15
    assert other.bank is None


def test_some_of_many_images_are_looked_at_and_all_of_them_vote(
    open_monitor: Open, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANKED", 7)
    monkeypatch.setattr(module, "PAIRED", 5)
    sets = {"bank": evaluation.train.set.root, "queries": evaluation.test.set.root}
    seen = [0, 3, 6, 10, 13, 17, 20]  # at equal steps through the 24
    for feature in ("head", "backbone"):
        numbers = open_monitor(**sets, k=3, feature=feature)(evaluation.encoder, never)
        rows, _ = evaluation.features(evaluation.train, feature)
        key = "rankme" if feature == "backbone" else "rankme_head"
        assert numbers[key] == pytest.approx(rankme(Moments.of(rows[seen])), rel=1e-5)
        assert numbers["rankme_images"] == 7
        assert numbers["knn_top1"] == evaluation.knn(feature, k=3, t=0.1)["top1"]


def test_validation_is_a_share_of_the_bank_that_does_not_vote(
    open_monitor: Open, evaluation: Evaluation
) -> None:
    bank = evaluation.train.set.root
    options = {"bank": bank, "validation": 0.25, "k": 3, "feature": "backbone"}
    monitor = open_monitor(**options)
    features, labels = evaluation.features(evaluation.train, "backbone")
    held = torch.zeros(24, dtype=torch.bool)
    numbers, asked = {}, []
    predict = KNNClassifier.accuracy

    def note(self: KNNClassifier, *given: Any) -> float:
        asked.append((self._bank, *given[:2]))
        return predict(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(KNNClassifier, "accuracy", note)
        numbers = monitor(evaluation.encoder, never)
    ((voting, queries, wanted),) = asked
    for row in queries:
        held |= (features - row).abs().amax(dim=1) < 1e-5
    assert held.sum() == 6 == len(queries) and wanted.bincount().tolist() == [2, 2, 2]
    torch.testing.assert_close(voting, normalize(features[~held], dim=1))
    naive = KNNClassifier(features[~held], labels[~held], 3, 3, 0.1)
    assert numbers["validation_top1"] == naive.accuracy(features[held], labels[held])
    assert "knn_top1" not in numbers
    both = open_monitor(**options, queries=evaluation.test.set.root)(evaluation.encoder, never)
    assert both["validation_top1"] == numbers["validation_top1"]
    assert both["knn_top1"] == evaluation.knn("backbone", k=3, t=0.1)["top1"]


@pytest.mark.parametrize("labelled", [True, False])
def test_the_cost_that_is_told_is_the_images_that_pass(
    labelled: bool, open_monitor: Open, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANKED", 7)
    monkeypatch.setattr(module, "PAIRED", 5)
    queries = {"bank": evaluation.train.set.root, "queries": evaluation.test.set.root}
    monitor, passed = open_monitor(**queries if labelled else {"lidar": True}), []
    hook = evaluation.encoder.backbone.conv1.register_forward_hook(
        lambda module, given, output: passed.append(len(output))
    )
    monitor(evaluation.encoder, never)
    hook.remove()
    assert sum(passed) == (24 + 15 if labelled else 7 + 240) + 2 * 5
    assert monitor.describe_cost(100).startswith(f"{sum(passed)} images every 1 epochs, about ")


@pytest.mark.parametrize("size", [2, 3])
def test_ranks_do_not_matter(
    size: int, open_monitor: Open, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "RANKED", 16)
    bank, queries = (str(one.set.root) for one in (evaluation.train, evaluation.test))
    options = {"bank": bank, "queries": queries, "validation": 0.25, "k": 3}
    alone = open_monitor(**options)(evaluation.encoder, never)
    assert len(alone) == 8
    monitors = [open_monitor(World(rank, size), **options) for rank in range(size)]

    def work(world: World) -> dict[str, float]:
        return replace(monitors[world.rank], world=world)(evaluation.encoder, never)

    for numbers in on_ranks(size, work):
        assert numbers == pytest.approx(alone, rel=1e-5)


def test_a_feature_that_is_no_number_costs_the_numbers_and_is_told(
    open_monitor: Open, trained: Encoder, capsys: pytest.CaptureFixture[str]
) -> None:
    broken = copy.deepcopy(trained)
    broken.head.bias.data[0] = torch.nan
    assert open_monitor()(broken, never) == {}
    assert "warning: nothing is measured." in capsys.readouterr().err


def test_the_labels_of_a_table_are_used(open_monitor: Open, copied: ShardSet) -> None:
    rows = np.array([(i, i % 2, 1.0) for i in (20, 3, 11, 5, 8, 17, 1)], dtype=LABEL_DTYPE)
    write_labels(copied, "two", rows, ["even", "odd"], "by hand")
    monitor = open_monitor(bank=copied.root, labels="two", validation=0.5)
    assert monitor.bank.classes == ["even", "odd"]
    assert monitor.ids.tolist() == [1, 3, 5, 8, 11, 17, 20]


def test_it_tells_of_each_product_and_may_be_stopped_before_any(
    open_monitor: Open, evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked tells the watchdog too: a bank of hours is not taken for a stall."""
    monkeypatch.setattr(neighbors, "_CHUNK", 4)
    monkeypatch.setattr(neighbors, "_BLOCK", 5)
    sets = (evaluation.train, evaluation.test)
    bank, queries = (str(one.set.root) for one in sets)
    monitor = open_monitor(bank=bank, queries=queries)
    asked = 3 + 4 * 5  # a batch of each set and of views, then 15 queries by 4 times 24 rows by 5
    calls: list[None] = []

    def stop_at(call: int) -> Callable[[], bool]:
        calls.clear()
        return lambda: calls.append(None) or len(calls) == call

    assert "knn_top1" in monitor(evaluation.encoder, stop_at(asked + 1)) and len(calls) == asked
    for call in (1, 3, asked):
        assert monitor(evaluation.encoder, stop_at(call)) == {} and len(calls) == call


def dead_head(encoder: Encoder) -> None:
    for parameter in encoder.head.parameters():
        parameter.zero_()


def one_answer(encoder: Encoder) -> None:
    encoder.head.weight.zero_()
    encoder.head.bias.fill_(0.5)


def dead_backbone(encoder: Encoder) -> None:
    last = encoder.backbone.layer4[-1]
    for norm in (last.bn2, last.downsample[1]):
        norm.weight.zero_()
        norm.bias.fill_(0.3)


@pytest.mark.parametrize(
    ("kill", "words"),
    [
        (dead_head, "The head has collapsed: its features fill 1.00 directions"),
        (one_answer, "The head has collapsed: its features fill 1.00 directions"),
        (dead_backbone, "The backbone has collapsed: its features fill 1.00 directions"),
    ],
)
def test_a_collapsed_network_is_told_with_its_likely_cause(
    kill: Callable[[Encoder], None], words: str, open_monitor: Open, trained: Encoder
) -> None:
    monitor, broken = open_monitor(), copy.deepcopy(trained)
    with torch.no_grad():
        kill(broken)
    found = monitor(broken, never)
    (told,) = find_collapse({"step": 1000, **found})
    assert told.startswith(words) and "Likely" in told and "optimizer.lr" in told
    assert found["uniformity"] == pytest.approx(0, abs=1e-6) == found["alignment"]
    assert find_collapse({"step": 0, **found}) == [], "an untrained one may look like it"
    assert find_collapse({"step": 1000, **monitor(trained, never)}) == []
    assert find_collapse({"step": 1000, "loss": 5.0}) == []


def test_two_views_that_are_the_same_are_told(open_monitor: Open, evaluation: Evaluation) -> None:
    whole = View(crop="none", flip=0)
    monitor = replace(open_monitor(), views=[whole, whole])
    numbers = monitor(evaluation.encoder, never)
    assert numbers["alignment"] == pytest.approx(0, abs=1e-9) and numbers["uniformity"] < -0.1
    (told,) = find_collapse({"step": 1000, **numbers})
    assert "positive similarity 1.0000" in told and "views.0.crop=random" in told
