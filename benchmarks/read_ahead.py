"""What reading ahead is worth, from a cold page cache and from storage that answers late.

    python benchmarks/read_ahead.py SET [--latency-ms 1] [--step-ms 64]

The batches of a run are read but not drawn, with read-ahead and without in turn: from a warm page
cache, from one that has forgotten the shards, and from a warm one where each read takes
`--latency-ms` longer. Each is measured twice a round: taken as fast as they come, and by steps of
`--step-ms`, in which this process sleeps as it would wait for a GPU (256 images in 64 ms are 4,000
a second). JSON rows are printed for benchmarks/results/: the medians of images a second, of the CPU
milliseconds that a batch takes, and of the milliseconds that a step waits for its batch.
"""

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import count, islice
from pathlib import Path
from unittest import mock

from comparisons.loader import recipe_of

from fastmoco.core.environment import environment
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets
from fastmoco.load import loader
from fastmoco.load.executor import DecodedBatch, EncodedBatch, PipelineSpec, Settings, Source
from fastmoco.load.loader import Loader

FROM = ("warm", "cold", "late")
FIRST = 2  # batches that are not measured: there, nothing was read ahead yet


def main() -> int:
    """Measure, print the rows, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("set", type=Path)
    parser.add_argument("--batch", type=int, default=256)
    parser.add_argument("--batches", type=int, default=16, help="that are measured at a time")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--latency-ms", type=float, default=1.0)
    parser.add_argument("--step-ms", type=float, default=64.0)
    options = parser.parse_args()
    print(json.dumps({"kind": "environment", **environment()}))
    for row in measure(options):
        print(json.dumps(row), flush=True)
    return 0


def measure(options: argparse.Namespace) -> Iterator[dict[str, object]]:
    """Yield a row for each kind of storage and way of reading."""
    data = ConcatShardSets.open([options.set])
    ways: dict[str, Callable[..., object]] = {
        "read ahead": loader._read_ahead,
        "read when asked for": as_asked_for,
    }
    found: dict[tuple[str, str], list[tuple[float, float, float]]] = {
        (storage, way): [] for storage in FROM for way in ways
    }
    starts = count(step=options.batches + FIRST)  # other images each time
    for number in range(options.rounds):
        for storage in FROM:
            for way in list(ways)[:: -1 if number % 2 else 1]:
                with mock.patch.object(loader, "_read_ahead", ways[way]):
                    found[storage, way].append(once(data, storage, starts, options))
    for (storage, way), times in found.items():
        rate, cpu_ms, wait_ms = (statistics.median(column) for column in zip(*times, strict=True))
        yield {
            "kind": "read_ahead",
            "set": options.set.name,
            "batch": options.batch,
            "batches": options.batches,
            "rounds": options.rounds,
            "storage": storage,
            "latency_ms": options.latency_ms if storage == "late" else 0,
            "step_ms": options.step_ms,
            "way": way,
            "images_per_s": round(rate),
            "cpu_ms": round(cpu_ms, 2),
            "wait_ms": round(wait_ms, 2),
        }


def once(
    data: ConcatShardSets, storage: str, starts: Iterator[int], options: argparse.Namespace
) -> tuple[float, float, float]:
    """Return images a second, CPU milliseconds a batch, and milliseconds that a step waits."""
    images = options.batch * options.batches
    read = Reader._read

    def late(*place: object) -> object:
        time.sleep(options.latency_ms / 1e3)
        return read(*place)

    with mock.patch.object(Reader, "_read", late if storage == "late" else read):
        seconds, cpu_s = taken(data, storage, next(starts), 0.0, options)
        waited, _ = taken(data, storage, next(starts), options.step_ms / 1e3, options)
    return images / seconds, 1e3 * cpu_s / options.batches, 1e3 * waited / options.batches


def taken(
    data: ConcatShardSets, storage: str, start: int, step_s: float, options: argparse.Namespace
) -> tuple[float, float]:
    """Return wall and CPU seconds that batches keep those waiting who take one each step."""
    forget(data, warm=storage != "cold")
    with mock.patch.object(loader, "_executor", lambda name: undrawn):
        recipe = recipe_of(32, options.batch)
        batches = Loader.of(recipe, data, Settings()).batches(start)
        for _ in islice(batches, FIRST):
            pass
        waited, cpu = 0.0, time.process_time()
        for _ in range(options.batches):
            time.sleep(step_s)
            began = time.perf_counter()
            next(batches)
            waited += time.perf_counter() - began
        cpu = time.process_time() - cpu
        batches.close()
    return waited, cpu


def undrawn(
    source: Source, look: PipelineSpec, batch: int, settings: Settings
) -> Iterator[DecodedBatch]:
    """Do nothing with the images but look at every byte, as a decoder would."""
    for number in count():
        work = source(number)
        assert work
        sum(int(image.sum()) for image in work.images)
        yield DecodedBatch(work, ())


@contextmanager
def as_asked_for(work: Callable[[int, None], EncodedBatch | None]) -> Iterator[Source]:
    """Read one image after the other when a batch is asked for."""
    yield lambda number: work(number, None)


def forget(data: ConcatShardSets, warm: bool) -> None:
    """Make the page cache forget the shards, then read them if it shall be warm."""
    for shard_set in data.sets:
        for shard in shard_set.manifest.shards:
            path = shard_set.root / shard.name
            descriptor = os.open(path, os.O_RDONLY)
            os.fsync(descriptor)  # a page that is not on the disk yet stays
            os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
            os.close(descriptor)
            if warm:
                path.read_bytes()


if __name__ == "__main__":
    raise SystemExit(main())
