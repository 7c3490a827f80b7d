"""Do the strategies of `fastmoco query` beat chance? Accuracy after each request, beside `random`.

    python benchmarks/label_curves.py RUN [--start 4 --ask 152 --rounds 3 --seeds 5]

RUN has a monitor: its bank is pool and truth at once, its queries are the test set. Each seed
begins with the same few labels a class for all strategies, asks as often as told, learns the truth,
and fits a linear head (C 3, no temperature) on what is labelled. PoolFeatures are computed once.
"""

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fastmoco.core.environment import environment
from fastmoco.core.rng import Ids, Permutation, Stream, stratified
from fastmoco.evaluate.evaluator import Evaluation
from fastmoco.label.choose import Options, choose
from fastmoco.label.head import fit_linear, pool_center, standardize
from fastmoco.label.pool import PoolFeatures

STRATEGIES = (
    *("random", "herding", "typiclust", "kmeans", "coreset"),
    *("hybrid", "margin", "least", "entropy", "intersection", "disagreement"),
)
MEMBERS = 5
STRENGTH = 3.0


def ask_for(
    strategy: str, rows: torch.Tensor, labels: torch.Tensor, known: Ids, count: int, seed: int
) -> Ids:
    """Return places to ask for among those that are not known."""
    free = np.setdiff1d(np.arange(len(rows)), known)
    if strategy == "random":
        return free[Permutation(len(free), seed, Stream.QUERY)(np.arange(count))]
    places = torch.from_numpy(known)
    features = PoolFeatures(rows[torch.from_numpy(free)], rows[places], step=0)
    options, classes = Options(count, strategy, seed=seed), int(labels.max()) + 1
    if strategy == "disagreement":
        options = replace(options, members=MEMBERS)
    return free[choose([features], labels[places], classes, options, []).places]


def curve(
    strategy: str,
    train: tuple[torch.Tensor, torch.Tensor],
    test: tuple[torch.Tensor, torch.Tensor],
    known: Ids,
    ask: int,
    rounds: int,
    seed: int,
) -> Iterator[tuple[int, float]]:
    """Yield labels and test accuracy, percent, before and after each request."""
    (rows, labels), classes = train, int(train[1].max()) + 1
    for number in range(rounds + 1):
        places = torch.from_numpy(known)
        weight, bias = fit_linear(rows[places], labels[places], classes, STRENGTH)
        right = (test[0] @ weight.T + bias).argmax(dim=1) == test[1]
        yield len(known), 100 * float(right.double().mean())
        if number < rounds:
            new = ask_for(strategy, rows, labels, known, ask, 1000 * seed + number)
            known = np.sort(np.concatenate([known, new]))


def main(
    run: Path,
    start: Annotated[int, typer.Option(help="Labels a class to begin with.")] = 4,
    ask: Annotated[int, typer.Option(help="Labels a request.")] = 152,
    rounds: int = 3,
    seeds: int = 5,
    out: Annotated[Path | None, typer.Option(help="A .jsonl for the rows.")] = None,
) -> None:
    """Print a row for each strategy and seed, then the differences to random."""
    opened = Evaluation.open(run, device="cpu")
    (features, labels), (asked, truth) = (
        opened.features(one, "backbone") for one in (opened.train, opened.test)
    )
    center = pool_center(features)
    train = standardize(features, center), labels
    test = standardize(asked, center), truth
    found: dict[str, list[list[float]]] = {name: [] for name in STRATEGIES}
    rows: list[dict[str, Any]] = [{"kind": "environment", **environment()}]
    for seed in range(seeds):
        fraction = start * len(opened.train.classes) / len(labels)
        known = stratified(labels.numpy().astype(np.int32), fraction, seed)
        for name in STRATEGIES:
            points = list(curve(name, train, test, known, ask, rounds, seed))
            found[name].append([accuracy for _, accuracy in points])
            counts = [count for count, _ in points]
            rows.append({"strategy": name, "seed": seed, "labels": counts, "top1": found[name][-1]})
            print(
                name, seed, " ".join(f"{count}: {top1:.2f}" for count, top1 in points), flush=True
            )
    for name in STRATEGIES:
        gaps = np.array(found[name]) - np.array(found["random"])
        spread = gaps.std(axis=0, ddof=1)
        words = "  ".join(
            f"{g:+.2f} +- {s:.2f}" for g, s in zip(gaps.mean(axis=0), spread, strict=True)
        )
        print(f"{name:13} against random: {words}")
    if out:
        with out.open("a") as stream:
            stream.writelines(json.dumps(row) + "\n" for row in rows)


if __name__ == "__main__":
    typer.run(main)
