"""Peak memory of packing, its workers included, against the size of the set.

    python benchmarks/pack_memory.py [IMAGES ...]

By default sets of 10,000, 50,000 and 200,000 tiny images, each packed in a fresh process on all
cores. The images are hard links of a few files, in a scratch folder of the working folder. One JSON
row a size is printed for benchmarks/results/; `harness.resource_monitor` measures the peak.
"""

import json
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from harness.compare import Arm, measure, require_tools
from PIL import Image

from fastmoco.errors import FastmocoError, UsageError

SIZES = (10_000, 50_000, 200_000)
CLASSES = 10
FILES = 64  # different images; a file system bounds the links to one file
SIDE = 16  # pixels


def main() -> int:
    """Measure each size, print its row, return the exit code."""
    try:
        require_tools()
        from fastmoco.core.environment import environment

        print(json.dumps({"kind": "environment", **environment()}))
        for images in _sizes(sys.argv[1:]):
            print(json.dumps(_row(images)), flush=True)
    except FastmocoError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.exit_code
    return 0


def _sizes(arguments: Sequence[str]) -> Sequence[int]:
    try:
        return [int(argument) for argument in arguments] or SIZES
    except ValueError:
        raise UsageError("The sizes are numbers of images, such as 10000 50000.") from None


def _row(images: int) -> dict[str, object]:
    with tempfile.TemporaryDirectory(prefix=".pack-memory-", dir=Path.cwd()) as folder:
        scratch = Path(folder)
        options = {"source": str(_source(scratch, images)), "scratch": folder}
        arm = Arm.of("comparisons.pack:ours", **options, short_side=None, quality=90)
        found = measure("fastmoco", arm)
    return {
        "kind": "pack_memory",
        "images": found.images,
        "peak_mb": round(found.peak_bytes / 1e6, 1),
        "memory_samples": found.memory_samples,
        "seconds": round(found.seconds, 2),
        "stored_mb": round(found.details["stored_bytes"] / 1e6, 1),
    }


def _source(scratch: Path, images: int) -> Path:
    """Make a class folder of that many links to a few images."""
    files = [_image(scratch / f"{number}.jpg", number) for number in range(min(FILES, images))]
    root = scratch / "source"
    for label in range(CLASSES):
        (root / str(label)).mkdir(parents=True)
    for number in range(images):
        to = root / str(number % CLASSES) / f"{number:06d}.jpg"
        to.hardlink_to(files[number % len(files)])
    return root


def _image(path: Path, seed: int) -> Path:
    pixels = np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return path


if __name__ == "__main__":
    sys.exit(main())
