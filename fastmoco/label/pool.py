"""A pool and what is labelled, as the encoder of a run sees them."""

from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from fastmoco.core.distributed import get_device
from fastmoco.core.rng import Ids
from fastmoco.core.terminal import echo
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet, holds_pseudo_labels
from fastmoco.errors import DataError
from fastmoco.evaluate.features import Feature, embed, frozen_preprocessing
from fastmoco.evaluate.saved import load_saved
from fastmoco.interop.feature_files import open_features
from fastmoco.label.classifier import Classifier, hash_labels, write_classifier
from fastmoco.label.head import CHUNK, Head, OutOfFold, cross_fit, pool_center, standardize
from fastmoco.label.request import read_request
from fastmoco.label.uncertainty import Beliefs
from fastmoco.models.encoder import hash_weights
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder


class PoolFeatures(NamedTuple):
    """Standardized features of a run.

    Attributes:
        rows: (n, d) fp32 of the candidates: a pool may be large.
        known: (m, d) fp64 of what is labelled; m 0: nothing is.
        step: of the checkpoint.
        center: (d,) fp64 that they are about; empty: not told.
        encoder: the hash of its weights, see `hash_weights`.
    """

    rows: torch.Tensor
    known: torch.Tensor
    step: int
    center: torch.Tensor = torch.empty(0)
    encoder: str = ""


def find_candidates(
    pool: ShardSet,
    train: Labelled | None,
    test: Labelled | None,
    exclude: Iterable[Path],
    warnings: list[str],
) -> Ids:
    """Return the ids, ascending, that nobody has a label of yet; say what is left out.

    Raises:
        DataError: none is left, or a request to exclude cannot be read.
    """
    free = np.ones(len(pool), dtype=bool)
    hashes = np.array(pool.samples["hash"])

    def leave_out(which: "np.ndarray[Any, Any]", why: str) -> None:
        if count := int(free[which].sum()):
            warnings.append(f"{count:,} samples are left out: {why}")
        free[which] = False

    for labelled, why in ((train, "labelled already"), (test, "of the test set")):
        if labelled:
            known = labelled.data.rows(labelled.ids)["hash"]
            leave_out(np.isin(hashes, known), why)
    for path in sorted((pool.root / "labels").glob("*.npy")):
        rows = Labelled.of(pool, path.stem)
        if holds_pseudo_labels(pool, path.stem):  # nobody has looked at these
            continue
        known = hashes[rows.ids]
        use = f"--more {pool.root} {path.stem} trains on them"
        leave_out(np.isin(hashes, known), f"labelled in the table {path.stem!r} ({use})")
    for request in exclude:
        asked = np.unique(np.array(read_request(request), np.int64))
        known = hashes[asked[(asked >= 0) & (asked < len(pool))]]
        leave_out(np.isin(hashes, known), f"asked for in {request}")
    _, firsts = np.unique(hashes, return_index=True)
    again = np.ones(len(pool), dtype=bool)
    again[firsts] = False
    leave_out(again, "their bytes come before in the pool")
    ids = np.flatnonzero(free)
    if not len(ids):
        raise DataError(f"{pool.root} has no sample left to ask for: all are labelled or asked.")
    return ids


def embed_pool(
    root: Path,
    pool: ShardSet,
    candidates: Ids,
    train: Labelled | None,
    feature: Feature,
    device: str,
    warnings: list[str],
    file: Path | None = None,
    stored: Classifier | None = None,
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
        stored: a classifier that is to see them, about its own center; None: the pool's.

    Raises:
        CheckpointError: the run has no checkpoint.
        DataError: the file is not of that pool, step and feature, or has numbers that are not
            finite; the classifier is not of that encoder and feature.
    """
    run, where = RunFolder(root), get_device(device, 0)
    encoder, spec, step = load_encoder(run, where)
    if step == 0 and not run.imported:
        warnings.append(f"the encoder of {root} is untrained (step 0)")
    preprocessing = frozen_preprocessing(spec, run.runtime(), where)
    digest = hash_weights(encoder.state_dict())[:16]
    if stored:
        stored.check(feature=feature, encoder=digest)
    set_id, on_file = pool.manifest.set_id, None
    if file:
        about = {"set_id": set_id, "step": step, "feature": feature}
        width = encoder.dim if feature == "head" else encoder.features
        on_file = open_features(file, about, len(pool), width)

    def features(data: ConcatShardSets, ids: Ids) -> torch.Tensor:
        if on_file is not None and data.set_ids == [set_id]:
            found = torch.from_numpy(on_file[ids]).to(where, torch.float32)
            if len(odd := (~found.isfinite().all(dim=1)).nonzero()):
                raise DataError(
                    f"{file}: the features of sample {ids[int(odd[0])]} are not finite."
                )
            return found
        return embed(encoder, data, feature, preprocessing, ids=ids)

    rows = features(ConcatShardSets([pool]), candidates)
    center = stored.center.to(where) if stored else pool_center(rows)
    known = standardize(features(train.data, train.ids) if train else rows[:0], center)
    for part in torch.split(rows, CHUNK):  # in place: there is room for one pool
        part.copy_(standardize(part, center))
    return PoolFeatures(rows, known, step, center, digest)


def get_classifier(
    seen: PoolFeatures,
    train: Labelled | None,
    feature: Feature,
    seed: int,
    stored: Classifier | None = None,
    file: Path | None = None,
) -> tuple[Head, OutOfFold | None]:
    """Return a head, and what was said of samples out of fold: a stored one, else one fitted here.

    Args:
        seen: the features.
        train: what is labelled; None only where there is a stored one.
        feature: that they are.
        seed: of the folds.
        stored: it.
        file: for one that is fitted here; None: it is not kept.
    """
    if stored:
        return stored.head, stored.held
    assert train is not None
    labels, weights = to_tensors(train, seen)
    head, held = cross_fit(seen.known, labels, len(train.classes), seed, weights)
    if file:
        about = feature, seen.encoder, train.classes, hash_labels(train)
        write_classifier(file, Classifier(head, held, seen.center, *about))
        echo(f"the classifier was fitted, and is kept in {file}")
    return head, held


def to_tensors(train: Labelled, seen: PoolFeatures) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Return labels and weights beside the features; None: all weights are equal."""
    labels, weights = torch.from_numpy(train.labels), train.relative_weights()
    counted = None if weights is None else torch.from_numpy(weights).to(seen.known)
    return labels.to(seen.known.device), counted


def ask_network(
    root: Path, folder: Path, pool: ShardSet, candidates: Ids, device: str
) -> tuple[Beliefs, list[str]]:
    """Return what a fine-tuned network says of candidates, and its classes.

    Args:
        root: the run, which says how images are read.
        folder: what `finetune --save` wrote.
        pool: whose samples the candidates are.
        candidates: their ids.
        device: "auto", "cpu" or "cuda".
    """
    where = get_device(device, 0)
    network, spec, classes = load_saved(folder, where)
    preprocessing = frozen_preprocessing(spec, RunFolder(root).runtime(), where)
    data = ConcatShardSets([pool])
    beliefs = Beliefs.of(
        embed(network, data, "head", preprocessing, ids=ids).double().softmax(dim=1)
        for ids in np.split(candidates, range(CHUNK, len(candidates), CHUNK))
    )
    return beliefs, classes
