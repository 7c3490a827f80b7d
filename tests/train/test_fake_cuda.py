"""A step on CUDA, seen without a GPU: devices and dtypes match, and no operator hides a loop."""

import pytest
from fake_cuda import NEEDS_FAKES, overloads
from recipes import overrides

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe

pytestmark = NEEDS_FAKES


def recipe(**options: object) -> Recipe:
    small = {"arch": "resnet10", "image_size": 32, "batch": 16, "bn_group": 4, "queue": 48}
    changes = overrides(**small | options, device="cpu")
    return load_recipe("moco_v2_imagenet_r50", changes)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"precision": "fp16"},
        {"precision": "fp32", "clip": 1.0},
        {"symmetric": True},
        {"accumulate": 2},
        {"precision": "fp16", "symmetric": True, "accumulate": 2, "clip": 1.0},
        {"bn": "whole"},
        {"shuffle": "off"},
        {"stem": "small", "head": "linear"},
        {"optimizer": "{name: lars, lr: 0.1}"},
        {"optimizer": "{name: adam, lr: 0.001}", "clip": 1.0},
        {"optimizer": "{name: adamw, lr: 0.001}", "precision": "fp32"},
    ],
    ids=str,
)
def test_every_operator_of_a_step_finds_its_device_dtype_and_fused_kernel(options):
    wanted = recipe(**options)
    counts = overloads(wanted)
    foreach = {name: n for name, n in counts.items() if "_foreach_" in name}
    # Momentum, the norm of the gradients, the loss scale and the clip: one fused launch for each
    # operation. (`_foreach_lerp_` with weights on the device would be a loop inside.)
    launches = {
        "aten._foreach_norm.Scalar": 1,
        "aten._foreach_sub.List": 1,
        "aten._foreach_mul_.Tensor": 1
        + (wanted.runtime.precision == "fp16")
        + (wanted.optimizer.clip is not None),
        "aten._foreach_add_.List": 1,
    }
    if wanted.optimizer.name == "lars":
        launches["aten._foreach_norm.Scalar"] += 2
        launches["aten._foreach_mul_.Tensor"] += 1
        launches["aten._foreach_mul.Tensor"] = 2
        launches["aten._foreach_add_.List"] += 3
        assert counts["aten.where.self"] < 8, "one for each parameter would be 40"
    else:
        assert counts[f"aten._fused_{wanted.optimizer.name}_.default"] == 1
        if wanted.optimizer.name != "sgd":  # torch counts the steps of each parameter
            launches |= {"aten._foreach_add_.Scalar": 1, "aten._foreach_sub_.List": 1}
    assert foreach == launches
    # BatchNorm joins nothing. What is left: parts of a step, keys, losses.
    assert counts["aten.cat.default"] < 4 * wanted.runtime.accumulate + 4
    groups = 2 * wanted.encoded_per_step // wanted.objective.bn_group  # of queries and of keys
    normalized = 0 if wanted.objective.bn == "whole" else 12 * groups  # resnet10 has 12 BatchNorms
    assert counts["aten.native_batch_norm.out"] == normalized
