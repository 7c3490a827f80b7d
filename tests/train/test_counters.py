"""What a step costs, counted and not timed, so that it holds on every machine.

Each counter runs over the plain official step too and finds there what it does not find in ours.
"""

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch

from fastmoco.train.objectives.momentum import momentum_update

COUNTERS = Path(__file__).with_name("counters.py")


def _loaded() -> ModuleType:
    spec = importlib.util.spec_from_file_location("step_counters", COUNTERS)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # its dataclasses look themselves up
    spec.loader.exec_module(module)
    return module


counters = _loaded()


@pytest.fixture(scope="module")
def steps() -> dict[str, tuple]:
    """Engine and step of ours and of the official one, past their first step."""
    made = {name: counters.steps_of(name, counters.recipe_of()) for name in ("ours", "official")}
    for _, step in made.values():
        step(0)
    return made


@pytest.fixture(scope="module")
def calls(steps) -> dict:
    """The counter of one step of each."""
    return {name: counters.counted(lambda step=step: step(1)) for name, (_, step) in steps.items()}


def test_the_host_never_waits_for_the_device(steps):
    assert counters.host_syncs(lambda: steps["ours"][1](2)) == 0
    assert counters.host_syncs(lambda: steps["official"][1](2)) == 1, "its pointer is an int"


def test_the_host_counter_sees_inside_of_an_operator():
    """A 0-d weight instead of a list of them is read back without a word."""
    keys, queries, weight = [torch.ones(3)], [torch.zeros(3)], torch.tensor(0.5)
    assert counters.host_syncs(lambda: torch._foreach_lerp_(keys, queries, weight)) == 1
    assert counters.host_syncs(lambda: torch._foreach_lerp_(keys, queries, [weight])) == 0


def test_the_queue_is_never_cloned(calls):
    size = sorted((counters.OPTIONS["queue"], counters.OPTIONS["dim"]))
    clones = {
        name: sum(sorted(t.shape) == size for t in one.fresh()) for name, one in calls.items()
    }
    assert clones["ours"] == 0
    assert clones["official"] >= 1


def test_the_logits_are_never_put_into_one_tensor(calls):
    whole = (counters.OPTIONS["batch"], 1 + counters.OPTIONS["queue"])
    logits = {name: sum(t.shape == whole for t in one.fresh()) for name, one in calls.items()}
    assert logits["ours"] == 0
    assert logits["official"] >= 3, "the logits, their log-softmax and its gradient"


def test_the_momentum_update_is_three_calls_and_one_temporary_a_parameter(steps):
    ours, official = (steps[name][0] for name in ("ours", "official"))
    keys, queries = list(ours.objective.encoder_k.parameters()), list(ours.encoder_q.parameters())
    ok = torch.tensor(True)
    fused = counters.counted(lambda: momentum_update(keys, queries, 0.9, ok))
    loop = counters.counted(official.model.update_key_encoder)
    weight = ["aten::_to_copy", "aten::mul"]
    names = ["aten::_foreach_sub", "aten::_foreach_mul_", "aten::_foreach_add_"]
    called = [call.name for call in fused.calls if call.name != "prim::device"]
    assert called == [names[0], *weight, *names[1:]]
    numbers = sum(p.numel() for p in keys)
    assert sum(math.prod(t.shape) for t in fused.fresh()) == numbers + 2
    assert sum(math.prod(t.shape) for t in loop.fresh()) == 3 * numbers, "two products and a sum"


@pytest.mark.parametrize(
    "options", [{}, {"bn": "whole"}, {"symmetric": True}, {"accumulate": 2}], ids=str
)
def test_activations_stay_channels_last(options):
    # At 64 pixels every stage has more than one: a 1 x 1 image has no layout to see.
    recipe = counters.recipe_of(image_size=64, **options)
    _, step = counters.steps_of("ours", recipe)
    assert counters.counted(lambda: step(0)).conversions() == []


def test_the_layout_counter_sees_channels_first(calls):
    convolutions = ("aten::convolution", "aten::convolution_backward")
    # All but those of the last stage, whose images are 1 x 1 here, while its weights are not.
    assert len(calls["official"].conversions()) >= len(calls["official"].named(*convolutions)) // 2
    image = torch.randn(2, 3, 4, 4)
    turned = counters.counted(lambda: image.contiguous(memory_format=torch.channels_last))
    assert len(turned.conversions()) == 1


def _collectives(run_ranks, engine: str, **recipe: object) -> tuple[list, list[list[int]], int]:
    """Return names and bytes of a step's collectives, and of its all-reduces; bytes of gradients.

    Bytes are those of the tensors given: what is received, then what is sent.
    """
    found = run_ranks(2, program=COUNTERS, engine=engine, recipe=recipe)
    reduced = [size for name, size in found["collectives"] if name == "c10d::allreduce_"]
    others = [(name, size) for name, size in found["collectives"] if name != "c10d::allreduce_"]
    return others, reduced, found["parameter_bytes"]


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize("symmetric", [False, True])
@pytest.mark.parametrize(("exchange", "times"), [("all_to_all", 1), ("all_gather", 2)])
def test_two_ranks_exchange_images_and_keys_and_gradients_once(
    run_ranks, symmetric, exchange, times
):
    options = {"symmetric": symmetric, "exchange": exchange}
    others, reduced, parameters = _collectives(run_ranks, "ours", **options)
    side, rows = counters.OPTIONS["image_size"], counters.OPTIONS["batch"] // 2
    images = (1 + symmetric) * rows * 3 * side**2 * 2  # bf16
    keys = (1 + symmetric) * rows * counters.OPTIONS["dim"] * 4
    sent = [sizes[-1] for _, sizes in others]
    received = [sum(sizes[:-1]) for _, sizes in others]
    assert sent == [images, keys]
    assert received == [times * images, 2 * keys]
    assert sum(sizes[0] for sizes in reduced) == parameters, "DDP's buckets and nothing else"


@pytest.mark.slow
@pytest.mark.dist
def test_the_official_step_exchanges_more(run_ranks):
    others, reduced, parameters = _collectives(run_ranks, "official")
    side, rows = counters.OPTIONS["image_size"], counters.OPTIONS["batch"] // 2
    gathers = [sizes for name, sizes in others if name == "c10d::allgather_"]
    broadcasts = [sizes[0] for name, sizes in others if name == "c10d::broadcast_"]
    keys = rows * counters.OPTIONS["dim"] * 4
    assert [sizes[-1] for sizes in gathers] == [rows * 3 * side**2 * 4, keys, keys]
    queue = counters.OPTIONS["queue"] * counters.OPTIONS["dim"] * 4
    assert max(broadcasts) > queue, "DDP's buffers, the queue among them"
    assert len(others) >= 6
    assert sum(sizes[0] for sizes in reduced) == parameters
