"""What a run would do and need, said before it starts."""

from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from fastmoco.config.objectives import MemoryBank, Moco, Shuffled
from fastmoco.config.recipe import Optimizer, Recipe
from fastmoco.core.distributed import World
from fastmoco.core.precision import Precision
from fastmoco.load.sampler import Plan
from fastmoco.models.encoder import Encoder, batch_norms
from fastmoco.train.engine import without_idle_shuffle


def outlook(
    recipe: Recipe, plan: Plan, world: World, device: torch.device, network: Encoder
) -> dict[str, str]:
    """Return the resolved plan of a run by name, in words.

    Args:
        recipe: resolved.
        plan: of its data.
        world: that would run it.
        device: of this one.
        network: that the recipe describes.
    """
    recipe = without_idle_shuffle(recipe, network)
    last_step = recipe.last_step(plan.steps_per_epoch)
    rows = recipe.encoded_per_step // world.size // recipe.runtime.accumulate
    encoder, activations = footprint(recipe, rows)
    networks = 3 if isinstance(recipe.objective, Moco) else 2  # with the gradients
    return {
        "run folder": str(recipe.out),
        "samples an epoch": f"{plan.samples:,}",
        "steps": f"{last_step:,} ({plan.steps_per_epoch:,} an epoch)",
        "images seen": f"{last_step * recipe.batch:,}",
        "ranks": f"{world.size} on {device.type}, {recipe.batch // world.size} images each a step",
        "BatchNorm": _batch_norm(recipe, world) if batch_norms(network) else "none",
        "learning rate": f"{recipe.lr:g} ({recipe.optimizer.name}, {recipe.schedule.name})",
        "precision": recipe.runtime.precision,
        "candidates of a query": f"{recipe.candidates:,} ({recipe.objective.name})",
        **_beside_the_encoder(recipe, plan.samples // recipe.data.repeat),
        "encoders and gradients": _mb(networks * encoder),
        "state of the optimizer": _mb(state_copies(recipe.optimizer) * encoder),
        "activations (estimate)": f"{_mb(activations)} a rank",
        "logits": _mb(2 * 4 * rows * (recipe.candidates - 1)),
        **_shuffle(recipe, world),
    }


def _beside_the_encoder(recipe: Recipe, images: int) -> dict[str, str]:
    """Return what an objective keeps, on every rank and in each checkpoint."""

    def size(rows: int) -> str:
        return f"{rows:,} x {recipe.encoder.dim}, {_mb(rows * recipe.encoder.dim * 4)}"

    match recipe.objective:
        case Moco(queue=queue):
            return {"queue": f"{size(queue)}, {queue / recipe.encoded_per_step:g} steps"}
        case MemoryBank():
            return {"bank": f"{size(images)}, on every rank and in each checkpoint"}
    return {}


def _shuffle(recipe: Recipe, world: World) -> dict[str, str]:
    if not recipe.objective.shuffled_views:
        return {}
    among = world.size if world.size > 1 else 8  # alone nothing travels: say what would
    sent = [
        f"{_mb(shuffle_bytes(recipe, among, how))} by {how}" for how in ("all_to_all", "all_gather")
    ]
    return {f"shuffle on {among} ranks": f"{', '.join(sent)} received by a rank each step"}


def _batch_norm(recipe: Recipe, world: World) -> str:
    objective = recipe.objective
    if objective.bn == "whole":
        return "over the whole batch" + " (for ablations)" * objective.shares_statistics
    groups = recipe.batch // world.size // objective.bn_group
    shuffle = f"; shuffle {objective.shuffle}" if isinstance(objective, Shuffled) else ""
    return f"groups of {objective.bn_group}, {groups} per rank{shuffle}"


def state_copies(optimizer: Optimizer) -> int:
    """Return how many numbers the optimizer keeps for each weight."""
    averages = {"adam": 2, "adamw": 2, "apex_adam": 2, "apex_lamb": 2, "adagrad": 1, "rmsprop": 1}
    return averages.get(optimizer.name, 0) + bool(optimizer.options().get("momentum"))


def shuffle_bytes(recipe: Recipe, ranks: int, exchange: str) -> int:
    """Return the bytes that a rank receives for the shuffle of a step, about.

    Args:
        recipe: of the run.
        ranks: that share the batch and shuffle among themselves.
        exchange: "all_gather": the images of all other ranks; "all_to_all": those of its own
            places that they hold.
    """
    value = Precision.of(recipe.runtime.precision, "cpu").comm_dtype.itemsize
    pixels = recipe.encoder.channels * recipe.encoder.image_size**2
    image = pixels * value * recipe.objective.shuffled_views
    elsewhere = recipe.batch * (ranks - 1) // ranks  # images that lie on other ranks
    return image * (elsewhere if exchange == "all_gather" else elsewhere // ranks)


def footprint(recipe: Recipe, rows: int) -> tuple[int, int]:
    """Return the bytes of one encoder's weights, and of what a pass of `rows` images keeps.

    The network is run on tensors without content: nothing is computed or allocated.
    """
    precision = Precision.of(recipe.runtime.precision, "cpu")
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage._cdata] = storage.nbytes()
        return tensor

    encoder = Encoder(recipe.encoder).to(precision.weights)
    with FakeTensorMode() as fake:
        state: dict[str, Any] = {
            n: fake.from_tensor(t) for n, t in encoder.state_dict(keep_vars=True).items()
        }
        spec = recipe.encoder
        shape = rows, spec.channels, spec.image_size, spec.image_size
        images = torch.empty(shape, dtype=precision.weights)
        hooks: Any = torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor)
        with hooks, precision.autocast():
            torch.func.functional_call(encoder, state, (images,))
        for tensor in state.values():
            kept.pop(tensor.untyped_storage()._cdata, None)
    return sum(p.nbytes for p in encoder.parameters()), sum(kept.values())


def _mb(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"
