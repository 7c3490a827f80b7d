"""Images per second of a recipe on this machine: its loader, its step, and both together.

Together against the step alone says whether data waits. On a CPU both share the cores, so that
together is slower than either; on a GPU 95 % of the step alone is the aim.
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from itertools import cycle
from typing import Any, Protocol

import torch

from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import World, get_device
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader
from fastmoco.train.engine import Engine

WARM_UP = 5  # steps before a measurement: more than the loader makes ahead
BATCHES = 4  # synthetic ones, made once and used in turn
WHOLE = 0.95  # of the step's rate alone: data does not wait
Views = tuple[torch.Tensor, torch.Tensor]


class Stopwatch(Protocol):
    """A context manager that times its block, as `Timer` does."""

    seconds: float

    def __enter__(self) -> object: ...
    def __exit__(self, *raised: Any) -> None: ...


class Timer:
    """Wall time of a `with` block."""

    seconds = 0.0

    def __enter__(self) -> None:
        self._began = time.perf_counter()

    def __exit__(self, *raised: object) -> None:
        self.seconds = time.perf_counter() - self._began


@dataclass(frozen=True)
class Throughput:
    """What was measured, in images per second.

    Attributes:
        loader, step, together: each alone, and training as it is.
        data_wait_percent: of the time together that steps waited for their batch.
        on_gpu: where the step ran.
    """

    loader: float
    step: float
    together: float
    data_wait_percent: float
    on_gpu: bool

    def verdict(self) -> str:
        """Say what sets the pace, and what would change it."""
        if self.together >= WHOLE * self.step:
            return (
                "The step sets the pace: data never waits. A faster step: a smaller "
                "encoder.image_size or encoder.arch."
            )
        if self.loader < self.step:
            gpu = " runtime.decode=mixed," if self.on_gpu else ""
            return (
                f"The loader sets the pace: try{gpu} more runtime.threads if cores are idle, or "
                "a set packed smaller (fastmoco shard --short-side N)."
            )
        if not self.on_gpu:
            return "Loader and step share the cores: each alone is faster. That is as it should be."
        return (
            "Loader and step get into each other's way on the host: fewer runtime.threads may "
            "help, and runtime.compile=true, if it is off, leaves fewer kernels to launch."
        )


def throughput(recipe: Recipe, steps: int) -> Throughput:
    """Measure a resolved recipe on one process.

    Args:
        recipe: of the run; its monitor and its run folder are not touched.
        steps: in each measurement.

    Raises:
        DataError: the set is damaged, or smaller than a batch.
    """
    rates, values = {}, recipe.model_dump(mode="json")
    for arm in (loader_alone, step_alone, together):
        timer = Timer()
        done = arm(timer, values, steps)
        rates[arm.__name__] = done["images"] / timer.seconds
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return Throughput(
        rates["loader_alone"],
        rates["step_alone"],
        rates["together"],
        done["details"]["data_wait_percent"],
        get_device(recipe.runtime.device, 0).type == "cuda",
    )


def together(section: Stopwatch, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on what the loader draws."""
    run = _Run(recipe)
    batches, engine, waits = run.loader.batches(), run.engine(), []

    def work(number: int) -> None:
        began = time.perf_counter()
        batch = next(batches)
        waits.append(time.perf_counter() - began)
        engine.step(batch.views[0], batch.views[-1], number, batch.ids)

    done = run.measured(section, work, steps)
    waited = 100 * sum(waits[WARM_UP:]) / section.seconds
    return {**done, "details": {"data_wait_percent": waited}}


def step_alone(section: Stopwatch, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Train on batches that are there already."""
    run = _Run(recipe)
    engine, views = run.engine(), cycle(run.synthetic())
    ids = run.loader.ids[: run.recipe.batch]
    return run.measured(section, lambda number: engine.step(*next(views), number, ids), steps)


def loader_alone(section: Stopwatch, recipe: dict[str, Any], steps: int) -> dict[str, Any]:
    """Draw batches and drop them."""
    run = _Run(recipe)
    batches = run.loader.batches()
    return run.measured(section, lambda _: next(batches), steps)


@dataclass
class _Run:
    """The recipe on this machine, one rank."""

    values: dict[str, Any]
    recipe: Recipe = field(init=False)

    def __post_init__(self) -> None:
        self.recipe = Recipe.model_validate(self.values)
        self.device = get_device(self.recipe.runtime.device, 0)

    def engine(self) -> Engine:
        return Engine(self.recipe, World(), self.device, self.loader.ids)

    @cached_property
    def loader(self) -> Loader:
        data = ConcatShardSets.open(self.recipe.data.sets)
        settings = get_settings(self.recipe.runtime, World(), self.device)
        return Loader.of(self.recipe, data, settings)

    def synthetic(self) -> list[Views]:
        """Return batches in the layout, and the dtype, of the loader's on this device."""
        dtype = torch.float16 if self.device.type == "cuda" else torch.float32

        def made(view: torch.Tensor) -> torch.Tensor:
            return view.to(self.device, dtype, memory_format=torch.channels_last)

        spec = self.recipe.encoder
        drawn = synthetic(self.recipe.batch, spec.image_size, BATCHES, channels=spec.channels)
        return [(made(q), made(k)) for q, k in drawn]

    def measured(
        self, section: Stopwatch, work: Callable[[int], object], steps: int
    ) -> dict[str, Any]:
        """Call `work` with step numbers, the first ones as a warm-up; return the images done."""
        for number in range(WARM_UP):
            work(number)
        self._wait()
        with section:
            for number in range(WARM_UP, WARM_UP + steps):
                work(number)
            self._wait()
        return {"images": steps * self.recipe.batch}

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)


def synthetic(
    batch: int, size: int, count: int, seed: int = 0, channels: int = 3
) -> Iterator[Views]:
    """Yield `count` batches of two (batch, channels, size, size) fp32 views that look alike."""
    generator = torch.Generator().manual_seed(seed)
    for _ in range(count):
        image = torch.randn(batch, channels, size, size, generator=generator)
        noise = torch.randn(2, *image.shape, generator=generator)
        yield image + 0.3 * noise[0], image + 0.3 * noise[1]
