"""Each optimizer against its plain form, and the flag that makes it skip a step."""

import copy
import sys
import types

import pytest
import torch
from recipes import recipe_from
from torch import nn

from fastmoco.config.recipe import OPTIMIZER_OPTIONS, Recipe
from fastmoco.errors import UsageError
from fastmoco.train.optimizers import build_optimizer, step_if

NATIVE = [name for name in OPTIMIZER_OPTIONS if not name.startswith("apex")]
ON_DEVICE = {"sgd", "lars", "adam", "adamw"}


def recipe(worker, **optimizer: object) -> Recipe:
    values = worker.DEFAULTS | {"optimizer": {"lr": 0.1, "weight_decay": 1e-2, **optimizer}}
    return recipe_from(values)


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.Conv2d(2, 3, 2), nn.Linear(6, 5), nn.Linear(5, 3)
    return nn.Sequential(*layers).double().to(memory_format=torch.channels_last)


def fill_gradients(net: nn.Module, step: int) -> None:
    generator = torch.Generator().manual_seed(step)
    for parameter in net.parameters():
        numbers = torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
        parameter.grad = torch.empty_like(parameter).copy_(numbers)  # laid out as autograd does


def plain(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    classes = {
        "sgd": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9, weight_decay=1e-2, foreach=False),
        "adam": lambda p: torch.optim.Adam(p, 0.1, weight_decay=1e-2, foreach=False),
        "adamw": lambda p: torch.optim.AdamW(p, 0.1, weight_decay=1e-2, foreach=False),
        "adagrad": lambda p: torch.optim.Adagrad(p, 0.1, weight_decay=1e-2, foreach=False),
        "rmsprop": lambda p: torch.optim.RMSprop(
            p, 0.1, momentum=0.9, weight_decay=1e-2, foreach=False
        ),
        "lars": PlainLARS,
    }
    return classes[name](parameters)


class PlainLARS:
    """Algorithm 1 of You et al., one layer after the other."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        self.parameters = parameters
        self.velocity = [torch.zeros_like(p) for p in parameters]

    def step(self) -> None:
        for parameter, v in zip(self.parameters, self.velocity, strict=True):
            g, rate = parameter.grad, 0.1
            if parameter.ndim > 1:
                g = g + 1e-2 * parameter.data
                rate = 0.1 * 0.001 * parameter.data.norm() / g.norm()
            v.copy_(0.9 * v + rate * g / 0.1)
            parameter.data -= 0.1 * v


@pytest.mark.parametrize("name", NATIVE)
def test_five_steps_equal_the_plain_form(worker, net, name):
    twin = copy.deepcopy(net)
    ours = build_optimizer(recipe(worker, name=name), list(net.parameters()))
    theirs = plain(name, list(twin.parameters()))
    start = [p.detach().clone() for p in net.parameters()]
    for step in range(5):
        fill_gradients(net, step)
        fill_gradients(twin, step)
        step_if(ours, torch.tensor(True))
        theirs.step()
    for mine, other, before in zip(net.parameters(), twin.parameters(), start, strict=True):
        assert torch.allclose(mine, other, rtol=0, atol=1e-12)
        assert (mine - before).abs().max() > 1e-5


@pytest.mark.parametrize("name", NATIVE)
@pytest.mark.parametrize("steps_before", [0, 2])
def test_a_step_with_nan_changes_neither_weights_nor_what_comes_after(
    worker, net, name, steps_before
):
    twin = copy.deepcopy(net)
    both = [
        (n, build_optimizer(recipe(worker, name=name), list(n.parameters()))) for n in (net, twin)
    ]
    for moment in range(steps_before + 2):
        for one, optimizer in both:
            if moment == steps_before:
                if one is net:  # the twin never meets the bad step
                    fill_gradients(one, 99)
                    next(one.parameters()).grad[0, 0] = torch.nan
                    step_if(optimizer, torch.tensor(False))
                continue
            fill_gradients(one, moment)
            step_if(optimizer, torch.tensor(True))
    for mine, other in zip(net.parameters(), twin.parameters(), strict=True):
        assert torch.equal(mine, other)


@pytest.mark.parametrize("name", NATIVE)
def test_only_some_have_to_ask_the_host(worker, net, name):
    optimizer = build_optimizer(recipe(worker, name=name), list(net.parameters()))
    assert getattr(optimizer, "_step_supports_amp_scaling", False) == (name in ON_DEVICE)


def test_the_rate_scales_with_the_batch(worker):
    assert recipe(worker, lr_batch=256).lr == pytest.approx(0.1 * 16 / 256)
    assert recipe(worker).lr == 0.1


def test_options_of_another_optimizer_are_refused(worker):
    with pytest.raises(UsageError, match="adamw has no momentum"):
        recipe(worker, name="adamw", momentum=0.9)
    with pytest.raises(UsageError, match="sgd has no trust"):
        recipe(worker, trust=0.001)


def test_apex_is_used_where_it_is_and_asked_for_where_it_is_not(worker, net, monkeypatch):
    parameters = list(net.parameters())
    with pytest.raises(UsageError, match="built from its source"):
        build_optimizer(recipe(worker, name="apex_adam"), parameters)
    stand_in = types.ModuleType("apex.optimizers")
    stand_in.FusedAdam = torch.optim.Adam
    monkeypatch.setitem(sys.modules, "apex", types.ModuleType("apex"))
    monkeypatch.setitem(sys.modules, "apex.optimizers", stand_in)
    found = build_optimizer(recipe(worker, name="apex_adam", betas=(0.8, 0.9)), parameters)
    assert found.param_groups[0]["betas"] == (0.8, 0.9)
    with pytest.raises(UsageError):  # another program of the name apex, without the class
        build_optimizer(recipe(worker, name="apex_lamb"), parameters)
