"""From a run folder to numbers that are written down with how they came about."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from threads import on_ranks

from fastmoco.config.recipe import Monitor
from fastmoco.core.distributed import World
from fastmoco.dataset.shard_set import LABEL_DTYPE, ConcatShardSets, ShardSet, write_labels
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate import knn as neighbors
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import never
from fastmoco.evaluate.probe import Heads, ProbeConfig
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pretrain import _monitor
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., RunFolder]
Pair = tuple[torch.Tensor, torch.Tensor]  # features, labels


@pytest.fixture
def evaluation(make_run: Make, small_set: ShardSet, unseen_set: ShardSet) -> Evaluation:
    return Evaluation.open(make_run().root, small_set.root, unseen_set.root)


def rows(evaluation: Evaluation) -> list[dict[str, Any]]:
    lines = (evaluation.run.root / "evaluations.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines]


def curve(evaluation: Evaluation, row: dict[str, Any]) -> list[dict[str, Any]]:
    lines = (evaluation.run.root / row["curve"]).read_text().splitlines()
    return [json.loads(line) for line in lines]


def scikit_learns_top1(bank: Pair, queries: Pair, k: int, t: float = 0.1) -> float:
    from sklearn.neighbors import KNeighborsClassifier  # a machine with a GPU may lack it

    model = KNeighborsClassifier(k, metric="cosine", weights=lambda d: np.exp(-d / t))
    model.fit(bank[0].double(), bank[1])
    return 100 * model.score(queries[0].double(), queries[1])


def test_knn_is_scikit_learns_on_the_same_features(evaluation: Evaluation) -> None:
    result = evaluation.knn("backbone", k=4, t=0.1)
    pairs = [evaluation.features(one, "backbone") for one in (evaluation.train, evaluation.test)]
    assert result["top1"] == pytest.approx(scikit_learns_top1(*pairs, k=4), abs=1e-3)


def test_a_result_is_recorded_with_its_protocol_and_its_sets(
    evaluation: Evaluation, small_set: ShardSet, unseen_set: ShardSet
) -> None:
    first = evaluation.knn("head", k=3, t=0.2)
    second = evaluation.knn("head", k=5, t=0.2)
    assert rows(evaluation) == [first, second]
    assert first["kind"] == "knn" and first["protocol"] == {
        "feature": "head",
        "k": 3,
        "t": 0.2,
        "precision": "fp32",
    }
    assert (first["run"], first["step"]) == ("tiny", 12)
    for name, one in (("train", small_set), ("test", unseen_set)):
        assert first["sets"][name] == {
            "path": str(one.root),
            "set_id": one.manifest.set_id,
            "samples": len(one),
        }


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_a_probe_runs_leaves_the_encoder_alone_and_is_recorded(
    evaluation: Evaluation, features: str
) -> None:
    before = {k: v.clone() for k, v in evaluation.encoder.state_dict().items()}
    told: list[int] = []
    protocol = ProbeConfig(epochs=5, lrs=(0.01, 0.1), batch=10, features=features)
    result = json.loads(json.dumps(evaluation.probe(protocol, told.append)))
    assert rows(evaluation) == [result]
    assert result["kind"] == "probe" and result["protocol"]["features"] == features
    assert result["protocol"]["epochs"] == 5 and result["protocol"]["lrs"] == [0.01, 0.1]
    assert [row["lr"] for row in result["learning_rates"]] == [0.01, 0.1]
    assert 0 <= result["best"]["top1"] <= result["best"]["top5"] == 100  # of 3 classes
    assert told == [1, 2, 3, 4, 5]
    after = evaluation.encoder.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_a_probe_learns_its_own_training_set(make_run: Make, small_set: ShardSet) -> None:
    """Labels that did not belong to their images, or a head that did not learn, would show."""
    same = Evaluation.open(make_run().root, small_set.root, small_set.root)
    for features in ("cached", "augmented"):
        protocol = ProbeConfig(epochs=30, lrs=(0.1,), batch=12, features=features)
        assert same.probe(protocol, lambda done: None)["best"]["top1"] > 75


def test_a_probe_is_repeatable(evaluation: Evaluation) -> None:
    protocol = ProbeConfig(epochs=2, lrs=(0.05,), batch=10, features="augmented")
    first, second = (evaluation.probe(protocol, lambda done: None) for _ in range(2))
    for name in ("predictions", "curve"):
        assert first.pop(name) != second.pop(name)
    assert first == second


def test_several_ranks_find_what_one_does(
    make_run: Make, small_set: ShardSet, unseen_set: ShardSet
) -> None:
    """The last of seven has no training image, the last two have no test image."""
    run = make_run(executor="fused")
    whole = Evaluation.open(run.root, small_set.root, unseen_set.root)
    protocol = ProbeConfig(epochs=5, lrs=(0.01, 0.1), batch=10, features="cached")

    def work(ranks: World) -> list[dict[str, Any]]:
        own = replace(whole, world=ranks)
        return [own.probe(protocol), own.knn("backbone", k=5, t=0.1)]

    (one,), several = on_ranks(1, work), on_ranks(7, work)
    assert len(rows(whole)) == 4  # the first rank alone writes
    one_curve, their_curve = (curve(whole, rows(whole)[place]) for place in (0, 2))
    assert one_curve == their_curve and len(one_curve) == 5
    for found in several:
        for ours, theirs in zip(found, one, strict=True):
            files = ("predictions", "curve")
            assert all(ours[name] == theirs[name] for name in theirs if name not in files)


@pytest.mark.parametrize("features", ["cached", "augmented"])
def test_a_probe_leaves_its_curve(evaluation: Evaluation, features: str) -> None:
    """It begins where untrained heads are, and ends at the numbers of the row."""
    protocol = ProbeConfig(epochs=6, lrs=(0.01, 0.1), batch=24, features=features)
    row = evaluation.probe(protocol)
    found = curve(evaluation, row)
    assert [one["epoch"] for one in found] == [1, 2, 3, 4, 5, 6]
    assert found[-1]["test_top1"] == pytest.approx([one["top1"] for one in row["learning_rates"]])
    assert found[-1]["loss"][1] < found[0]["loss"][1]
    if features == "cached":  # all of them in one batch
        samples, labels = evaluation.features(evaluation.train, "backbone")
        untrained = Heads(samples.shape[1], 3, (0.1,))(samples)[:, 0]
        assert found[0]["loss"] == pytest.approx(
            2 * [torch.nn.functional.cross_entropy(untrained, labels).item()], rel=1e-5
        )
        top1 = 100 * (untrained.argmax(dim=1) == labels).double().mean().item()
        assert found[0]["train_top1"] == pytest.approx(2 * [top1])


def test_the_augmented_probe_sees_new_crops_each_epoch(evaluation: Evaluation) -> None:
    protocol = ProbeConfig(epochs=2, batch=24)
    epochs = [
        list(batches) for batches in evaluation._augmented_epochs(evaluation._crops(protocol), 2)
    ]
    assert [len(batches) for batches in epochs] == [1, 1]
    central = evaluation.features(evaluation.train, "backbone")
    firsts = []
    for ((features, labels),) in epochs:
        assert sorted(labels.tolist()) == sorted(central[1].tolist())
        firsts.append(features.norm(dim=1).sort().values)
    assert not torch.allclose(*firsts, rtol=1e-3)


def test_the_sets_of_the_monitor_are_the_default(
    make_run: Make, small_set: ShardSet, unseen_set: ShardSet
) -> None:
    monitor = {"bank": str(small_set.root), "queries": str(unseen_set.root)}
    run = make_run(monitor=monitor)
    opened = Evaluation.open(run.root)
    assert (opened.train.set.root, opened.test.set.root) == (small_set.root, unseen_set.root)
    swapped = Evaluation.open(run.root, train=unseen_set.root)
    assert (swapped.train.set.root, swapped.test.set.root) == (unseen_set.root, unseen_set.root)
    assert opened.classes == 3 and not opened.encoder.training


def test_no_monitor_and_no_sets_is_refused_in_words(make_run: Make, small_set: ShardSet) -> None:
    run = make_run()
    for train, test in ((None, None), (small_set.root, None), (None, small_set.root)):
        with pytest.raises(UsageError, match=r"no monitor: name labelled sets by --train and"):
            Evaluation.open(run.root, train, test)


def test_no_run_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"is not a run folder \(no encoder.json\)"):
        Evaluation.open(tmp_path)


def test_a_test_set_may_lack_classes_and_have_no_others(
    make_run: Make, small_set: ShardSet, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    source = make_images(tmp_path / "source", ("ape", "bee", "dog"), 2)
    pack(source, tmp_path / "other", PackOptions())
    run = make_run().root
    with pytest.raises(DataError, match=r"differ in their classes \(dog\): only the second has"):
        Evaluation.open(run, small_set.root, tmp_path / "other")
    pack(make_images(tmp_path / "few", ("cow", "bee"), 2), tmp_path / "fewer", PackOptions())
    opened = Evaluation.open(run, small_set.root, tmp_path / "fewer")
    assert opened.test.classes == ["ape", "bee", "cow"], "numbered as in the training set"
    names = [opened.test.set.get_name(row) for row in range(4)]
    assert [opened.test.classes[label] for label in opened.test.labels] == [n[:3] for n in names]
    assert any("1 of 3 classes (ape) have no test image" in told for told in opened.cautions)


def test_a_set_without_classes_is_refused(
    make_run: Make, small_set: ShardSet, make_images: Callable[..., Path], tmp_path: Path
) -> None:
    pack(make_images(tmp_path / "source", (), 3), tmp_path / "flat", PackOptions())
    with pytest.raises(DataError, match=r"has 0 classes; an accuracy needs two"):
        Evaluation.open(make_run().root, small_set.root, tmp_path / "flat")


def test_features_are_in_id_order_beside_their_labels(
    evaluation: Evaluation, small_set: ShardSet
) -> None:
    features, labels = evaluation.features(evaluation.train, "head")
    classes = small_set.manifest.classes
    names = [small_set.get_name(i) for i in range(24)]
    assert [classes[label] for label in labels.tolist()] == [name.split("/")[0] for name in names]
    assert features.shape == (len(ConcatShardSets([small_set])), 8)


@pytest.fixture
def tables(small_set: ShardSet, unseen_set: ShardSet, tmp_path: Path) -> tuple[ShardSet, ShardSet]:
    """Copies of both sets with a table `two` of two classes of its own, for some samples."""
    copies = []
    for one, ids in ((small_set, [20, 3, 11, 5, 8, 17, 1]), (unseen_set, [14, 2, 7, 9])):
        copies.append(ShardSet(shutil.copytree(one.root, tmp_path / f"copy{len(one)}")))
        rows = np.array([(i, i % 2, 1.0) for i in ids], dtype=LABEL_DTYPE)
        write_labels(copies[-1], "two", rows, ["even", "odd"], "by hand")
    return copies[0], copies[1]


def test_a_side_table_chooses_samples_and_classes(
    make_run: Make, tables: tuple[ShardSet, ShardSet], evaluation: Evaluation
) -> None:
    train, test = tables
    root = evaluation.run.root
    some = Evaluation.open(root, train.root, test.root, labels="two")
    assert some.classes == 2
    pairs = [some.features(one, "backbone") for one in (some.train, some.test)]
    for (features, labels), ids, everything in zip(
        pairs,
        ([1, 3, 5, 8, 11, 17, 20], [2, 7, 9, 14]),
        (evaluation.train, evaluation.test),
        strict=True,
    ):
        wanted = evaluation.features(everything, "backbone")[0][ids]
        torch.testing.assert_close(features, wanted, rtol=1e-4, atol=1e-4)
        assert labels.tolist() == [i % 2 for i in ids]
    result = some.knn("backbone", k=3, t=0.1)
    assert result["top1"] == pytest.approx(scikit_learns_top1(*pairs, k=3), abs=1e-3)
    assert [(s["samples"], s["labels"]) for s in result["sets"].values()] == [
        (7, "two"),
        (4, "two"),
    ]


def test_the_augmented_probe_draws_labelled_samples_only(
    evaluation: Evaluation, tables: tuple[ShardSet, ShardSet]
) -> None:
    train, test = tables
    some = Evaluation.open(evaluation.run.root, train.root, test.root, labels="two")
    protocol = ProbeConfig(epochs=2, lrs=(0.1,), batch=3)
    epochs = [list(batches) for batches in some._augmented_epochs(some._crops(protocol), 2)]
    assert [len(batches) for batches in epochs] == [2, 2]  # of 7 samples, one is dropped
    assert {label for batches in epochs for _, found in batches for label in found.tolist()} == {
        0,
        1,
    }
    for features in ("cached", "augmented"):
        protocol = ProbeConfig(epochs=2, lrs=(0.1,), batch=3, features=features)
        assert 0 <= some.probe(protocol, lambda done: None)["best"]["top1"] <= 100


def test_the_augmented_probe_keeps_labels_with_their_images(
    make_run: Make, tables: tuple[ShardSet, ShardSet]
) -> None:
    train, _ = tables
    same = Evaluation.open(make_run().root, train.root, train.root, labels="two")
    protocol = ProbeConfig(epochs=40, lrs=(0.1,), batch=7, features="augmented")
    assert same.probe(protocol, lambda done: None)["best"]["top1"] > 80


def test_the_monitor_uses_the_table_too(
    make_run: Make, tables: tuple[ShardSet, ShardSet], evaluation: Evaluation
) -> None:
    train, test = tables
    recipe = {"bank": str(train.root), "queries": str(test.root), "labels": "two", "k": 3}
    knn = _monitor(Monitor(**recipe, feature="backbone"), evaluation.preprocessing, World())
    some = Evaluation.open(evaluation.run.root, train.root, test.root, labels="two")
    assert knn(evaluation.encoder, never)["knn_top1"] == some.knn("backbone", k=3, t=0.1)["top1"]


def test_the_monitor_tells_of_each_product_and_may_be_stopped_before_any(
    evaluation: Evaluation, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever is asked tells the watchdog too: a bank of hours is not taken for a stall."""
    monkeypatch.setattr(neighbors, "_CHUNK", 4)
    monkeypatch.setattr(neighbors, "_BLOCK", 5)
    bank, queries = (str(one.set.root) for one in (evaluation.train, evaluation.test))
    knn = _monitor(Monitor(bank=bank, queries=queries), evaluation.preprocessing, World())
    asked = 2 + 4 * 5  # a batch of each set, then 15 queries by 4 times 24 rows by 5
    calls: list[None] = []

    def stop_at(call: int) -> Callable[[], bool]:
        calls.clear()
        return lambda: calls.append(None) or len(calls) == call

    assert "knn_top1" in knn(evaluation.encoder, stop_at(asked + 1)) and len(calls) == asked
    for call in (1, 3, asked):
        assert knn(evaluation.encoder, stop_at(call)) == {} and len(calls) == call


def test_the_table_of_the_monitor_goes_with_its_sets(
    make_run: Make, tables: tuple[ShardSet, ShardSet]
) -> None:
    train, test = tables
    root = make_run(
        monitor={"bank": str(train.root), "queries": str(test.root), "labels": "two"}
    ).root
    assert Evaluation.open(root).train.table == "two"
    assert Evaluation.open(root, train=train.root).train.table is None
    assert Evaluation.open(root, train=train.root, labels="two").test.table == "two"


@pytest.mark.gpu
def test_all_of_it_on_a_gpu(make_run: Make, small_set: ShardSet, unseen_set: ShardSet) -> None:
    """Features stay there; pixels and products are rounded otherwise than on the CPU."""
    root = make_run().root
    there, here = (
        Evaluation.open(root, small_set.root, unseen_set.root, device=device)
        for device in ("cuda", "cpu")
    )
    features, labels = there.features(there.train, "backbone")
    expected, wanted = here.features(here.train, "backbone")
    assert features.is_cuda and torch.equal(labels.cpu(), wanted)
    nearest = torch.cdist(features.cpu(), expected).argmin(dim=1)
    assert torch.equal(nearest, torch.arange(24))
    assert 0 <= there.knn("backbone", k=3, t=0.1)["top1"] <= 100
    same = replace(there, test=there.train)
    for kind in ("cached", "augmented"):
        protocol = ProbeConfig(epochs=30, lrs=(0.1,), batch=12, features=kind)
        assert same.probe(protocol)["best"]["top1"] > 75
