"""Pseudo-labels as a user has them made, against their rules written naively."""

import csv
import hashlib
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from fastmoco.config.encoder import EncoderSpec
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import LABEL_DTYPE, ConcatShardSets, ShardSet, write_labels
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.evaluate.features import embed
from fastmoco.label.head import fit_head
from fastmoco.label.pool import embed_pool
from fastmoco.label.table import read_table
from fastmoco.models.encoder import Encoder
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

RunCommand = Callable[..., tuple[int, str, str]]
CPU = ("--device", "cpu")
COLORS = ("blue", "green", "red")


@pytest.fixture
def pseudolabel(run: RunCommand, colored: Path) -> Callable[..., dict[str, Any]]:
    """`pseudolabel("--precision", 0.9)`: the JSON, with what was printed and the rows."""

    def call(*words: object, of: str = "run") -> dict[str, Any]:
        code, out, err = run("pseudolabel", of, "pool", *CPU, "--replace", *words)
        assert code == 0, err
        with (colored / "pseudolabels.csv").open(newline="") as stream:
            rows = list(csv.DictReader(stream))
        return json.loads(Path("pseudolabels.json").read_text()) | {"said": out, "rows": rows}

    return call


def beliefs(run: str) -> tuple[np.ndarray, np.ndarray]:
    """Probabilities of the pool, and of the labelled samples by heads without their fold."""
    train, pool = Labelled.of(ShardSet(Path("train"))), ShardSet(Path("pool"))
    everything = np.arange(len(pool))
    found = embed_pool(Path(run), pool, everything, train, "backbone", "cpu", [])
    labels = torch.from_numpy(train.labels)
    return fit_head(found.known, labels, 3).probabilities(found.rows).numpy()


def test_labels_and_confidences_are_those_of_the_head(pseudolabel):
    told = pseudolabel("--threshold", 0.8, "--per-class", 9)
    p, pool = beliefs("run"), ShardSet(Path("pool"))
    expected = []
    for label, name in enumerate(COLORS):
        members = [i for i in range(90) if p[i].argmax() == label and p[i].max() >= 0.8]
        surest = sorted(members, key=lambda i: (-p[i].max(), i))[:9]
        expected += [(i, pool.get_name(i), name, "1", f"{p[i].max():.6f}") for i in surest]
        assert told["classes"][name] == len(surest)
    assert [(int(row["sample"]), *list(row.values())[1:]) for row in told["rows"]] == sorted(
        expected
    )
    assert told["above_threshold"]["pool"] == pytest.approx((p.max(axis=1) >= 0.8).mean())
    right = [name.split("/")[0] == label for _, name, label, _, _ in expected]
    assert told["truth"]["right"] == sum(right) and told["truth"]["labels"] == len(right)
    assert told["said"].startswith("pseudolabels.csv: 27 labels for 90 candidates, 9 to 9 of each")


def test_the_threshold_is_the_smallest_that_reaches_the_precision(pseudolabel):
    told = pseudolabel("--precision", 0.9)
    points = [point for point in told["curve"] if point["coverage"] * 60 >= 29.5]
    reached = [point["threshold"] for point in points if point["precision"] >= 0.9]
    assert told["threshold"] == min(reached) and told["precision"] == 0.9
    assert all(float(row["confidence"]) >= told["threshold"] - 1e-6 for row in told["rows"])
    assert told["estimate"]["low"] < told["estimate"]["precision"] < told["estimate"]["high"]
    assert "holds only if the pool is drawn as the labels were" in told["said"]
    looser = pseudolabel("--precision", 0.7)
    assert looser["threshold"] < told["threshold"] and len(looser["rows"]) > len(told["rows"])
    assert pseudolabel()["precision"] == 0.95


def test_runs_that_agree(pseudolabel):
    told = pseudolabel("--threshold", 0.6, "--agree", "other")
    p, q = beliefs("run"), beliefs("other")
    expected = {
        i: f"{min(p[i].max(), q[i].max()):.6f}"
        for i in range(90)
        if p[i].argmax() == q[i].argmax() and min(p[i].max(), q[i].max()) >= 0.6
    }
    assert {int(row["sample"]): row["confidence"] for row in told["rows"]} == expected
    assert (p.argmax(axis=1) != q.argmax(axis=1)).any(), "they differ somewhere"
    assert [one["run"] for one in told["classifiers"]] == ["run", "other"]
    assert told["curve"][-1]["coverage"] < 1, "labels that they differ on count as not covered"
    alone = pseudolabel("--threshold", 0.6)
    assert told["estimate"]["labels"] < alone["estimate"]["labels"]
    assert told["estimate"]["precision"] > alone["estimate"]["precision"]


def test_a_round_trip_to_another_run_and_back_as_a_table(pseudolabel, run, own):
    """Labels of one run train another; the next labels are of what has none yet."""
    own("run")
    told = pseudolabel("--threshold", 0.8, "--weight", "confidence", of="other")
    assert {row["weight"] == row["confidence"] for row in told["rows"]} == {True}
    more = ("--more", "pool", "pseudolabels.csv")
    words = ("--epochs", 2, "--lr", 1, "--cached")
    code, _, err = run("probe", "run", *more, *words, *CPU)
    assert code == 0, err
    (row,) = map(json.loads, Path("run/evaluations.jsonl").read_text().splitlines())
    assert row["sets"]["train"]["total"] == 60 + len(told["rows"])
    Path("first.csv").write_bytes(Path("pseudolabels.csv").read_bytes())
    again = pseudolabel("--threshold", 0.5, "--more", "pool", "first.csv")
    first = {row["sample"] for row in told["rows"]}
    assert first and not first & {row["sample"] for row in again["rows"]}
    assert f"{len(first)} samples are left out: labelled already" in again["said"]
    assert "the labels of first.csv count as true" in again["said"]
    table = read_table(ShardSet(Path("pool")), Path("first.csv"))
    assert len(table.ids) == len(first) and table.confidences is not None
    own("pool")
    code, out, err = run("label", "pool", "first.csv", "--name", "mine")
    assert code == 0 and f"{len(first)} labels" in out, err
    code, out, err = run("query", "run", "pool", "--budget", 90, "--strategy", "random", *CPU)
    assert code == 0, "no person has labelled any of them"


@pytest.mark.parametrize("classes", [True, False])
def test_a_pool_of_other_classes_or_none(pseudolabel, run, own, colored, classes):
    """What was learnt of `train` labels it, and goes back to training by name."""
    own("run")
    Path("pool").unlink()
    for name in COLORS:  # what is red goes by another name there
        source = colored.joinpath("train").resolve().parent / "in/pool" / name
        folder = {"red": "rose"}.get(name, name) if classes else ""
        for image in source.iterdir():
            (Path("in") / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, Path("in") / folder / f"{name}-{image.name}")
    pack(Path("in"), Path("pool"), PackOptions(unlabelled=not classes))
    told = pseudolabel("--threshold", 0.4)
    found = {row["label"] for row in told["rows"]}
    assert found == set(COLORS) and (told["truth"] is None) == (not classes)
    if classes:
        rose = sum(row["name"].startswith("rose") for row in told["rows"])
        assert rose and told["truth"]["labels"] - told["truth"]["right"] >= rose
    words = ("--more", "pool", "pseudolabels.csv", "--epochs", 2, "--lr", 1, "--cached")
    code, _, err = run("probe", "run", *words, *CPU)
    assert code == 0, err
    row = json.loads(Path("run/evaluations.jsonl").read_text())
    assert row["sets"]["train"]["total"] == 60 + told["labels"]
    if classes:
        Path("people.csv").write_text("sample,label\n0,blue\n1,red\n")
        code, _, err = run("probe", "run", "--more", "pool", "people.csv", *words[3:], *CPU)
        assert code == 3 and "the label 'red' is none of 3 classes" in err


def test_the_pools_own_labels_decide_nothing(pseudolabel, own):
    files = [Path("pseudolabels.csv"), Path("pseudolabels.json")]
    pseudolabel("--precision", 0.9)
    before = [path.read_bytes() for path in files]
    pseudolabel("--precision", 0.9)
    assert before == [path.read_bytes() for path in files], "the same inputs, the same bytes"
    own("pool")
    rows = np.array(ShardSet(Path("pool")).samples)
    rows["label"] = np.random.default_rng(0).permutation(rows["label"])
    np.save("pool/samples.npy", rows)
    told = pseudolabel("--precision", 0.9)
    old = json.loads(before[1])
    assert files[0].read_bytes() == before[0]
    assert {key for key in old if old[key] != told[key]} == {"truth"}
    assert told["truth"]["right"] < old["truth"]["right"]
    wrong = told["truth"]["surest_wrong"]
    assert len(wrong) == 16 and all(one["label"] != one["truth"] for one in wrong)
    assert [one["confidence"] for one in wrong] == sorted(
        (one["confidence"] for one in wrong), reverse=True
    )
    rows["label"] = -1
    np.save("pool/samples.npy", rows)
    told = pseudolabel("--precision", 0.9)
    assert told["truth"] is None and "in truth" not in told["said"]


def test_features_on_file_give_the_same_labels(pseudolabel, run):
    words = ("--threshold", 0.6, "--agree", "other")
    told = pseudolabel(*words)
    code, _, err = run("embed", "run", "pool", "--out", "pool.npy", *CPU)
    assert code == 0, err
    assert pseudolabel(*words, "--features", "pool.npy")["rows"] == told["rows"]
    code, _, err = run(
        "pseudolabel", "other", "pool", "--replace", *CPU, "--features", "absent.npy"
    )
    assert code == 3 and "absent.npy" in err


def test_bins_hold_all_that_was_predicted_out_of_fold(pseudolabel):
    (one,) = pseudolabel("--threshold", 0)["classifiers"]
    for when, error in (("before", "error_before"), ("after", "error")):
        bins = one["bins"][when]
        assert sum(row["samples"] for row in bins) == 60
        gaps = (row["samples"] * abs(row["accuracy"] - row["confidence"]) for row in bins)
        assert sum(gaps) / 60 == pytest.approx(one[error])
        hits = sum(row["samples"] * row["accuracy"] for row in bins)
        assert 100 * hits / 60 == pytest.approx(one["accuracy"])


@pytest.mark.parametrize("writes", [0, 1])
def test_broken_off_it_is_whole_or_absent(pseudolabel, run, monkeypatch, writes):
    """And where an older table stays, its description does not pass for it."""
    replace, done = Path.replace, []

    def break_off(self: Path, target: Path) -> Path:
        if "pseudolabels" in str(target):
            if len(done) == writes:
                raise KeyboardInterrupt
            done.append(target)
        return replace(self, target)

    words = ("pseudolabel", "run", "pool", *CPU)
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", break_off)
        assert run(*words)[0] == 130
    assert not Path("pseudolabels.csv").exists() and not list(Path().glob(".*"))
    Path("pseudolabels.json").unlink(missing_ok=True)
    pseudolabel("--threshold", 0.5)
    old, done[:] = Path("pseudolabels.csv").read_bytes(), []
    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", break_off)
        assert run(*words, "--replace")[0] == 130
    assert Path("pseudolabels.csv").read_bytes() == old
    owner = json.loads(Path("pseudolabels.json").read_text())["sha256"]
    assert (owner == hashlib.sha256(old).hexdigest()) == (writes == 0)


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (("--precision", 1.5), 2, "1.5 is not a share"),
        (("--threshold", -1), 2, "-1 is not a share"),
        (("--threshold", "nan"), 2, "nan is not a share"),
        (("--precision", 0.9, "--threshold", 0.9), 2, "pass it or --threshold"),
        (("--out", "labels.txt"), 2, "must end in .csv"),
        (("--out", "absent/labels.csv", "--agree", "absent"), 2, "absent is not a run folder"),
        (("--agree", "bare"), 4, "has no checkpoint yet"),
        (("--labels", "noise"), 3, "A precision of 0.95 is not reached: 0."),
        (("--threshold", 1), 3, "No sample of pool is labelled with a confidence of 1.000 or more"),
        (("--train", "pool"), 3, "has no sample left"),
        (("--labels", "one_class"), 3, "are of one class ('red')"),
        (("--labels", "nothing"), 3, "cannot be read"),
        (("--more", "pool", "odd.csv"), 3, "only odd.csv has these"),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_nothing(
    colored, run, own, make_colored_run, words, code, told
):
    make_colored_run(colored / "bare", colored, 0)
    shutil.rmtree(colored / "bare/checkpoints")
    Path("odd.csv").write_text("sample,label\n0,ape\n")
    own("train")
    rows = np.array([(i, 2, 1.0) for i in range(5)], LABEL_DTYPE)
    train = ShardSet(Path("train"))
    write_labels(train, "one_class", rows, train.manifest.classes, "by hand")
    noise = np.random.default_rng(0).integers(0, 3, len(train))
    rows = np.array([(i, label, 1.0) for i, label in enumerate(noise)], LABEL_DTYPE)
    write_labels(train, "noise", rows, train.manifest.classes, "chance")
    found, _, err = run("pseudolabel", "run", "pool", "--train", "train", *CPU, *words)
    assert (found, told in err) == (code, True), err
    assert not list(colored.glob("**/*labels.*"))


def test_labels_of_before_are_kept(pseudolabel, run):
    pseudolabel("--threshold", 0.5)
    before = Path("pseudolabels.csv").read_bytes()
    code, _, err = run("pseudolabel", "run", "pool", "--threshold", 0.9, *CPU)
    assert code == 2 and "pass --replace" in err
    assert Path("pseudolabels.csv").read_bytes() == before


def test_a_run_without_monitor_needs_its_labels_named(colored, run, make_colored_run):
    make_colored_run(colored / "bare", colored, 0, monitor=None)
    code, _, err = run("pseudolabel", "bare", "pool", *CPU)
    assert code == 2 and "name what is labelled by --train" in err
    assert run("pseudolabel", "bare", "pool", "--train", "train", *CPU)[0] == 0


def test_what_weakens_the_labels_is_told(colored, run, own, make_colored_run):
    """An untrained encoder, a class without labels, few labels, a pool of another kind."""
    make_colored_run(colored / "untrained", colored, 0, step=0)
    own("train")
    train = ShardSet(Path("train"))
    ids = np.flatnonzero(train.labels() < 2)
    table = np.zeros(len(ids), LABEL_DTYPE)
    table["id"], table["label"], table["weight"] = ids, train.labels()[ids], 1
    write_labels(train, "two", table, train.manifest.classes, "by hand")
    words = ("pseudolabel", "untrained", "pool", "--train", "train", *CPU)
    code, out, err = run(*words, "--labels", "two", "--threshold", 0.5)
    assert code == 0, err
    assert "warning: the encoder of untrained is untrained (step 0)" in out
    assert "warning: no label of the class 'red': no sample is taken for one (1 such)" in out
    write_labels(train, "few", table[:12], train.manifest.classes, "by hand")
    code, _, err = run(*words, "--labels", "few", "--replace")
    assert code == 3 and "0 labels were predicted out of fold, 30 are needed" in err
    code, out, err = run(*words, "--labels", "few", "--replace", "--threshold", 0.5)
    assert code == 0 and "how many are right cannot be told" in out, err


def test_noisy_student_is_two_commands(colored, run, own):
    """A fine-tuned network labels for the next one; here against its forward pass, one by one."""
    own("run")
    tune = ("finetune", "run", "--steps", 30, "--batch", 20, *CPU)
    code, _, err = run(*tune, "--save", "t0")
    assert code == 0, err
    words = ("pseudolabel", "run", "pool", "--by", "t0", "--weight", "confidence", *CPU)
    code, out, err = run(*words, "--threshold", 0.6, "--per-class", 20)
    assert code == 0 and "warning: t0 is not calibrated" in out, err
    assert "how many are right cannot be told" in out
    spec = EncoderSpec.model_validate_json(Path("t0/encoder.json").read_text())
    network = Encoder(spec)
    network.load_state_dict(torch.load("t0/weights.pt", weights_only=True))
    preprocessing = Evaluation.open(Path("run"), device="cpu").preprocessing
    preprocessing = replace(preprocessing, mean=tuple(spec.mean), std=tuple(spec.std))
    data = ConcatShardSets([ShardSet(Path("pool"))])
    logits = embed(network.eval(), data, "head", preprocessing).double().numpy()
    p = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    expected = {}
    for label, name in enumerate(COLORS):
        members = [i for i in range(90) if p[i].argmax() == label and p[i].max() >= 0.6]
        surest = sorted(members, key=lambda i: (-p[i].max(), i))[:20]
        expected |= {i: (name, f"{p[i].max():.6f}") for i in surest}
    with Path("pseudolabels.csv").open(newline="") as stream:
        rows = {int(r["sample"]): (r["label"], r["confidence"]) for r in csv.DictReader(stream)}
    assert rows == expected and len(rows) > 20
    code, _, err = run(*tune, "--more", "pool", "pseudolabels.csv", "--noise", "--save", "t1")
    assert code == 0, err
    assert json.loads(Path("run/evaluations.jsonl").read_text().splitlines()[-1])["labels"][
        "images"
    ] == 60 + len(rows)
    threshold = ("--threshold", 0.5)
    more = (("--agree", "other"), ("--features", "x.npy"), ("--classifier", "x.pt"))
    for extra in ((), ("--precision", 0.9), *((*threshold, *words) for words in more)):
        code, _, err = run(*words, *extra, "--replace")
        assert code == 2 and "--by needs --threshold, and goes without" in err
    by = ("--threshold", 0.5, "--replace")
    Path("t0/classes.json").write_text('["blue", "green"]')
    code, _, err = run(*words, *by)
    assert code == 4 and "names 2 classes, its network has 3 logits" in err
    weights = torch.load("t1/weights.pt", weights_only=True)
    weights.popitem()
    torch.save(weights, "t1/weights.pt")
    code, _, err = run(*words, *by, "--by", "t1")
    assert code == 4 and "t1/weights.pt does not fit the network" in err
    Path("t1/weights.pt").write_bytes(b"odd")
    code, _, err = run(*words, *by, "--by", "t1")
    assert code == 4 and "t1/weights.pt cannot be read" in err
    code, _, err = run(*words, *by, "--by", "run")
    assert code == 2 and "run is none that `fastmoco finetune --save` wrote" in err


def test_the_commands_of_the_page_run_one_after_the_other(colored, run, own):
    own("run")
    for name, target in {"data/train": "train", "data/pool": "pool", "data/test": "test"}.items():
        (colored / name).parent.mkdir(exist_ok=True)
        (colored / name).symlink_to(colored / target)
    (colored / "runs").mkdir()
    for name, target in {"mine": "run", "other": "other"}.items():
        (colored / "runs" / name).symlink_to(colored / target)
    page = (Path(__file__).parents[2] / "docs/few-labels.md").read_text()
    section = page.split("## Labels without asking")[1].split("\n## ")[0]
    short = {"probe": ("--epochs", 2), "finetune": ("--steps", 30, "--batch", 20)}
    commands = re.findall(r"^    fastmoco (.+)$", section, re.MULTILINE)
    assert len(commands) == 7
    for words in map(str.split, commands):
        code, _, err = run(*words, *short.get(words[0], ()), *CPU)
        assert code == 0, (words, err)
