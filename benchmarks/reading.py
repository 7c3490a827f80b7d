"""Ways of reading the images of a batch from shards: pread, pread by threads, memory map.

    python benchmarks/reading.py SET [SET ...]

Batches of 256 in the order of a run, from a warm page cache, each way once a round, in another
order each round; every byte is looked at, as a decoder would. One JSON row a set is printed for
benchmarks/results/: the median milliseconds a batch, and the same of decoding and drawing it.
"""

import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path

import numpy as np
import numpy.typing as npt
from comparisons.loader import recipe_of

from fastmoco.core.environment import environment
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan

BATCH, ROUNDS, WARM_UP = 256, 40, 4

Images = Sequence[npt.NDArray[np.uint8]]


def main() -> int:
    """Measure each set and print its row."""
    print(json.dumps({"kind": "environment", **environment()}))
    for root in map(Path, sys.argv[1:]):
        print(json.dumps({"kind": "reading", "set": root.name, **measure(root)}), flush=True)
    return 0


def measure(root: Path) -> dict[str, float]:
    """Return the row of a set."""
    data = ConcatShardSets.open([root])
    plan = Plan(len(data), BATCH, seed=0)
    reader, pool = Reader(data), ThreadPoolExecutor(2)

    def by_threads(ids: npt.NDArray[np.int64]) -> Images:
        return [x for part in pool.map(reader.fetch, np.array_split(ids, 2)) for x in part]

    ways: dict[str, Callable[[npt.NDArray[np.int64]], Images]] = {
        "pread": reader.fetch,
        "pread by 2 threads": by_threads,
        "mmap": _Mapped(data).fetch,
    }
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for step in range(WARM_UP + ROUNDS):
        ids = plan.order(plan.positions(step))
        for name in list(ways) if step % 2 else list(ways)[::-1]:
            began = time.perf_counter()
            images = ways[name](ids)
            sum(int(image.sum()) for image in images)
            seconds[name].append(time.perf_counter() - began)
    medians = {
        f"{name}, ms": round(1e3 * statistics.median(found[WARM_UP:]), 3)
        for name, found in seconds.items()
    }
    return {**medians, "whole batch, ms": round(1e3 * _drawing(data), 3)}


class _Mapped:
    """What `Reader` would be on memory maps."""

    def __init__(self, data: ConcatShardSets) -> None:
        (owner,) = data.sets
        paths = [owner.root / shard.name for shard in owner.manifest.shards]
        self.data = data
        self._maps = [np.asarray(np.memmap(path, np.uint8, "r")) for path in paths]

    def fetch(self, ids: npt.NDArray[np.int64]) -> Images:
        """Return views into the maps."""
        rows = self.data.rows(ids)
        places = zip(*(rows[name].tolist() for name in ("shard", "offset", "size")), strict=True)
        return [self._maps[shard][offset : offset + size] for shard, offset, size in places]


def _drawing(data: ConcatShardSets) -> float:
    """Return the median seconds that a batch of two views takes, reading included."""
    size = 32 if data.rows(np.arange(1))["height"][0] < 64 else 224
    recipe = recipe_of(size, BATCH)
    batches = Loader.of(recipe, data, Settings()).batches()
    found = []
    for _ in islice(batches, WARM_UP):
        pass
    for _ in range(8):
        began = time.perf_counter()
        next(batches)
        found.append(time.perf_counter() - began)
    return statistics.median(found)


if __name__ == "__main__":
    sys.exit(main())
