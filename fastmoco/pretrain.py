"""Assembles a run from its recipe: sets, loader, engine, monitor, loop."""

import os
import platform
import sys
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from fastmoco.config.loading import load_recipe
from fastmoco.config.recipe import Recipe
from fastmoco.core.distributed import AsyncAnyFlag, World, init_distributed
from fastmoco.core.precision import Precision
from fastmoco.core.streams import Spared, lasting_output
from fastmoco.core.terminal import echo, speaks, told
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import CheckpointError, DataError, FastmocoError, UsageError
from fastmoco.evaluate.features import make_preprocessing
from fastmoco.evaluate.monitor import RunMonitor
from fastmoco.interop.initial import Initial, read_initial
from fastmoco.load.executor import get_settings
from fastmoco.load.loader import Loader, check_channels
from fastmoco.load.sampler import Plan
from fastmoco.loggers.console import LiveDisplay
from fastmoco.loggers.trackers import trackers
from fastmoco.models.encoder import Encoder
from fastmoco.models.timm_backbone import remarks
from fastmoco.plots import draw_curves
from fastmoco.runs.checkpoints import Fingerprint, State, get_fingerprint
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train import loop
from fastmoco.train.engine import Engine, check_bn_group
from fastmoco.train.estimate import outlook
from fastmoco.train.objectives.memory_bank import check_bank

_USAGE = """usage: pretrain RECIPE [key=value ...] [--dry-run]
RECIPE: a shipped recipe's name, or a path to a .yaml; --dry-run: say what the run would do and
need, and stop."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run `RECIPE [key=value ...] [--dry-run]` as one rank and return the exit code.

    A user's error is one plain line from the rank that met it, never a traceback.
    """
    arguments = list(sys.argv[1:] if arguments is None else arguments)
    with lasting_output():
        return _run_command(arguments)


def _run_command(arguments: list[str]) -> int:
    try:
        if {"-h", "--help"} & set(arguments):
            echo(_USAGE)
            return 0
        if not arguments:
            raise UsageError(_USAGE)
        overrides = [argument for argument in arguments[1:] if argument != "--dry-run"]
        recipe = load_recipe(arguments[0], overrides)
        if len(overrides) < len(arguments) - 1:
            dry_run(recipe)
        else:
            pretrain(recipe)
    except (FastmocoError, OSError) as error:
        return told(error)
    except KeyboardInterrupt as error:
        if speaks():
            echo(_describe_interrupt(error), err=True)
        return 130
    return 0


def dry_run(recipe: Recipe) -> None:
    """Print what a run would do and need, on as many ranks as are started.

    Raises:
        FastmocoError: why it would not start.
    """
    with init_distributed(recipe.runtime.device) as (world, device):
        recipe, loader = _prepare(recipe, world, device)
        monitor = _open_monitor(recipe, loader, world, device)
        words = {"monitor": monitor.describe_cost(loader.plan.samples)} if monitor else {}
        if world.is_main:
            network = Encoder(recipe.encoder)
            plan = outlook(recipe, loader.plan, world, device, network)
            for name, value in (plan | words).items():
                echo(f"{name:<28}{value}")
            for sentence in remarks(recipe.encoder, network):
                echo(sentence)
        _read_initial(recipe, 0, world)


def pretrain(recipe: Recipe) -> RunFolder:
    """Train a recipe, from its last checkpoint if there is one; every rank calls this.

    Returns:
        The run folder.

    Raises:
        FastmocoError: what went wrong, in words; it is in the folder's status.json too.
    """
    with init_distributed(recipe.runtime.device, recipe.runtime.stall_s) as (world, device):
        # Refuses what does not fit, before the run folder is made.
        recipe, loader = _prepare(recipe, world, device)
        run = RunFolder(recipe.out)
        with run.locked() if world.is_main else nullcontext(), _recording_failures(run, world):
            done = _train(recipe, loader, run, world, device)
            if world.is_main:
                _finish(recipe, run, done, loader.plan)
    return run


@contextmanager
def _recording_failures(run: RunFolder, world: World) -> Iterator[None]:
    """Write down why a run ended early, as far as the disk still can."""
    try:
        yield
    except FastmocoError as error:
        # A damaged image is met by one rank alone; the first sees only that one gone. A start that
        # is refused leaves the word of a run that has ended.
        if (world.is_main or isinstance(error, DataError)) and not run.ended():
            with suppress(OSError):
                run.finish(error.exit_code, str(error))
        raise
    except KeyboardInterrupt as error:
        if world.is_main:
            with suppress(OSError):
                run.finish(130, _describe_interrupt(error))
        raise
    except Exception as error:
        if world.is_main and not run.ended():
            code = UsageError.exit_code if isinstance(error, OSError) else 1  # see `told`
            with suppress(OSError):
                run.finish(code, f"{type(error).__name__}: {error}. {run.last_good()}")
        raise


def _describe_interrupt(error: KeyboardInterrupt) -> str:
    """Return in words where; no marker is left: nobody starts a run again that a person ended."""
    return " ".join(["interrupted", *error.args]) + ": the same command goes on"


def _prepare(recipe: Recipe, world: World, device: torch.device) -> tuple[Recipe, Loader]:
    check_bn_group(recipe, world.size, world.size // world.local_size)
    data = ConcatShardSets.open(recipe.data.sets)
    recipe = resolve(recipe, data.sets[0])
    loader = Loader.of(recipe, data, get_settings(recipe.runtime, world, device), world)
    check_bank(recipe, len(loader.ids))
    return recipe, loader


def _finish(recipe: Recipe, run: RunFolder, done: int, plan: Plan) -> None:
    """Leave word of how the run ended, and the curves behind."""
    last_step = recipe.last_step(plan.steps_per_epoch)
    with Spared("status.json"):
        if done < last_step:
            words = f"at step {done} of {last_step}: the same command goes on"
            echo(f"stopped {words}")
            run.stop(f"stopped by a signal {words}")
        elif done > last_step:
            words = f"already at step {done}, past the end of this recipe (step {last_step}"
            words += f", stop_epoch {recipe.stop_epoch}" if recipe.stop_epoch else ""
            words += "): nothing to do"
            echo(words)
            run.finish(0, words)
        else:
            run.finish(0, f"finished step {last_step}, epoch {last_step / plan.steps_per_epoch:g}")
    try:
        with Spared("curves.png"):
            draw_curves(run.root / "curves.png", run.rows(), recipe.candidates, recipe.name)
    except ImportError:
        echo("no curves.png: matplotlib is not installed (pip install 'fastmoco[report]')")


def _train(
    recipe: Recipe, loader: Loader, run: RunFolder, world: World, device: torch.device
) -> int:
    """Return the steps done at the end."""
    if recipe.runtime.deterministic:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # or cuBLAS refuses
    torch.use_deterministic_algorithms(recipe.runtime.deterministic)
    plan = loader.plan
    executor = loader.settings.executor
    fingerprint = get_fingerprint(
        recipe, loader.data.set_ids, plan.samples, plan.digest(), executor
    )
    state, start = _begin(run, fingerprint, world)
    initial = _read_initial(recipe, start, world)
    # Of the weights that step 0 began with, whatever the recipe says by now.
    fingerprint["init"] = initial.sha256 if initial else run.fingerprint.get("init")
    engine = Engine(recipe, world, device, loader.ids, initial.weights if initial else None)
    if world.is_main:
        said = run.begin(recipe, versions(world, device), start)
        for sentence in (*said, *remarks(recipe.encoder, engine.encoder_q)):
            echo(sentence)
    monitor = _open_monitor(recipe, loader, world, device)
    with ExitStack() as stack:
        displays: list[loop.Display] = []
        if world.is_main:
            live = LiveDisplay(recipe, start, loader.plan.steps_per_epoch)
            displays.append(stack.enter_context(live))
            displays += [stack.enter_context(t) for t in trackers(recipe, run.root, start)]
        trainer = loop.Trainer(
            recipe,
            engine,
            loader,
            run,
            fingerprint,
            AsyncAnyFlag(world),
            displays,
            monitor,
        )
        if state:
            trainer.load(state)
        state = None  # not to be held for the whole run
        return trainer.train(start)


def _open_monitor(
    recipe: Recipe, loader: Loader, world: World, device: torch.device
) -> RunMonitor | None:
    settings = get_settings(recipe.runtime, world, device)
    preprocessing = make_preprocessing(recipe.encoder, recipe.runtime.precision, settings)
    return RunMonitor.open(recipe, loader, preprocessing, world)


def _begin(run: RunFolder, fingerprint: Fingerprint, world: World) -> tuple[State | None, int]:
    """Return the state to go on from and its step, on all ranks the same."""
    state, start = run.latest(fingerprint) or (None, 0)
    if len(starts := world.union({start})) > 1:
        raise CheckpointError(
            f"The ranks find different checkpoints in {run.root} (steps {sorted(starts)}): put "
            "out= on a disk that all machines share."
        )
    if state is None and run.ended_well():
        raise UsageError(
            f"{run.root} is of a run that ended, and its checkpoints are gone: choose another "
            "out=DIR."
        )
    if world.is_main:
        for name in run.damaged:
            echo(f"{name} is damaged (not the bytes of its sha256): going on from step {start}")
    return state, start


def _read_initial(recipe: Recipe, start: int, world: World) -> Initial | None:
    """Return the weights that a run starts from, if it does and is at step 0; say which."""
    if recipe.init is None:
        return None
    if start:
        if world.is_main:
            echo(f"init {recipe.init} is not read: the run goes on from its step {start}")
        return None
    initial = read_initial(recipe.init, recipe.encoder)
    if len(set(world.gather_object(initial.sha256))) > 1:
        raise CheckpointError(
            f"The ranks read different weights from init {recipe.init}: put them on a disk that "
            "all machines share, or name the checkpoint of a run that is still training."
        )
    if world.is_main:
        echo("\n".join(initial.notes))
    return initial


def resolve(recipe: Recipe, first: ShardSet) -> Recipe:
    """Return the recipe with what it leaves open: its first set's statistics, and a precision.

    Raises:
        UsageError: the set has other channels than the encoder.
    """
    check_channels([first], recipe.encoder.channels)
    mean = recipe.encoder.mean or tuple(first.manifest.mean)
    std = recipe.encoder.std or tuple(first.manifest.std)
    encoder = recipe.encoder.model_copy(update={"mean": mean, "std": std})
    on_gpu = recipe.runtime.device != "cpu" and torch.cuda.is_available()
    precision = Precision.of(recipe.runtime.precision, "cuda" if on_gpu else "cpu").name
    runtime = recipe.runtime.model_copy(update={"precision": precision})
    return recipe.model_copy(update={"encoder": encoder, "runtime": runtime})


def versions(world: World, device: torch.device) -> dict[str, Any]:
    """Return what a number depends on beside its recipe."""
    on_gpu = device.type == "cuda"
    return {
        "python": platform.python_version(),
        "machine": torch.cuda.get_device_name(device) if on_gpu else _processor(),
        "cores": os.cpu_count(),
        "ranks": world.size,
        **{name: _version(name) for name in ("fastmoco", "torch", "torchvision", "numpy")},
        "dali": _version("nvidia-dali-cuda130") or _version("nvidia-dali-cuda120"),
    }


def _processor() -> str:
    return platform.processor() or platform.machine()  # some distributions tell only the latter


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


if __name__ == "__main__":
    sys.exit(main())
