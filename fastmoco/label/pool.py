"""A pool and what is labelled, as the encoder of a run sees them."""

from pathlib import Path
from typing import NamedTuple

import torch

from fastmoco.core.distributed import World, get_device
from fastmoco.core.rng import Ids
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError
from fastmoco.evaluate.features import Feature, embed, frozen_preprocessing
from fastmoco.interop.feature_files import open_features
from fastmoco.label.head import CHUNK, pool_center, standardize
from fastmoco.load.executor import get_settings
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder


class PoolFeatures(NamedTuple):
    """Standardized features of a run.

    Attributes:
        rows: (n, d) fp32 of the candidates: a pool may be large.
        known: (m, d) fp64 of what is labelled; m 0: nothing is.
        step: of the checkpoint.
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
    file: Path | None = None,
) -> PoolFeatures:
    """Return the features of candidates, and of labelled samples about the same center.

    Args:
        root: the run.
        pool: whose samples the candidates are.
        candidates: their ids.
        train: what is labelled; None: nothing is.
        feature: of the backbone or of the head.
        device: "auto", "cpu" or "cuda".
        warnings: a sentence is added if the encoder is untrained.
        file: the pool's features, as `fastmoco embed` wrote them; None: they are computed.

    Raises:
        CheckpointError: the run has no checkpoint.
        DataError: the file is not of that pool, step and feature, or has numbers that are not
            finite.
    """
    run, where = RunFolder(root), get_device(device, 0)
    encoder, spec, step = load_encoder(run, where)
    if step == 0 and not run.imported:
        warnings.append(f"the encoder of {root} is untrained (step 0)")
    settings = get_settings(run.runtime(), World(), where)
    preprocessing = frozen_preprocessing(spec, run.runtime(), settings)

    set_id, stored = pool.manifest.set_id, None
    if file:
        about = {"set_id": set_id, "step": step, "feature": feature}
        width = encoder.dim if feature == "head" else encoder.features
        stored = open_features(file, about, len(pool), width)

    def features(data: ConcatShardSets, ids: Ids) -> torch.Tensor:
        if stored is not None and data.set_ids == [set_id]:
            found = torch.from_numpy(stored[ids]).to(where, torch.float32)
            if len(odd := (~found.isfinite().all(dim=1)).nonzero()):
                raise DataError(
                    f"{file}: the features of sample {ids[int(odd[0])]} are not finite."
                )
            return found
        return embed(encoder, data, feature, preprocessing, ids=ids)

    rows = features(ConcatShardSets([pool]), candidates)
    center = pool_center(rows)
    known = standardize(features(train.data, train.ids) if train else rows[:0], center)
    for part in torch.split(rows, CHUNK):  # in place: there is room for one pool
        part.copy_(standardize(part, center))
    return PoolFeatures(rows, known, step)
