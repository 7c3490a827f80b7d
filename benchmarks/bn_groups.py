"""What a training step gains when BatchNorm's groups go into slices of one output.

    python benchmarks/bn_groups.py [--groups 8 32 64] [key=value ...]

For each `bn_group`: two engines take the same step in turn, one as it is, one whose BatchNorm
splits the batch, normalizes the parts and concatenates them. JSON rows for benchmarks/results/: the
median milliseconds of both, and their ratio within a pair (above 1: slices are faster) with its
95 % interval. Overrides change the recipe below.
"""

import argparse
import json
import time
from statistics import median

import torch
import torch.nn.functional as F
from harness.bootstrap import interval_of

from fastmoco.check.throughput import synthetic
from fastmoco.config.loading import load_recipe
from fastmoco.core.distributed import World
from fastmoco.core.environment import environment
from fastmoco.models.encoder import GroupBatchNorm2d
from fastmoco.train.engine import Engine

RECIPE = [
    "encoder.arch=resnet18",
    "encoder.image_size=64",
    "batch=128",
    "objective.queue=4096",
    "runtime.device=cpu",
]


def main() -> int:
    """Measure, print the rows, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*")
    parser.add_argument("--groups", type=int, nargs="+", default=[8, 32, 64])
    parser.add_argument("--pairs", type=int, default=20)
    options = parser.parse_args()
    print(json.dumps({"kind": "environment", **environment()}))
    for group in options.groups:
        overrides = [*RECIPE, *options.overrides, f"objective.bn_group={group}"]
        print(json.dumps(measure(overrides, options.pairs) | {"bn_group": group}), flush=True)
    return 0


def measure(overrides: list[str], pairs: int) -> dict[str, object]:
    """Return the row of one group size."""
    recipe = load_recipe("moco_v2_imagenet_r50", overrides)
    engines = {way: Engine(recipe, World(), torch.device("cpu")) for way in ("slices", "split")}
    for module in (*engines["split"].encoder_q.modules(), *engines["split"].encoder_k.modules()):
        if isinstance(module, GroupBatchNorm2d):
            module.__class__ = SplitBatchNorm2d
    ((q, k),) = synthetic(recipe.batch, recipe.encoder.image_size, 1)
    views = [view.contiguous(memory_format=torch.channels_last) for view in (q, k)]
    times: dict[str, list[float]] = {way: [] for way in engines}
    for step in range(pairs + 2):
        for way in sorted(engines, reverse=step % 2 == 1):
            began = time.perf_counter()
            engines[way].step(*views, step)
            if step >= 2:  # the first ones warm up
                times[way].append(1e3 * (time.perf_counter() - began))
    ratio = interval_of([b / a for a, b in zip(times["slices"], times["split"], strict=True)])
    return {
        "kind": "bn_groups",
        "overrides": overrides,
        **{f"{way}_ms": round(median(found), 1) for way, found in times.items()},
        "ratio": [round(x, 3) for x in (ratio.median, ratio.low, ratio.high)],
    }


class SplitBatchNorm2d(GroupBatchNorm2d):
    """The same result by splitting and concatenating."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """Normalize (n, C, H, W)."""
        parts = torch.split(input, self.group)
        means = self.running_mean.repeat(len(parts), 1)
        variances = self.running_var.repeat(len(parts), 1)
        affine = self.weight, self.bias, True, self.momentum, self.eps
        rows = zip(parts, means, variances, strict=True)
        normalized = [F.batch_norm(*row, *affine) for row in rows]
        torch.mean(means, dim=0, out=self.running_mean)
        torch.mean(variances, dim=0, out=self.running_var)
        return torch.cat(normalized)


if __name__ == "__main__":
    raise SystemExit(main())
