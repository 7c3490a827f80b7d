"""Features as files: those of the encoder run by hand on the same images."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.interop import feature_files as station
from fastmoco.load.executor import Settings
from fastmoco.load.loader import evaluation_batches
from fastmoco.models.encoder import Encoder
from fastmoco.runs.run_folder import RunFolder

from .conftest import Run

Make = Callable[..., RunFolder]


@pytest.mark.parametrize("feature", ["backbone", "head"])
def test_features_are_those_of_the_encoder_in_id_order(
    feature: str, run: Run, make_run: Make, trained: Encoder, small_set: ShardSet, tmp_path: Path
) -> None:
    out = tmp_path / "features.npy"
    arguments = ("--out", out, "--feature", feature, "--device", "cpu")
    root = make_run().root
    code, said, err = run("embed", root, small_set.root, *arguments)
    width = 8 if feature == "head" else 512
    assert code == 0 and f"24 x {width} {feature} features of step 12" in said, err
    found, ids = np.load(out), np.load(tmp_path / "features.ids.npy")
    assert found.dtype == np.float32 and found.shape == (24, width)
    assert ids.dtype == np.int64 and ids.tolist() == list(range(24))
    mean, std = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
    look = {
        "size": 16,
        "mean": mean,
        "std": std,
        "share": 1.0,
        "settings": Settings("fused", threads=1),
    }
    batches = evaluation_batches(ConcatShardSets([small_set]), ids=slice(0, 24), batch=24, **look)
    images = next(iter(batches)).views[0]
    with torch.inference_mode():
        wanted = (trained if feature == "head" else trained.backbone)(images)
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=1e-4)
    about = json.loads((tmp_path / "features.json").read_text())
    assert about == {
        "run": "run",
        "step": 12,
        "set_id": small_set.manifest.set_id,
        "feature": feature,
        "precision": "fp32",
        "encoder": json.loads((root / "encoder.json").read_text()),
        "samples": 24,
        "width": width,
    }


@pytest.mark.parametrize("name", ["features.npy", "features.ids.npy", "features.json"])
def test_no_file_is_overwritten(
    name: str, run: Run, make_run: Make, small_set: ShardSet, tmp_path: Path
) -> None:
    (tmp_path / name).write_text("precious")
    out = tmp_path / "features.npy"
    code, _, err = run("embed", make_run().root, small_set.root, "--out", out)
    assert code == 2 and f"{name} exists" in err
    assert (tmp_path / name).read_text() == "precious"
    assert {p.name for p in tmp_path.iterdir()} == {name, "run"}


def test_a_name_of_another_kind(
    run: Run, make_run: Make, small_set: ShardSet, tmp_path: Path
) -> None:
    code, _, err = run("embed", make_run().root, small_set.root, "--out", tmp_path / "features.csv")
    assert code == 2 and "must end in .npy" in err


def test_what_fails_on_the_way_leaves_no_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(path: Path, array: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(station.np, "save", broken)
    with pytest.raises(OSError, match="disk full"):
        station.write_features(tmp_path / "a.npy", np.zeros((2, 3), np.float32), np.arange(2), {})
    assert not list(tmp_path.iterdir())
