"""Memory of the loader over epochs and against the size of the set, and the cost of resuming.

    python benchmarks/loader_scaling.py

The sets have tables of full size, whose rows point to 256 small images over and over. Each is
loaded by a fresh process: resident memory (anonymous, and mapped from files) after a few batches
and after each of `ROUNDS` rounds of `ROUND` batches, which for the smallest set is an epoch; then
the time to the first batch of a new loader at step 0 and at step 1,000,000, in alternation. One
JSON row a set is printed for benchmarks/results/.
"""

import json
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from fastmoco.config.recipe import View
from fastmoco.core.environment import environment
from fastmoco.core.files import write_json
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.load.executor import Settings
from fastmoco.load.loader import Loader
from fastmoco.load.sampler import Plan
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

SIZES = (12_811, 128_116, 1_281_167)
IMAGES, SIDE, BATCH = 256, 32, 256
ROUND = 12_811 // BATCH  # batches
ROUNDS = 10
LATE = 1_000_000  # step
TRIES = 21
VIEW = View(jitter=(0.4, 0.4, 0.4, 0.1), jitter_p=0.8, grayscale=0.2, blur=0.5)


def main() -> int:
    """Measure each set in a fresh process and print its row."""
    if sys.argv[1:]:
        print(json.dumps(measure(Path(sys.argv[1]))))
        return 0
    print(json.dumps({"kind": "environment", **environment()}))
    with tempfile.TemporaryDirectory() as folder:
        made = _small_set(Path(folder))
        for samples in SIZES:
            root = _grown(made, samples, Path(folder) / str(samples))
            command = [sys.executable, __file__, str(root)]
            ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            print(ran.stdout, end="", flush=True)
    return 0


def _small_set(folder: Path) -> Path:
    (folder / "source").mkdir()
    for number in range(IMAGES):
        coarse = np.random.default_rng(number).integers(0, 256, (6, 6, 3), dtype=np.uint8)
        Image.fromarray(coarse).resize((48, 48)).save(folder / "source" / f"{number}.jpg")
    pack(folder / "source", folder / "small", PackOptions())
    return folder / "small"


def _grown(small: Path, samples: int, root: Path) -> Path:
    """Return a set whose table repeats that of a small one."""
    made = ShardSet(small)
    root.mkdir()
    for shard in made.manifest.shards:
        (root / shard.name).hardlink_to(small / shard.name)
    np.save(root / "samples.npy", np.resize(made.samples, samples))
    manifest = made.manifest.model_copy(update={"samples": samples})
    write_json(root / "manifest.json", manifest.model_dump())
    return root


def measure(root: Path) -> dict[str, Any]:
    """Return the row of a set."""
    data = ConcatShardSets.open([root])
    loader = Loader(
        data,
        Plan(len(data), BATCH, seed=0),
        [VIEW, VIEW],
        size=SIDE,
        mean=(0.5, 0.5, 0.5),
        std=(0.2, 0.2, 0.2),
        settings=Settings(),
    )
    batches = loader.batches()
    memory = [_after(batches, 10)] + [_after(batches, ROUND) for _ in range(ROUNDS)]
    batches.close()
    first = {step: [] for step in (0, LATE)}  # type: dict[int, list[float]]
    for number in range(TRIES):
        for step in (0, LATE) if number % 2 else (LATE, 0):
            first[step].append(_seconds_to_first(loader, step))
    ratios = [late / early for early, late in zip(first[0], first[LATE], strict=True)][1:]
    return {
        "kind": "loader_scaling",
        "samples": len(data),
        "rss_anonymous_mb": [anonymous for anonymous, _ in memory],
        "rss_mapped_mb": [mapped for _, mapped in memory],
        "first_batch_ms": {
            str(step): round(1e3 * statistics.median(found[1:]), 2) for step, found in first.items()
        },
        "late_by_early": [round(q, 3) for q in np.quantile(ratios, (0.25, 0.5, 0.75))],
        "tries": TRIES - 1,
    }


def _after(batches: Any, count: int) -> tuple[float, float]:
    """Return resident MB, anonymous and mapped from files, after some more batches."""
    for _ in islice(batches, count):
        pass
    fields = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    kb = (int(fields[name].split()[0]) for name in ("RssAnon", "RssFile"))
    return tuple(round(one / 1024, 1) for one in kb)  # type: ignore[return-value]


def _seconds_to_first(loader: Loader, step: int) -> float:
    began = time.perf_counter()
    batches = loader.batches(step)
    next(batches)
    found = time.perf_counter() - began
    batches.close()
    return found


if __name__ == "__main__":
    sys.exit(main())
