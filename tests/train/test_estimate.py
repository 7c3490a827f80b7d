"""What a run is said to need, against what it does need."""

import json

import numpy as np
import pytest
import torch

from fastmoco.config.loading import load_recipe
from fastmoco.models.encoder import Encoder
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.estimate import footprint, shuffle_bytes, state_copies
from fastmoco.train.objectives.shuffle_bn import permutation
from fastmoco.train.optimizers import build_optimizer


@pytest.mark.parametrize("precision", ["bf16", "fp32"])
def test_the_footprint_is_what_a_real_pass_keeps(precision):
    recipe = load_recipe("demo", [f"runtime.precision={precision}", "encoder.image_size=32"])
    weights, kept = footprint(recipe, rows=4)
    encoder = Encoder(recipe.encoder)
    assert weights == sum(4 * p.numel() for p in encoder.parameters())
    own = {t.data_ptr() for t in encoder.state_dict(keep_vars=True).values()}
    found = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.data_ptr() not in own:
            found[tensor.data_ptr()] = tensor  # held, so that no address is used twice
        return tensor

    hooks = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
    with hooks, torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
        encoder(torch.zeros(4, 3, 32, 32))
    real = sum(t.untyped_storage().nbytes() for t in found.values())
    assert kept == pytest.approx(real, rel=0.02) and kept > 1e5


def test_the_footprint_grows_with_the_batch():
    recipe = load_recipe("demo", ["runtime.precision=fp32"])  # bf16 keeps a copy of the weights too
    small, large = (footprint(recipe, rows)[1] for rows in (8, 16))
    assert large == pytest.approx(2 * small, rel=0.02)


@pytest.mark.parametrize(
    "options",
    [
        *({"name": name} for name in ("sgd", "lars", "adam", "adamw", "adagrad", "rmsprop")),
        {"name": "sgd", "momentum": 0},
        {"name": "rmsprop", "momentum": 0},
    ],
    ids=str,
)
def test_the_optimizers_state_is_what_it_keeps_after_a_step(options):
    recipe = load_recipe("demo", [f"optimizer={json.dumps({'lr': 0.1, **options})}"])
    weight = torch.nn.Parameter(torch.ones(1000, 10))
    optimizer = build_optimizer(recipe, [weight])
    weight.grad = torch.ones_like(weight)
    optimizer.step()
    kept = sum(v.numel() for v in optimizer.state[weight].values() if torch.is_tensor(v))
    assert state_copies(recipe.optimizer) == round(kept / weight.numel())


def test_the_shuffles_bytes_are_those_of_its_permutations():
    recipe = load_recipe("moco_v2_imagenet_r50", ["runtime.precision=bf16"])
    image = 3 * 224 * 224 * 2
    assert shuffle_bytes(recipe, 8, "all_gather") == 224 * image
    orders = np.stack([permutation(0, step, 256, 1) for step in range(200)])
    strange = (orders[:, :32] // 32 != 0).sum(axis=1).mean()  # rows that rank 0 gets from others
    assert shuffle_bytes(recipe, 8, "all_to_all") == pytest.approx(strange * image, rel=0.02)
    alone = load_recipe("moco_v2_imagenet_r50", ["objective.shuffle=off"])
    assert shuffle_bytes(alone, 8, "all_gather") == 0
    twice = load_recipe(
        "moco_v2_imagenet_r50", ["objective.symmetric=true", "runtime.precision=bf16"]
    )
    assert shuffle_bytes(twice, 8, "all_gather") == 2 * 224 * image


def test_a_dry_run_says_what_would_be_and_does_nothing(recipe, capsys, tmp_path):
    assert main([str(recipe), "--dry-run", "schedule.epochs=7"]) == 0
    told = capsys.readouterr().out
    assert "21 (3 an epoch)" in told and "groups of 4, 2 per rank" in told
    assert "96 images every 2 epochs, about 33 % of the time" in told  # 4 * 48 for the epochs
    assert not RunFolder(tmp_path / "run").root.exists()
    assert main([str(recipe), "--dry-run", "batch=32"]) == 2  # refuses what the run would
