"""`fastmoco query`: which samples of a pool to ask labels for."""

import csv
import io
import os
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch

from fastmoco.core.distributed import World, get_device
from fastmoco.core.files import new_folder, write_bytes, write_json
from fastmoco.core.rng import Ids, Permutation, Stream
from fastmoco.dataset.labels import Labelled
from fastmoco.dataset.numbers import read_numbers
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.evaluate.features import Feature, embed, frozen_preprocessing
from fastmoco.label.diversity import coreset, herding
from fastmoco.label.head import Head, fit_head, pool_center, standardize
from fastmoco.label.uncertainty import Beliefs, balance, judge, rank_scores
from fastmoco.load.executor import get_settings
from fastmoco.runs.load_encoder import load_encoder
from fastmoco.runs.run_folder import RunFolder

BY_HEAD = ("least", "margin", "entropy", "intersection")
_FEW_LABELS = 100  # a class; below, covering the pool brings more than uncertainty
_CANDIDATES, _REFERENCE = 65_536, 32_768  # that herding looks at, of a larger pool


@dataclass(frozen=True)
class Options:
    """What is asked of the pool.

    Attributes:
        budget: how many samples.
        strategy: how they are chosen, one of `cli.labels.Strategy`.
        feature: of the backbone or of the head.
        balanced: at most an equal share of each predicted class, for strategies by the head.
        seed: of folds and samples.
        scores: with "scores": a file of one number a sample, the largest first.
        exclude: earlier requests that are still out.
        device: "auto", "cpu" or "cuda".
    """

    budget: int
    strategy: str = "auto"
    feature: Feature = "backbone"
    balanced: bool = True
    seed: int = 0
    scores: Path | None = None
    exclude: tuple[Path, ...] = ()
    device: str = "auto"


@dataclass(frozen=True)
class Request:
    """What to ask for, the most wanted first.

    Attributes:
        pool: the set.
        ids: of the samples.
        strategy: that chose them; never "auto".
        why: that one, in a sentence; empty: it was named.
        candidates: how many there were.
        classes: names of the classes; none: there are no labels yet.
        head: that judged them, None: none did.
        beliefs: of the head on each sample asked for.
        warnings: what the reader should know.
        about: what it depends on: run, step, sets, options.
    """

    pool: ShardSet
    ids: Ids
    strategy: str
    why: str
    candidates: int
    classes: list[str]
    head: Head | None
    beliefs: Beliefs | None
    warnings: list[str] = field(default_factory=list)
    about: dict[str, Any] = field(default_factory=dict)


def query(
    root: Path, pool: Path, options: Options, train: Labelled | None, test: Labelled | None
) -> Request:
    """Choose samples of a pool; labels that it was packed with are never looked at.

    Args:
        root: the run.
        pool: the set.
        options: how many, and how.
        train: what is labelled already; None: nothing is.
        test: whose images must not be asked for.

    Raises:
        UsageError: the budget or the strategy does not fit what there is.
        DataError: nothing is left to ask for, or the scores do not fit the pool.
        CheckpointError: the run has no checkpoint.
    """
    shard_set = ShardSet(pool)
    warnings: list[str] = []
    candidates = find_candidates(shard_set, train, test, options.exclude, warnings)
    if not 0 < options.budget <= len(candidates):
        raise UsageError(
            f"--budget {options.budget}: {pool} has {len(candidates):,} samples to ask for."
        )
    strategy, why = _decide(options, train)
    chosen_by: tuple[Ids, Head | None, Beliefs | None]
    if strategy == "random":
        order = Permutation(len(candidates), options.seed, Stream.QUERY)
        chosen_by = order(np.arange(options.budget)), None, None
    elif strategy == "scores":
        assert options.scores is not None
        scores = read_numbers(options.scores, ConcatShardSets([shard_set]))
        chosen_by = rank_scores(scores[candidates])[: options.budget], None, None
    else:
        chosen_by = _by_features(root, shard_set, candidates, strategy, options, train, warnings)
    places, head, beliefs = chosen_by
    classes = train.classes if train else []
    if train and (missing := sorted(set(range(len(classes))) - set(train.labels.tolist()))):
        warnings.append(f"no label of the class {classes[missing[0]]!r} yet ({len(missing)} such)")
    about = {
        "run": RunFolder(root).name,
        "pool": str(pool),
        "set_id": shard_set.manifest.set_id,
        "budget": options.budget,
        "asked_strategy": options.strategy,
        "feature": options.feature,
        "seed": options.seed,
        "labels": len(train.ids) if train else 0,
    }
    ids = candidates[places]
    return Request(
        shard_set, ids, strategy, why, len(candidates), classes, head, beliefs, warnings, about
    )


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
            known = np.array(labelled.set.samples["hash"])[labelled.ids]
            leave_out(np.isin(hashes, known), why)
    for path in sorted((pool.root / "labels").glob("*.npy")):
        rows = Labelled.of(pool, path.stem)
        leave_out(rows.ids, f"labelled in the table {path.stem!r}")
    for request in exclude:
        asked = np.unique(np.array(read_request(request), np.int64))
        leave_out(asked[(asked >= 0) & (asked < len(pool))], f"asked for in {request}")
    _, firsts = np.unique(hashes, return_index=True)
    again = np.ones(len(pool), dtype=bool)
    again[firsts] = False
    leave_out(again, "their bytes come before in the pool")
    ids = np.flatnonzero(free)
    if not len(ids):
        raise DataError(f"{pool.root} has no sample left to ask for: all are labelled or asked.")
    return ids


def _decide(options: Options, train: Labelled | None) -> tuple[str, str]:
    """Return the strategy, and why that one where it was not named."""
    if (options.strategy == "scores") != (options.scores is not None):
        raise UsageError("--strategy scores and --scores FILE belong together.")
    each = len(train.ids) / len(train.classes) if train else 0
    if options.strategy == "auto":
        if each < _FEW_LABELS:
            return "herding", f"{each:.0f} labels a class are few: covering the pool brings more"
        return "margin", f"{each:.0f} labels a class: uncertain samples bring more"
    if options.strategy in BY_HEAD and not train:
        raise UsageError(
            f"--strategy {options.strategy} needs labels: name them by --train, or begin with "
            "herding or random."
        )
    return options.strategy, ""


def _by_features(
    root: Path,
    pool: ShardSet,
    candidates: Ids,
    strategy: str,
    options: Options,
    train: Labelled | None,
    warnings: list[str],
) -> tuple[Ids, Head | None, Beliefs | None]:
    run, device = RunFolder(root), get_device(options.device, 0)
    encoder, spec, _ = load_encoder(run, device)
    settings = get_settings(run.runtime(), World(), device)
    preprocessing = frozen_preprocessing(spec, run.runtime(), settings)

    def features(shard_set: ShardSet, ids: Ids) -> torch.Tensor:
        data = ConcatShardSets([shard_set])
        return embed(encoder, data, options.feature, preprocessing, ids=ids)

    raw = features(pool, candidates)
    center = pool_center(raw)
    rows = standardize(raw, center)
    if not train:
        return choose(strategy, rows, rows[:0], None, 0, options, warnings)
    known = standardize(features(train.set, train.ids), center)
    labels = torch.from_numpy(train.labels).to(rows.device)
    return choose(strategy, rows, known, labels, len(train.classes), options, warnings)


def choose(
    strategy: str,
    rows: torch.Tensor,
    known: torch.Tensor,
    labels: torch.Tensor | None,
    classes: int,
    options: Options,
    warnings: list[str],
) -> tuple[Ids, Head | None, Beliefs | None]:
    """Choose among samples by their features.

    Args:
        strategy: one that looks at features.
        rows: (n, d) standardized, of the candidates.
        known: (m, d) standardized, of what is labelled.
        labels: (m,) of it; None: a strategy that needs none.
        classes: their number.
        options: the budget and the rest.
        warnings: what the reader should know is added.

    Returns:
        (budget,) places, the head and what it says of them, if the strategy has one.
    """
    if strategy == "coreset":
        return coreset(rows / 4, known / 4, options.budget), None, None
    if strategy == "herding":
        return _herd(rows / 4, known / 4, options, warnings), None, None
    assert labels is not None
    head = fit_head(known, labels, classes, options.seed)
    if (each := len(labels) / classes) < _FEW_LABELS:
        few = f"{each:.0f} labels a class are few for uncertainty: --strategy herding serves better"
        warnings.append(few)
    beliefs = judge(head, rows)
    places = rank_scores(beliefs.scores(strategy))
    if options.balanced:
        places = balance(places, beliefs.predicted, options.budget, classes)
    places = places[: options.budget]
    of_chosen = Beliefs(*(column[places] for column in vars(beliefs).values()))
    return places, head, of_chosen


def _herd(rows: torch.Tensor, known: torch.Tensor, options: Options, warnings: list[str]) -> Ids:
    """Herd over all candidates, or over a sample of so many that it takes minutes."""
    most = max(_CANDIDATES, 4 * options.budget)
    if len(rows) <= most:
        return herding(rows, known, options.budget)
    some = np.sort(Permutation(len(rows), options.seed, Stream.QUERY, 1)(np.arange(most)))
    points = Permutation(len(rows), options.seed, Stream.QUERY, 2)(np.arange(_REFERENCE))
    warnings.append(f"herding looks at {most:,} candidates and {_REFERENCE:,} samples to cover")
    reference = rows[torch.from_numpy(points)]
    return some[herding(rows[torch.from_numpy(some)], known, options.budget, reference)]


def read_request(path: Path) -> list[int]:
    """Return the ids that a request asks for.

    Raises:
        DataError: it is no request.
    """
    try:
        with path.open(newline="") as stream:
            return [int(row["sample"]) for row in csv.DictReader(stream)]
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise DataError(f"{path} is no request of `fastmoco query`: {error}.") from error


def check_absent(out: Path, replace: bool) -> None:
    """Refuse a name that is taken, before the minutes of embedding.

    Raises:
        UsageError: it is, or it does not end in .csv.
    """
    if out.suffix != ".csv":
        raise UsageError(f"--out {out} must end in .csv.")
    for path in (out, *_beside(out)):
        if path.exists() and not replace:
            raise UsageError(f"{path} exists: choose another --out, or pass --replace.")


def _beside(out: Path) -> tuple[Path, Path]:
    return out.with_suffix(".details.csv"), out.with_suffix(".json")


def write_request(request: Request, out: Path) -> None:
    """Write details and description, and last the CSV that people fill in; each is whole."""
    details, description = _beside(out)
    names = [request.pool.get_name(int(sample)) for sample in request.ids]
    header = ["sample", "rank", "predicted", "confidence", "margin", "entropy"]
    rows: list[list[Any]] = []
    for rank, sample in enumerate(request.ids.tolist()):
        said: list[Any] = [""] * 4
        if (b := request.beliefs) is not None:
            numbers = (b.confidence[rank], b.margin[rank], b.entropy[rank])
            said = [request.classes[b.predicted[rank]], *(f"{x:.6f}" for x in numbers)]
        rows.append([sample, rank + 1, *said])
    write_bytes(details, _as_csv(header, rows))
    head = request.head
    classifier = None
    if head:
        classifier = {k: v for k, v in vars(head).items() if k not in ("weight", "bias")}
    write_json(
        description,
        request.about
        | {
            "strategy": request.strategy,
            "candidates": request.candidates,
            "classifier": classifier,
            "warnings": request.warnings,
        },
    )
    wanted = [[i, name, ""] for i, name in zip(request.ids.tolist(), names, strict=True)]
    write_bytes(out, _as_csv(["sample", "name", "label"], wanted))


def _as_csv(header: list[str], rows: list[list[Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.writer(text, lineterminator="\n").writerows([header, *rows])
    return text.getvalue().encode("utf-8", "surrogateescape")


def write_images(request: Request, folder: Path) -> None:
    """Write the stored bytes of the samples into a new folder, named by rank and sample.

    Raises:
        UsageError: the folder exists.
    """
    if os.path.lexists(folder):
        raise UsageError(f"--images {folder} exists: choose another.")
    reader, endings = Reader(ConcatShardSets([request.pool])), {b"\xff\xd8": "jpg", b"\x89P": "png"}
    with new_folder(folder) as aside:
        for rank, sample in enumerate(request.ids.tolist(), 1):
            (image,) = reader.fetch(np.array([sample]))
            ending = endings.get(image[:2].tobytes(), "webp")
            (aside / f"{rank:05d}-{sample}.{ending}").write_bytes(image.tobytes())


def describe(request: Request, out: Path) -> list[str]:
    """Return what a person should read of a request."""
    budget, balanced = len(request.ids), ""
    if request.beliefs is not None:
        counts = np.bincount(request.beliefs.predicted, minlength=len(request.classes))
        balanced = f", {counts.min()} to {counts.max()} of a predicted class"
    lines = [
        f"{out}: {budget:,} of {request.candidates:,} candidates by {request.strategy}{balanced}"
    ]
    if request.why:
        lines.append(f"  {request.strategy}: {request.why}")
    if (head := request.head) and head.accuracy is not None:
        lines.append(
            f"  classifier: {head.samples} labels, {head.accuracy:.1f} % right out of fold, "
            f"C {head.strength:g}, temperature {head.temperature:.2f}, calibration error "
            f"{head.error:.2f}"
        )
    lines += [f"  warning: {warning}" for warning in request.warnings]
    lines.append(f"fill in `label`, then: fastmoco label {request.pool.root} {out} --name asked")
    return lines
