"""Who judges a pool: a head, one that was fitted before, a fine-tuned network; and thresholds."""

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from fastmoco.config.encoder import EncoderSpec
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import LABEL_DTYPE, ConcatShardSets, ShardSet, write_labels
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import embed
from fastmoco.label.head import fit_head, standardize
from fastmoco.models.encoder import Encoder

COLORS = ["blue", "green", "red"]


def read_details() -> list[dict[str, str]]:
    with Path("request.details.csv").open(newline="") as stream:
        return list(csv.DictReader(stream))


def forget_labels() -> None:
    """Take the monitor, whose bank is labelled, out of the run."""
    config = Path("run/config.yaml")
    config.write_text(yaml.safe_dump(yaml.safe_load(config.read_text()) | {"monitor": None}))


@pytest.mark.parametrize("strategy", ["margin", "random", "herding", "scores"])
def test_thresholds_leave_out_what_is_sure(colored, run, strategy):
    np.save(Path("mine.npy"), np.arange(len(ShardSet(Path("pool")))) % 7)
    words = ("query", "run", "pool", "--device", "cpu", "--replace", "--strategy", strategy)
    words += ("--scores", "mine.npy") if strategy == "scores" else ()
    everyone = ("--budget", 90, "--strategy", "margin")
    assert run(*words[:6], *everyone)[0] == 0
    all_rows = read_details()
    cut = {
        name: sorted(float(row[name]) for row in all_rows)[40]
        for name in ("confidence", "margin", "entropy")
    }
    bounds = ("--max-confidence", cut["confidence"], "--max-margin", cut["margin"])
    bounds += ("--min-entropy", 1e-9)
    unsure = {
        row["sample"]
        for row in all_rows
        if float(row["confidence"]) < cut["confidence"] and float(row["margin"]) < cut["margin"]
    }
    assert 5 < len(unsure) < 41
    code, out, err = run(*words, "--budget", 80, *bounds)
    assert code == 0 and f"only {len(unsure)} of 80 pass the thresholds" in out, err
    assert {row["sample"] for row in read_details()} == unsure
    code, out, err = run(*words, "--budget", 5, *bounds)
    assert code == 0 and "pass the thresholds" not in out, err
    assert {row["sample"] for row in read_details()} < unsure and len(read_details()) == 5
    told = json.loads(Path("request.json").read_text())
    assert told["thresholds"] == {
        "max_confidence": cut["confidence"],
        "max_margin": cut["margin"],
        "min_entropy": 1e-9,
    }
    code, out, err = run(*words, "--budget", 5, "--min-entropy", cut["entropy"])
    assert code == 0 and min(float(row["entropy"]) for row in read_details()) >= cut["entropy"]
    Path("request.csv").unlink()
    none = ("--budget", 5, "--out", "no.csv", "--max-confidence", 0.2)
    code, _, err = run(*words, *none)
    assert code == 3 and "No sample passes the thresholds" in err and not list(Path().glob("no.*"))


def test_a_fine_tuned_network_ranks(colored, run, own):
    """Against its forward pass, one by one; it needs no labels but its own."""
    own("run")
    tune = ("finetune", "run", "--steps", 8, "--batch", 8, "--save", "t0", "--device", "cpu")
    assert run(*tune)[0] == 0
    words = ("query", "run", "pool", "--budget", 9, "--by", "t0", "--device", "cpu", "--replace")
    code, out, err = run(*words, "--strategy", "least", "--no-balance")
    assert code == 0 and "warning: t0 is not calibrated" in out, err
    assert "classifier:" not in out and json.loads(Path("request.json").read_text())["by"]
    spec = EncoderSpec.model_validate_json(Path("t0/encoder.json").read_text())
    network = Encoder(spec)
    network.load_state_dict(torch.load(Path("t0/weights.pt"), weights_only=True))
    preprocessing = Evaluation.open(Path("run"), device="cpu").preprocessing
    preprocessing = replace(preprocessing, mean=tuple(spec.mean), std=tuple(spec.std))
    data = ConcatShardSets([ShardSet(Path("pool"))])
    logits = embed(network.eval(), data, "head", preprocessing).double()
    confidence = logits.softmax(dim=1).amax(dim=1).tolist()
    order = sorted(range(90), key=lambda i: (confidence[i], i))[:9]
    expected = [(str(i), f"{confidence[i]:.6f}") for i in order]
    assert [(row["sample"], row["confidence"]) for row in read_details()] == expected
    forget_labels()
    for strategy in ("auto", "intersection", "hybrid"):
        code, out, err = run(*words, "--strategy", strategy)
        assert code == 0 and f"by {strategy.replace('auto', 'margin')}" in out, err
    mine = ("--strategy", "scores", "--scores", "mine.npy")
    np.save(Path("mine.npy"), np.arange(len(confidence)))
    assert run(*words, *mine)[0] == 0
    assert max(Counter(row["predicted"] for row in read_details()).values()) == 3
    for more, told in (
        (("--strategy", "herding"), "--by does nothing with herding"),
        ((*mine, "--no-balance"), "--by does nothing with scores"),
        (("--classifier", "head.pt"), "--by names the one classifier"),
        (("--strategy", "disagreement", "--members", 2), "leave --classifier and committees out"),
        (("--strategy", "least", "--features", "x.npy"), "--features does nothing with least"),
    ):
        code, _, err = run(*words, *more)
        assert code == 2 and told in err, err
    code, _, err = run(*words, "--by", "run")
    assert code == 2 and "run is none that `fastmoco finetune --save` wrote" in err


def judge_test_set() -> dict[int, float]:
    """Return the confidence of a head of `train`, centered as `pool` is, on the set `test`."""
    train = Labelled.of(ShardSet(Path("train")))
    pool, test = (ConcatShardSets([ShardSet(Path(name))]) for name in ("pool", "test"))
    opened = Evaluation.open(Path("run"), device="cpu")
    features = [
        embed(opened.encoder, data, "backbone", opened.preprocessing)
        for data in (pool, train.data, test)
    ]
    center = torch.nn.functional.normalize(features[0].double(), dim=1).mean(dim=0)
    known, asked = (standardize(rows, center) for rows in features[1:])
    p = fit_head(known, torch.from_numpy(train.labels), 3).probabilities(asked)
    return dict(enumerate(p.amax(dim=1).tolist()))


def test_a_fitted_classifier_serves_again(colored, run, own, monkeypatch):
    """The same request to the byte, without a fit; not for another encoder, feature or classes."""
    words = ("query", "run", "pool", "--budget", 7, "--device", "cpu", "--replace")
    words += ("--strategy", "margin")
    assert run(*words)[0] == 0
    files = ("request.csv", "request.details.csv", "request.json")
    before = [Path(name).read_bytes() for name in files]
    code, out, _ = run(*words, "--classifier", "heads/one.pt")
    assert code == 0 and "was fitted, and is kept in heads/one.pt" in out
    assert [Path(name).read_bytes() for name in files] == before
    with monkeypatch.context() as patch:
        patch.delattr("fastmoco.label.pool.cross_fit")
        code, out, err = run(*words, "--classifier", "heads/one.pt")
        assert code == 0 and [Path(name).read_bytes() for name in files] == before, err
        label = ("pseudolabel", "run", "pool", "--threshold", 0.3, "--device", "cpu", "--replace")
        assert run(*label, "--classifier", "heads/one.pt")[0] == 0
    again = [Path(f"pseudolabels{end}").read_bytes() for end in (".csv", ".json")]
    assert run(*label)[0] == 0
    assert again == [Path(f"pseudolabels{end}").read_bytes() for end in (".csv", ".json")]
    elsewhere = ("query", "run", "test", "--test", "train", "--budget", 12, "--strategy", "least")
    elsewhere += ("--no-balance", "--device", "cpu", "--replace", "--classifier", "heads/one.pt")
    assert run(*elsewhere)[0] == 0
    found = {int(row["sample"]): float(row["confidence"]) for row in read_details()}
    assert found == pytest.approx(judge_test_set(), abs=1e-6), "about the center of its own pool"
    own("train")
    one, rows = ("--classifier", "heads/one.pt"), np.zeros(12, LABEL_DTYPE)
    rows["id"], rows["label"], rows["weight"] = np.arange(12), np.arange(12) % 3, 1
    for name, classes in (("few", COLORS), ("odd", ["ape", "bee", "cow"])):
        write_labels(ShardSet(Path("train")), name, rows, classes, "by hand")
    labels = ("--train", "train", *one, "--labels")
    code, out, err = run(*words, *labels, "few")
    assert code == 0 and "was fitted on other labels (60, here are 12)" in out, err
    Path("odd.pt").write_bytes(b"odd")
    for more, code, told in (
        ((*words, *one, "--feature", "head"), 3, "The classifier's feature is backbone, not head"),
        ((words[0], "other", *words[2:], *one), 3, "The classifier's encoder is"),
        ((*words, *labels, "odd"), 3, "The classifier's classes are ['blue', "),
        ((*label, *labels, "odd"), 3, "The classifier's classes are ['blue', "),
        ((*words, "--classifier", "odd.pt"), 3, "odd.pt cannot be read as a classifier"),
        ((*words, "--strategy", "random", *one), 2, "--classifier does nothing with random"),
    ):
        found, _, err = run(*more)
        assert (found, told in err) == (code, True), err
    own("run")
    forget_labels()
    code, out, err = run(*words, *one)
    assert code == 0 and "C " in out, "no labels are needed"
