"""How long does a request take, and how much memory, at the size of half a million images?

    python benchmarks/query_pool.py OUT.jsonl [--images 20000] [--strategy kmeans ...]

A pool of 512,000 x 512 features in 800 Gaussian clusters of unequal size, 32 labels of each, and
2.5 % of the pool asked for (12,800). Each strategy runs in a process of its own, and its row is
appended at once: minutes, and the peak of memory over what the features themselves take.
"""

import json
import multiprocessing
import resource
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer

from fastmoco.core.environment import environment
from fastmoco.core.rng import Ids
from fastmoco.label.choose import Options, choose
from fastmoco.label.estimate import estimate_minutes
from fastmoco.label.head import CHUNK, pool_center, standardize
from fastmoco.label.pool import PoolFeatures

IMAGES, WIDTH, CLUSTERS = 512_000, 512, 800
LABELS = 32  # of each cluster; of fewer images, fewer
STRATEGIES = (
    *("herding", "coreset", "kmeans", "typiclust", "hybrid"),
    *("least", "margin", "entropy", "intersection", "disagreement"),
)
MEMBERS = 5


def draw_clusters(images: int, seed: int) -> Ids:
    """Return the cluster of each image: none is empty, sizes fall as 1 / (1 + place / 50)."""
    share = 1 / (1 + np.arange(CLUSTERS) / 50)
    random = np.random.default_rng(seed)
    drawn = random.choice(CLUSTERS, images - CLUSTERS, p=share / share.sum())
    return random.permutation(np.concatenate([np.arange(CLUSTERS), drawn]))


def make_features(own: Ids, seed: int) -> torch.Tensor:
    """Return (n, WIDTH) fp32 features of images of these clusters."""
    centers = np.random.default_rng(0).standard_normal((CLUSTERS, WIDTH), np.float32)
    random, rows = np.random.default_rng(seed), torch.empty(len(own), WIDTH)
    for start in range(0, len(own), CHUNK):
        part = own[start : start + CHUNK]
        noise = random.standard_normal((len(part), WIDTH), np.float32)
        rows[start : start + len(part)] = torch.from_numpy(centers[part] + noise)
    return rows


def measure(strategy: str, images: int, budget: int, seed: int) -> dict[str, Any]:
    """Return the row of a strategy; typiclust is a first request, as 800 classes are too many."""
    rows = make_features(draw_clusters(images, seed), seed + 1)
    center = pool_center(rows)
    known, labels, classes = rows[:0].double(), None, 0
    if strategy != "typiclust":
        each = np.arange(CLUSTERS).repeat(max(2, round(LABELS * images / IMAGES)))
        known, labels = standardize(make_features(each, seed + 2), center), torch.from_numpy(each)
        classes = CLUSTERS
    for part in torch.split(rows, CHUNK):
        part.copy_(standardize(part, center))
    members = MEMBERS if strategy == "disagreement" else 0
    options, warnings = Options(budget, strategy, seed=seed, members=members), list[str]()
    before, start = get_peak(), time.perf_counter()
    chosen = choose([PoolFeatures(rows, known, 1)], labels, classes, options, warnings)
    minutes = (time.perf_counter() - start) / 60
    assert len(set(chosen.places.tolist())) == budget
    threads, heads = torch.get_num_threads(), int(options.judges)
    counts = (strategy, images, WIDTH, budget, len(known), classes, threads, heads, members)
    return {
        **{"strategy": strategy, "images": images, "budget": budget, "labels": len(known)},
        **{"minutes": round(minutes, 2), "estimate": round(estimate_minutes(*counts), 2)},
        "features_gb": round(rows.nbytes / 1e9, 2),
        "peak_gb_over_features": round((get_peak() - rows.nbytes) / 1e9, 2),
        "peak_gb_before": round(before / 1e9, 2),
        **{"threads": threads, "warnings": warnings},
    }


def get_peak() -> int:
    """Return the most bytes that this process has held so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def work(arguments: tuple[str, int, int, int], out: Path) -> None:
    """Measure in a process of its own: the peak of one strategy is no other's."""
    with out.open("a") as stream:
        stream.write(json.dumps(measure(*arguments)) + "\n")


def main(
    out: Annotated[Path, typer.Argument(help="A .jsonl that rows are appended to.")],
    images: Annotated[int, typer.Option(min=2 * CLUSTERS)] = IMAGES,
    strategy: Annotated[list[str] | None, typer.Option(help="One; repeatable.")] = None,
    seed: int = 0,
) -> None:
    """Write one row of the machine, then one for each strategy."""
    with out.open("a") as stream:
        stream.write(json.dumps({"kind": "environment", **environment()}) + "\n")
    for name in strategy or STRATEGIES:
        arguments = (name, images, images // 40, seed)
        process = multiprocessing.get_context("spawn").Process(target=work, args=(arguments, out))
        process.start()
        process.join()
        if process.exitcode:
            sys.exit(f"{name} ended with {process.exitcode}")
        print(out.read_text().splitlines()[-1], flush=True)


if __name__ == "__main__":
    typer.run(main)
