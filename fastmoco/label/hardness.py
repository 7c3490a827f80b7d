"""`fastmoco hardness`: how hard each sample is for a run, by the run's own objective."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.nn.functional import normalize

from fastmoco.core.distributed import World
from fastmoco.core.rng import Stream
from fastmoco.dataset.numbers import Numbers
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.errors import CheckpointError, DivergedError, UsageError
from fastmoco.evaluate.features import frozen_preprocessing
from fastmoco.load.loader import drawn_batches
from fastmoco.runs.load_encoder import build_frozen, read_latest
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.objectives.losses import info_nce

_BATCH = 128


@dataclass(frozen=True)
class Hardness:
    """What was measured.

    Attributes:
        data: the sets.
        numbers: (N,) mean loss of each sample, in id order.
        correlation: of the means over the odd and over the even rounds; None: of one round, or
            where all samples are equally hard.
        about: what the numbers depend on: run, step, rounds and the rest.
    """

    data: ConcatShardSets
    numbers: Numbers
    correlation: float | None
    about: dict[str, Any]


def measure_hardness(
    root: Path,
    sets: Sequence[Path] = (),
    rounds: int = 8,
    seed: int = 0,
    device: torch.device = torch.device("cpu"),
    world: World = World(),
    on_progress: Callable[[int, int], None] = lambda done, whole: None,
) -> Hardness:
    """Measure the InfoNCE loss of every sample, averaged over pairs of the run's own views.

    Both encoders in evaluation mode; negatives are the keys in the checkpoint's queue.

    Args:
        root: the run.
        sets: the data; none: that of the run.
        rounds: pairs of views a sample. Of one pair, the loss says more about the views.
        seed: of the views.
        device: where to compute.
        world: each measures its share of the samples; all of them get every number.
        on_progress: called with the batches done and their number.

    Raises:
        UsageError: the weights were imported, or the run's objective has no queue.
        CheckpointError: no checkpoint, or an empty queue.
        DataError: a set is missing or damaged.
        DivergedError: a weight or a loss is not a finite number.
    """
    run = RunFolder(root)
    recipe, spec = run.recipe(), run.spec()
    if recipe is None:
        raise UsageError(f"The weights of {root} were imported: there are no views to measure by.")
    data = ConcatShardSets.open(sets or recipe.data.sets)
    state, step = read_latest(run)
    if "queue" not in state:
        raise UsageError(
            f"Hardness is measured against a queue of keys, which the objective of {root} "
            f"({recipe.objective.name}) does not keep: take a run of moco."
        )
    filled = int(state["queue"]["filled"])
    if not filled:
        raise CheckpointError(f"The queue of {root} is still empty: let it train a step.")
    negatives = state["queue"]["keys"][:filled].float().to(device)
    encoder_q, encoder_k = (
        build_frozen(run, spec, state[name], step, device) for name in ("encoder_q", "encoder_k")
    )
    preprocessing = frozen_preprocessing(spec, recipe.runtime, device, world)
    own = world.share(len(data))
    halves = torch.zeros(own.stop - own.start, 2, dtype=torch.float64, device=device)
    ids = np.arange(own.start, own.stop)
    done, whole = 0, rounds * -(-len(halves) // _BATCH)
    for turn in range(rounds):
        # What is drawn is a function of round and sample: of no batch size and number of ranks.
        batches = drawn_batches(
            data,
            ids=ids,
            views=recipe.views,
            seed=seed,
            first=turn * len(data) + own.start,
            stream=Stream.HARDNESS,
            batch=_BATCH,
            **preprocessing.drawn,
        )
        for batch in batches:
            query_view, key_view = (preprocessing.cast(view) for view in batch.views)
            with torch.inference_mode():
                with preprocessing.autocast():
                    projected = encoder_q(query_view), encoder_k(key_view)
                q, k = (normalize(rows.float(), dim=1) for rows in projected)
                loss, _, _ = info_nce(q, k, negatives, recipe.objective.temperature)
            first = int(batch.ids[0]) - own.start
            halves[first : first + len(loss), turn % 2] += loss
            done += 1
            on_progress(done, whole)
    sums = world.gather_shares(halves, len(data)).cpu().numpy()
    numbers = sums.sum(axis=1) / rounds
    _check_finite(numbers, data)
    about = {
        "run": run.name,
        "step": step,
        "rounds": rounds,
        "seed": seed,
        "negatives": filled,
        "temperature": recipe.objective.temperature,
        "correlation_of_halves": (correlation := _correlate(sums)),
    }
    return Hardness(data, numbers, correlation, about)


def _correlate(halves: Numbers) -> float | None:
    """Return the correlation of the columns of (N, 2) numbers, if there is one."""
    if len(halves) < 2 or not np.ptp(halves, axis=0).all():
        return None
    return float(np.corrcoef(halves[:, 0], halves[:, 1])[0, 1])


def _check_finite(numbers: Numbers, data: ConcatShardSets) -> None:
    odd = np.flatnonzero(~np.isfinite(numbers))
    if len(odd):
        raise DivergedError(
            f"The loss of {len(odd)} images is not a finite number, such as that of "
            f"{data.describe(int(odd[0]))}: the run's weights or the image's normalization are too "
            "large."
        )


def describe(hardness: Hardness, root: Path, out: Path) -> list[str]:
    """Return what a person should read of it."""
    numbers, rounds = hardness.numbers, hardness.about["rounds"]
    low, high = np.quantile(numbers, [0.05, 0.95])
    lines = [
        f"{out}: {len(numbers):,} samples, loss of {rounds} pairs of views each, mean "
        f"{numbers.mean():.3f}, nine tenths of them within {low:.3f} .. {high:.3f}"
    ]
    if hardness.correlation is not None:
        lines.append(f"  odd and even rounds correlate by {hardness.correlation:.2f}")
    lines.append(f"show hard images more often: data.weights={out} in a recipe of the same sets")
    if len(hardness.data.sets) == 1:
        pool = hardness.data.sets[0].root
        lines.append(
            f"ask for their labels: fastmoco query {root} {pool} --budget N --strategy scores "
            f"--scores {out}"
        )
    return lines
