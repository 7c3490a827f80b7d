"""A number is finite, or there is none; one that was computed is shown, whatever the disk says."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.dataset.shard_set import ShardSet
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

RunCommand = Callable[..., tuple[int, str, str]]
Make = Callable[..., RunFolder]
PLAIN = {"executor": "fused"}


def commands(root: Path, train: ShardSet, test: ShardSet, out: Path) -> list[tuple[object, ...]]:
    """Every command that uses an encoder."""
    sets = ("--train", train.root, "--test", test.root)
    return [
        ("knn", root, *sets),
        ("probe", root, *sets, "--cached", "--epochs", 1),
        ("finetune", root, *sets, "--steps", 2, "--batch", 8, "--save", out / "tuned"),
        ("report", root, *sets, "--out", out / "report"),
        ("embed", root, test.root, "--out", out / "features.npy"),
        ("export", root, out / "weights.pth", "--to", "torchvision"),
    ]


def test_weights_that_are_not_finite_give_no_number(
    run: RunCommand,
    make_run: Make,
    trained: Encoder,
    small_set: ShardSet,
    unseen_set: ShardSet,
    tmp_path: Path,
) -> None:
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    weights["backbone.layer2.0.bn1.running_var"][3] = torch.inf
    root = make_run(weights, **PLAIN).root
    for command in commands(root, small_set, unseen_set, tmp_path / "out"):
        code, out, err = run(*command)
        assert code == 5 and "backbone.layer2.0.bn1.running_var" in err, command
        assert "%" not in out
    assert not (root / "evaluations.jsonl").exists() and not (tmp_path / "out").exists()


def test_features_that_are_not_finite_give_no_number(
    run: RunCommand,
    make_run: Make,
    trained: Encoder,
    small_set: ShardSet,
    unseen_set: ShardSet,
    tmp_path: Path,
) -> None:
    """The weights are finite; the images' deviation is not one that they were trained with."""
    weights = {name: tensor.clone() for name, tensor in trained.state_dict().items()}
    for name, tensor in weights.items():
        if "bn" in name and name.endswith("weight"):
            tensor.fill_(1e20)
    root = make_run(weights, **PLAIN).root
    for command in commands(root, small_set, unseen_set, tmp_path / "out")[:5]:
        code, out, err = run(*command)
        if command[0] == "report":  # it shows all else, and says why
            assert code == 0
            page = (tmp_path / "out" / "report" / "report.html").read_text()
            assert "output is not a finite number for" in page
        else:
            assert code == 5 and "%" not in out, command
            if command[0] != "finetune":
                assert "sample 0 (" in err and "images, such as" in err
    assert not (root / "evaluations.jsonl").exists()
    assert not (tmp_path / "out" / "tuned").exists()


@pytest.fixture
def sets(make_run: Make, small_set: ShardSet, unseen_set: ShardSet) -> tuple[object, ...]:
    """The arguments of an evaluation of a sound run."""
    return make_run(**PLAIN).root, "--train", small_set.root, "--test", unseen_set.root


def test_a_training_that_diverges_gives_no_number(
    run: RunCommand, sets: tuple[object, ...], tmp_path: Path
) -> None:
    root = Path(str(sets[0]))
    tuned = tmp_path / "tuned"
    code, out, err = run(
        "finetune", *sets, "--steps", 5, "--batch", 8, "--lr", 1e20, "--save", tuned
    )
    assert code == 5 and "not all finite numbers: it diverged" in err and "%" not in out
    cached = ("--cached", "--epochs", 5, "--lr", 1e39)
    code, out, err = run("probe", *sets, *cached)
    assert code == 5 and "diverged at every learning rate (1e+39): lower --lr" in err
    assert not (root / "evaluations.jsonl").exists() and not tuned.exists()
    code, out, err = run("probe", *sets, *cached, "--lr", 0.1)
    assert code == 0 and "lr 1e+39 diverged" in out and "<- best by test accuracy" in out, err

    def refuse(constant: str) -> float:
        raise AssertionError(f"{constant} is recorded")

    (row,) = (root / "evaluations.jsonl").read_text().splitlines()
    found = json.loads(row, parse_constant=refuse)
    assert found["learning_rates"][0] == {"lr": 1e39, "diverged": True}
    assert found["best"]["lr"] == 0.1 and 0 <= found["top1"] <= 100


def test_a_number_that_cannot_be_recorded_is_shown(
    run: RunCommand, sets: tuple[object, ...]
) -> None:
    root = Path(str(sets[0]))
    (root / "evaluations").write_text("in the way")
    for command in (("knn", *sets), ("finetune", *sets, "--steps", 2, "--batch", 8)):
        code, out, err = run(*command)
        assert code == 2 and ": top-1 " in out and "Not all is recorded" in err
        assert str(root) in err and "recorded in" not in out
    (root / "evaluations").unlink()
    code, out, err = run(
        "finetune", *sets, "--steps", 2, "--batch", 8, "--save", root / "config.yaml" / "tuned"
    )
    assert code == 2 and not out  # before the hours of training


def test_features_are_computed_in_fp32_unless_asked(
    run: RunCommand, make_run: Make, unseen_set: ShardSet, tmp_path: Path
) -> None:
    root = make_run(precision="bf16", **PLAIN).root
    found = {}
    for name, asked in (("default", ()), ("fp32", ("fp32",)), ("bf16", ("bf16",))):
        out = tmp_path / f"{name}.npy"
        options = ("--precision", *asked) if asked else ()
        code, _, err = run("embed", root, unseen_set.root, "--out", out, *options)
        assert code == 0, err
        found[name] = np.load(out)
        about = json.loads(out.with_suffix(".json").read_text())
        assert about["precision"] == (asked[0] if asked else "fp32")
    assert np.array_equal(found["default"], found["fp32"])
    difference = np.abs(found["bf16"] - found["fp32"]).max() / np.abs(found["fp32"]).max()
    assert 1e-4 < difference < 0.1
