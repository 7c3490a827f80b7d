"""Time and memory of opening a set, by its number of samples and of shards.

    python benchmarks/opening.py [FOLDER]

The sets are synthetic: files of full size that take no room on the disk (FOLDER, by default a
temporary one, must be able to hold such). Each is opened by a fresh process, once to warm the page
cache and then `ROUNDS` times; `use` is the first look at one row and its name. One JSON row a set
is printed for benchmarks/results/.
"""

import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.dataset.manifest import FORMAT_VERSION
from fastmoco.dataset.shard_set import SAMPLE_DTYPE

ROUNDS = 9
SETS = [  # samples, shards
    (50_000, 1),
    (1_281_167, 1_100),  # ImageNet in shards of 128 MB
    (100_000_000, 1_100),
    (100_000_000, 11_000),  # as many ImageNet-sized images in shards of 1 GB
    (100_000_000, 86_000),  # and of 128 MB
]
NAME_BYTES = 24
OPEN = """
import json, resource, sys, time
from pathlib import Path
from fastmoco.dataset.shard_set import ShardSet
def resident():
    with open("/proc/self/status") as lines:
        return next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
before, began = resident(), time.perf_counter()
opened = ShardSet(Path(sys.argv[1]))
middle, between = time.perf_counter(), resident()
row = len(opened) // 2
opened.describe(row)
found = {"open_ms": 1e3 * (middle - began), "use_ms": 1e3 * (time.perf_counter() - middle)}
found |= {"open_kb": between - before, "use_kb": resident() - between, "process_kb": resident()}
print(json.dumps(found))
"""


def main() -> int:
    """Measure each set and print its row."""
    with tempfile.TemporaryDirectory(dir=sys.argv[1] if sys.argv[1:] else None) as folder:
        for number, (samples, shards) in enumerate(SETS):
            root = Path(folder) / str(number)
            make(root, samples, shards)
            print(json.dumps(measure(root, samples, shards)), flush=True)
    return 0


def make(root: Path, samples: int, shards: int) -> None:
    """Write a set whose tables are full-sized and empty."""
    root.mkdir()
    each = [len(part) for part in np.array_split(np.zeros(samples, dtype=np.uint8), shards)]
    entries = [
        {"name": f"shard-{i:06d}.tar", "samples": n, "bytes": 10240, "sha256": f"{i:064x}"}
        for i, n in enumerate(each)
    ]
    for entry in entries:
        hollow(root / str(entry["name"]), b"", 10240)
    table(root / "samples.npy", SAMPLE_DTYPE, samples)
    table(root / "names.idx.npy", np.dtype("<u8"), samples + 1)
    hollow(root / "names.txt", b"", NAME_BYTES * samples)
    manifest: dict[str, Any] = {"format_version": FORMAT_VERSION, "set_id": "0" * 64}
    manifest |= {"samples": samples, "rejected": 0, "progressive": 0, "shards": entries}
    manifest |= {"classes": [], "class_counts": [], "mean": [0.5] * 3, "std": [0.2] * 3}
    text = json.dumps(manifest | {"options": {}}, indent=2, sort_keys=True)
    (root / "manifest.json").write_text(text)


def table(path: Path, dtype: np.dtype[Any], rows: int) -> None:
    """Write a `.npy` of zeros that takes no room."""
    with path.open("wb") as stream:
        header = {"descr": np.lib.format.dtype_to_descr(dtype), "fortran_order": False}
        np.lib.format.write_array_header_1_0(stream, {**header, "shape": (rows,)})
        start = stream.tell()
    os.truncate(path, start + rows * dtype.itemsize)


def hollow(path: Path, start: bytes, size: int) -> None:
    """Write a file of a size that takes no room."""
    path.write_bytes(start)
    os.truncate(path, size)


def measure(root: Path, samples: int, shards: int) -> dict[str, Any]:
    """Return the row of a set: medians over fresh processes."""
    rounds = [once(root) for _ in range(ROUNDS + 1)][1:]
    medians = {key: round(statistics.median(r[key] for r in rounds), 2) for key in rounds[0]}
    machine = {"python": platform.python_version(), "numpy": np.__version__}
    machine |= {"machine": platform.processor(), "cores": os.cpu_count()}
    return {"samples": samples, "shards": shards, **medians, "rounds": ROUNDS, **machine}


def once(root: Path) -> dict[str, float]:
    """Open a set in a fresh process."""
    command = [sys.executable, "-c", OPEN, str(root)]
    ran = subprocess.run(command, capture_output=True, text=True, check=True)
    found: dict[str, float] = json.loads(ran.stdout)
    return found


if __name__ == "__main__":
    sys.exit(main())
