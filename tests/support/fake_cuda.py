"""The step on a GPU that is not there: torch's fake tensors know device, dtype and shape alone.

Every operator is dispatched as on a GPU, so that a tensor left on the CPU, a dtype that does not
match or an overload without a fused kernel shows. Autograd's engine and fused optimizers need a
real one: gradients are empty tensors here, `_fused_*` does nothing, and nothing is pinned.
"""

import sys
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.torch_version import TorchVersion
from torch.utils._python_dispatch import TorchDispatchMode

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.train.engine import Engine
from fastmoco.train.guard import RunningStatistics
from fastmoco.train.optimizers import build_optimizer

GPU = torch.device("cuda", 0)
NEEDS_FAKES = pytest.mark.skipif(
    torch.__version__ < TorchVersion("2.11"),
    reason="an older torch asks for a driver, fake tensors or not (2.6 does)",
)


class Overloads(TorchDispatchMode):
    """Counts the operators that run below it, by overload, such as aten.add.Tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.counts[str(func)] += 1
        if "_fused_" in str(func):
            return None
        return func(*args, **(kwargs or {}))


def on_gpu(t: torch.Tensor) -> torch.Tensor:
    """Return a fake tensor of the same shape, dtype and layout on the GPU."""
    return torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=GPU)


def move(module: nn.Module) -> None:
    for part in module.modules():
        for name, parameter in part.named_parameters(recurse=False):
            setattr(part, name, nn.Parameter(on_gpu(parameter), parameter.requires_grad))
        for name, buffer in part.named_buffers(recurse=False):
            setattr(part, name, on_gpu(buffer))


@contextmanager
def engine(recipe: Recipe) -> Iterator[Engine]:
    """Yield the engine of a recipe on the fake GPU, inside of the mode that it needs."""
    # Outside of the mode: torch cannot move modules inside.
    moco = Engine(recipe, World(), torch.device("cpu"))

    def backward(loss: torch.Tensor) -> None:
        assert loss.device == GPU and loss.dim() == 0
        for parameter in moco.encoder_q.parameters():
            parameter.grad = torch.empty_like(parameter)

    with (
        FakeTensorMode(),
        mock.patch("torch.cuda.amp.common.amp_definitely_not_available", return_value=False),
        mock.patch("torch.cuda.is_bf16_supported", return_value=True),
        mock.patch.object(torch.Tensor, "backward", backward),
        mock.patch.object(torch.Tensor, "pin_memory", lambda t: t),
    ):
        objective = moco.objective
        encoders = moco.encoder_q, objective.encoder_k
        for module in (*encoders, objective.queue, moco.guard, moco.scale):
            move(module)
        precision = Precision(recipe.runtime.precision, "cuda")
        moco.device, moco._precision = GPU, precision
        objective._device, objective._precision = GPU, precision
        moco.statistics = RunningStatistics(encoders)
        moco._params = objective._params_q = list(moco.encoder_q.parameters())
        objective._params_k = list(objective.encoder_k.parameters())
        moco.optimizer = build_optimizer(recipe, moco._params)
        yield moco


def overloads(recipe: Recipe) -> Counter[str]:
    """Return how often each overload runs in a step past the first."""
    with engine(recipe) as moco:
        shape = recipe.batch, 3, recipe.encoder.image_size, recipe.encoder.image_size
        handed_over = {"dtype": torch.float16, "memory_format": torch.channels_last}  # by DALI
        views = [torch.empty(shape, device=GPU, **handed_over) for _ in range(2)]
        with Overloads() as seen:
            moco.step(*views, 0)
            seen.counts.clear()
            outcome = moco.step(*views, 1)
        assert {t.device for t in vars(outcome).values()} == {GPU}
        return seen.counts


def main(*overrides: str) -> None:
    """Print the counts of `moco_v2_imagenet_r50` with overrides, the most frequent first."""
    recipe = load_recipe("moco_v2_imagenet_r50", [*overrides, "runtime.device=cpu"])
    counts = overloads(recipe)
    for name, count in counts.most_common():
        print(f"{count:6} {name}")


if __name__ == "__main__":
    main(*sys.argv[1:])
