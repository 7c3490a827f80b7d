"""kNN of as many features as ImageNet has, on the device."""

import time

import torch
from torch.nn.functional import normalize

from fastmoco.evaluate.knn import KNNClassifier
from gpu_phases.measure import forget, wait
from gpu_phases.task import Figures, Item, Items, Task

K, T = 200, 0.1
CHECKED = 256  # queries that are answered plainly too
NOISE = 3.0  # about the centers of the clusters: most of them overlap


def items(task: Task) -> Items:
    """Return the head's width, then the backbone's."""
    widths = (16,) if task.dry else (128, 2048)
    return {
        f"knn/{width} features": Item(lambda width=width: look_up(task, width)) for width in widths
    }


def look_up(task: Task, width: int) -> Figures:
    """Classify 50k queries by a bank of 1.28M."""
    forget()
    device = torch.device(task.device)
    queries, bank, classes = (500, 2000, 10) if task.dry else (50_000, 1_281_167, 1000)
    generator = torch.Generator(device).manual_seed(0)
    centers = torch.randn(classes, width, device=device, generator=generator)

    def cluster(count: int) -> tuple[torch.Tensor, torch.Tensor]:
        labels = torch.randint(classes, (count,), device=device, generator=generator)
        noise = torch.randn(count, width, device=device, generator=generator)
        return noise.mul_(NOISE).add_(centers[labels]), labels

    features, labels = cluster(bank)
    asked, answers = cluster(queries)
    neighbors = KNNClassifier(features, labels, classes, K, T)
    wait(device)
    began = time.perf_counter()
    found = neighbors.predict(asked, answers)
    wait(device)
    seconds = time.perf_counter() - began
    plain = _plainly(features, labels, classes, asked[:CHECKED])
    same = found.predicted[:CHECKED].to(device) == plain
    return {
        "queries": queries,
        "bank": bank,
        "seconds": seconds,
        "accuracy": found.top(1),
        "agreement": 100 * float(same.float().mean()),
    }


def _plainly(
    bank: torch.Tensor, labels: torch.Tensor, classes: int, queries: torch.Tensor
) -> torch.Tensor:
    """Return the (M,) answers by Wu et al. 2018, section 3.4, written down plainly."""
    similarity = normalize(queries, dim=1) @ normalize(bank, dim=1).T
    best, rows = similarity.topk(min(K, len(bank)), dim=1)
    votes = torch.zeros(len(queries), classes, device=bank.device)
    return votes.scatter_add_(1, labels[rows], (best / T).exp()).argmax(dim=1)
