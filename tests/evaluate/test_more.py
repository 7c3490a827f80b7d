"""Labels of several sets in `probe` and `finetune`: what they change, and what is refused."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastmoco.dataset.shard_set import LABEL_DTYPE, ShardSet, write_labels
from fastmoco.runs.run_folder import RunFolder

Make = Callable[..., RunFolder]
RunCommand = Callable[..., tuple[int, str, str]]
QUICK = {
    "probe": ("--epochs", 3, "--lr", 0.1, "--batch", 8, "--device", "cpu"),
    "finetune": ("--steps", 3, "--batch", 8, "--lr", 0.01, "--device", "cpu"),
}


@pytest.fixture
def evaluate(
    run: RunCommand, make_run: Make, small_set: ShardSet, unseen_set: ShardSet
) -> Callable[..., dict[str, Any]]:
    """`evaluate("probe", ...)` of a run on two sets: the row that was recorded."""
    root = make_run(executor="fused").root

    def call(command: str, *words: object) -> dict[str, Any]:
        sets = ("--train", small_set.root, "--test", unseen_set.root)
        code, _, err = run(command, root, *sets, *QUICK[command], *words)
        assert code == 0, err
        row = json.loads((root / "evaluations.jsonl").read_text().splitlines()[-1])
        with np.load(root / row.pop("predictions")) as stored:
            return row | {"confidence": stored["confidence"].tolist()}

    return call


@pytest.fixture
def pool(copied: ShardSet) -> ShardSet:
    """Another set: the images of `small_set` in another order, with tables of their labels."""
    rows = np.array(copied.samples)
    for name, weights in (("ones", [1.0]), ("threes", [3.0]), ("mixed", [1.0, 4.0])):
        table = [(i, rows["label"][i], weights[i % len(weights)]) for i in range(24)]
        write_labels(copied, name, np.array(table, LABEL_DTYPE), copied.manifest.classes, "truth")
    return copied


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_equal_weights_give_the_numbers_of_none(
    evaluate: Callable[..., dict[str, Any]], pool: ShardSet, command: str
) -> None:
    """To the bit; weights that differ do not."""
    found = {
        name: evaluate(command, "--train", pool.root, *labels)
        for name, labels in {
            "packed": (),
            "ones": ("--labels", "ones"),
            "threes": ("--labels", "threes"),
            "mixed": ("--labels", "mixed"),
        }.items()
    }
    confidence = {name: row["confidence"] for name, row in found.items()}
    assert confidence["packed"] == confidence["ones"] == confidence["threes"]
    assert confidence["packed"] != confidence["mixed"]


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_a_table_of_the_same_set_adds_what_has_no_label(
    evaluate: Callable[..., dict[str, Any]], pool: ShardSet, command: str
) -> None:
    """Half of the labels and the other half make the whole, whichever is named first."""
    labels = np.array(pool.samples["label"])
    for name, part in (("low", range(13)), ("high", range(11, 24))):
        rows = np.array([(i, labels[i], 1) for i in part], LABEL_DTYPE)
        write_labels(pool, name, rows, pool.manifest.classes, "truth")
    whole = evaluate(command, "--train", pool.root)
    low = ("--train", pool.root, "--labels", "low", "--more", pool.root, "high")
    both = evaluate(command, *low)
    assert both["confidence"] == whole["confidence"]
    (more,) = both["sets"]["train"]["more"]
    assert (more["samples"], both["sets"]["train"]["total"]) == (11, 24)
    assert "2 labels of high are not used" in both["cautions"][0]


def test_labels_of_another_set_take_part(
    evaluate: Callable[..., dict[str, Any]], pool: ShardSet, unseen_set: ShardSet, tmp_path: Path
) -> None:
    other = ShardSet(shutil.copytree(unseen_set.root, tmp_path / "other"))
    csv = tmp_path / "asked.csv"
    truth = other.manifest.classes
    lines = [f"{i},{truth[label]},{1 + i % 2}" for i, label in enumerate(other.labels())]
    csv.write_text("\n".join(["sample,label,weight", *lines]))
    rows = {
        command: evaluate(command, "--more", other.root, csv, "--more", pool.root, "mixed")
        for command in QUICK
    }
    for command, row in rows.items():
        train = row["sets"]["train"]
        assert [more["samples"] for more in train["more"]] == [15, 0], command
        assert (train["samples"], train["total"]) == (24, 39)
        assert any(
            "every one of the 15 test images is in the training" in c for c in row["cautions"]
        )
    assert rows["finetune"]["labels"]["images"] == 39


@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_so_many_labels_of_each_class(
    evaluate: Callable[..., dict[str, Any]], command: str
) -> None:
    first, again, other = (
        evaluate(command, "--per-class", 2, "--seed", seed) for seed in (1, 1, 2)
    )
    assert first["confidence"] == again["confidence"] != other["confidence"]
    train = first["sets"]["train"]
    assert (train["total"], train["per_class"], train["seed"]) == (6, 2, 1)


@pytest.mark.parametrize(
    ("words", "table", "code", "told"),
    [
        (("--more", "SET", "t.csv"), "sample,label\n99,ape\n", 3, "there is no sample 99"),
        (("--more", "SET", "t.csv"), "sample,label\n3,ape\n3,bee\n", 3, "names sample 3 again"),
        (("--more", "SET", "t.csv"), "sample,label\n3,ape\n4,yak\n", 3, "label 'yak' is none of"),
        (("--more", "SET", "t.csv"), "sample,label\n3,yak\n", 3, "only t.csv has these"),
        (("--more", "SET", "t.csv"), "sample,label,weight\n3,ape,-1\n", 3, "the weight '-1'"),
        (("--more", "SET", "t.csv"), "sample,name,label\n3,x.jpg,ape\n", 3, "not 'x.jpg'"),
        (("--more", "SET", "t.csv"), "sample,name,label\n3,,\n", 3, "has no label for a sample"),
        (("--more", "SET", "none"), "", 3, "none.npy cannot be read"),
        (("--more", "nowhere", "t.csv"), "", 3, "nowhere is not a shard set"),
        (("--more", "SET"), "", 2, "two values are needed"),
        (("--per-class", 9), "", 2, "'ape' has 8: choose --per-class 8"),
    ],
)
@pytest.mark.parametrize("command", ["probe", "finetune"])
def test_bad_labels_are_refused_and_nothing_is_recorded(
    run: RunCommand,
    make_run: Make,
    small_set: ShardSet,
    unseen_set: ShardSet,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    words: tuple[object, ...],
    table: str,
    code: int,
    told: str,
) -> None:
    root = make_run().root
    monkeypatch.chdir(tmp_path)
    (tmp_path / "t.csv").write_text(table)
    words = tuple(small_set.root if word == "SET" else word for word in words)
    sets = ("--train", small_set.root, "--test", unseen_set.root)
    found, _, err = run(command, root, *sets, *QUICK[command], *words)
    assert found == code and told in " ".join(err.replace("│", " ").split()), err
    assert not (root / "evaluations.jsonl").exists()


def test_a_fraction_and_a_number_are_one_too_many(run: RunCommand, make_run: Make) -> None:
    code, _, err = run("finetune", make_run().root, "--per-class", 2, "--fraction", 0.5)
    assert code == 2 and "--fraction and --per-class both choose labels" in err
