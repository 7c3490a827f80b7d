"""kNN against the plain loop of the published notebook: the same votes, how much sooner?

    python benchmarks/knn.py [--pairs 6] [--record FILE] [--features FILE.pt]

A bank of 50,000 and 10,000 queries of 128 numbers, k 200, t 0.1: the monitor of the CIFAR-10 run.
The features are clusters that overlap, or of FILE.pt: {"train": (features, labels), "test": ...}.
"""

import argparse
import os
import sys
from pathlib import Path
from typing import Any

import torch
from harness.arm import Section
from harness.compare import Arm, compare
from harness.record import Record
from harness.table import show
from rich.console import Console
from torch.nn.functional import normalize

from fastmoco.evaluate.knn import KNNClassifier

K, T = 200, 0.1
BATCH = 512  # queries at a time, as in the notebook
Pair = tuple[torch.Tensor, torch.Tensor]


def main() -> int:
    """Measure in pairs, print the table."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--pairs", type=int, default=6)
    parser.add_argument("--rounds", type=int, default=4, help="passes over the queries")
    parser.add_argument("--bank", type=int, default=50_000)
    parser.add_argument("--queries", type=int, default=10_000)
    parser.add_argument("--features", type=Path)
    parser.add_argument("--record", type=Path)
    options = parser.parse_args()
    subject = {"bank": options.bank, "queries": options.queries, "rounds": options.rounds}
    features = str(options.features.resolve()) if options.features else None
    # The arms import this file as a module.
    paths = (str(Path(__file__).resolve().parent), os.environ.get("PYTHONPATH", ""))
    os.environ["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    arms = {name: Arm.of(f"knn:{name}", features=features, **subject) for name in ("ours", "plain")}
    record = Record(options.record, "knn")
    report = compare(
        arms,
        options.pairs,
        on_row=record.measurement,
        tolerance=0.0,
        subject={**subject, "dim": 128, "k": K, "t": T, "features": bool(features)},
    )
    record.report(report)
    show(report, Console())
    report.require_result()
    return 0


def ours(section: Section, **options: Any) -> dict[str, Any]:
    """Classify with `KNNClassifier`, its preparation included."""
    return _measured(section, _ours, options)


def plain(section: Section, **options: Any) -> dict[str, Any]:
    """Classify as the notebook does."""
    return _measured(section, _plain, options)


def _measured(section: Section, classify: Any, options: dict[str, Any]) -> dict[str, Any]:
    bank, queries = _features(options["features"], options["bank"], options["queries"])
    classify(*bank, queries[0][:BATCH])  # warm-up
    with section:
        for _ in range(options["rounds"]):
            found = classify(*bank, queries[0])
    right = int((found == queries[1]).sum())
    check = {"right": right, "predicted": int((found * torch.arange(len(found))).sum())}
    return {"images": options["rounds"] * len(found), "check": check}


def _ours(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    neighbors = KNNClassifier(bank, labels, int(labels.max()) + 1, K, T)
    return torch.cat([votes.argmax(dim=1) for votes in neighbors.scores(queries)])


def _plain(bank: torch.Tensor, labels: torch.Tensor, queries: torch.Tensor) -> torch.Tensor:
    classes = int(labels.max()) + 1
    columns = normalize(bank, dim=1).T.contiguous()
    found = []
    for chunk in torch.split(normalize(queries, dim=1), BATCH):
        similarity, index = torch.mm(chunk, columns).topk(k=K, dim=1)
        own = torch.gather(labels.expand(len(chunk), -1), 1, index)
        weights = (similarity / T).exp()
        one_hot = torch.zeros(len(chunk) * K, classes).scatter(1, own.view(-1, 1), 1.0)
        votes = (one_hot.view(len(chunk), K, classes) * weights[:, :, None]).sum(dim=1)
        found.append(votes.argsort(dim=1, descending=True)[:, 0])
    return torch.cat(found)


def _features(path: str | None, bank: int, queries: int) -> tuple[Pair, Pair]:
    if path:
        stored = torch.load(path, weights_only=True)
        train, test = stored["train"], stored["test"]
        return (train[0][:bank], train[1][:bank]), (test[0][:queries], test[1][:queries])
    random = torch.Generator().manual_seed(0)
    centers = torch.randn(10, 128, generator=random)

    def clusters(count: int) -> Pair:
        labels = torch.randint(10, (count,), generator=random)
        return centers[labels] + 1.5 * torch.randn(count, 128, generator=random), labels

    return clusters(bank), clusters(queries)


if __name__ == "__main__":
    sys.exit(main())
