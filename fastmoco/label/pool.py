"""What an encoder makes of a pool: features of candidates, and of what is labelled."""

from pathlib import Path
from typing import NamedTuple

import torch

from fastmoco.core.distributed import World, get_device
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.evaluate.features import Feature, embed, frozen_preprocessing
from fastmoco.label.head import CHUNK, pool_center, standardize
from fastmoco.load.executor import get_settings
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder


class PoolFeatures(NamedTuple):
    """Standardized features by one encoder, see `label.head.standardize`.

    Attributes:
        rows: (n, d) of the candidates, in fp32 as a pool may be large.
        known: (m, d) fp64 of what is labelled.
        step: of the encoder's checkpoint.
    """

    rows: torch.Tensor
    known: torch.Tensor
    step: int


def embed_pool(
    root: Path,
    pool: ShardSet,
    candidates: Ids,
    train: Labelled | None,
    feature: Feature,
    device: str,
    warnings: list[str],
) -> PoolFeatures:
    """Embed candidates and labelled samples by a run.

    Raises:
        CheckpointError: the run has no checkpoint.
        DivergedError: a weight or a feature is no finite number.
    """
    run, where = RunFolder(root), get_device(device, 0)
    encoder, spec, step = load_encoder(run, where)
    if step == 0 and run.recipe():  # an import has none
        warnings.append(f"the encoder of {root} is untrained (step 0)")
    settings = get_settings(run.runtime(), World(), where)
    preprocessing = frozen_preprocessing(spec, run.runtime(), settings)

    def features(shard_set: ShardSet, ids: Ids) -> torch.Tensor:
        data = ConcatShardSets([shard_set])
        return embed(encoder, data, feature, preprocessing, ids=ids)

    rows = features(pool, candidates)
    center = pool_center(rows)
    known = standardize(features(train.set, train.ids) if train else rows[:0], center)
    for part in torch.split(rows, CHUNK):  # in place: there is room for one pool
        part.copy_(standardize(part, center))
    return PoolFeatures(rows, known, step)
