"""What shuffling BN and a slow key encoder are for, in the spirit of MoCo's Figure A.1 and table 4.

    python benchmarks/ablation.py OUT [--seeds 0 1 2] [--jobs 2] [key=value ...]

The demo's recipe on the demo's patches, three ways: as it is; with one BatchNorm group for the
whole batch and no shuffling, so that query and key betray each other; and with m = 0, so that the
key encoder is the query encoder. Leaves rows.jsonl and ablation.png in OUT; runs that are done are
not run again.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from fastmoco.demo.demo import PHOTOGRAPHS, make_set
from fastmoco.plots import INK, make_figure
from fastmoco.runs.run_folder import RunFolder

ARMS = {
    "shuffling BN": [],
    "one BN group, no shuffle": ["objective.bn=whole", "objective.shuffle=off"],
    "m = 0": ["objective.momentum=0"],
}
COLOURS = ["#1f5fa8", "#b5452c", "#6b7a2a"]
PATCHES = {"train": 200, "test": 50}


def main() -> int:
    """Run every arm with every seed, write the rows, draw them, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    options, overrides = parser.parse_known_args()
    options.out.mkdir(parents=True, exist_ok=True)
    for split, count in PATCHES.items():
        make_set(options.out, split, count, PHOTOGRAPHS)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [(arm, seed) for seed in options.seeds for arm in ARMS]
        list(pool.map(lambda run: train(options.out, *run, overrides), runs))
    rows = list(get_rows(options.out, options.seeds))
    (options.out / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    draw(options.out / "ablation.png", rows)
    return 0


def get_folder(out: Path, arm: str, seed: int) -> Path:
    """Return the run folder of an arm and a seed."""
    name = "".join(c if c.isalnum() else "-" for c in arm)
    return out / f"{name}-{seed}"


def train(out: Path, arm: str, seed: int, overrides: Sequence[str]) -> None:
    """Train one run in a process of its own, on one core; a finished one ends at once."""
    sets = [
        f"data.sets=['{out}/train']",
        f"monitor.bank={out}/train",
        f"monitor.queries={out}/test",
    ]
    options = [
        f"out={get_folder(out, arm, seed)}",
        f"seed={seed}",
        "monitor.every=1",
        "runtime.threads=1",
    ]
    command = [
        sys.executable,
        "-m",
        "fastmoco.pretrain",
        "demo",
        *sets,
        *options,
        "runtime.log_every=5",
    ]
    quiet = {"stdout": subprocess.DEVNULL, "env": os.environ | {"OMP_NUM_THREADS": "1"}}
    subprocess.run([*command, *ARMS[arm], *overrides], check=True, **quiet)


def get_rows(out: Path, seeds: Sequence[int]) -> Iterator[dict[str, Any]]:
    """Yield a row for each run: what its metrics say over its epochs."""
    for arm in ARMS:
        for seed in seeds:
            run = RunFolder(get_folder(out, arm, seed))
            metrics = run.rows()
            steps = [row for row in metrics if row["kind"] == "step"]
            knn = [row for row in metrics if "knn_top1" in row]
            yield {
                "arm": arm,
                "seed": seed,
                "overrides": ARMS[arm],
                "epoch": [row["epoch"] for row in steps],
                "pretext_top1": [100 * row["pretext_top1"] for row in steps],
                "loss": [row["loss"] for row in steps],
                "feature_std": [row["feature_std"] for row in steps],
                "knn_epoch": [row["epoch"] for row in knn],
                "knn_top1": [row["knn_top1"] for row in knn],
                "versions": json.loads((run.root / "versions.json").read_text()),
            }


def draw(path: Path, rows: Sequence[dict[str, Any]]) -> None:
    """Draw pretext accuracy and kNN of the arms: the mean of the seeds, and each seed thinly."""
    figure = make_figure(10, 4)
    panels = [("epoch", "pretext_top1", "Pretext top-1, %"), ("knn_epoch", "knn_top1", "kNN, %")]
    for axes, (x, y, title) in zip(figure.subplots(1, 2), panels, strict=True):
        for color, arm in zip(COLOURS, ARMS, strict=True):
            runs = [row for row in rows if row["arm"] == arm]
            for row in runs:
                axes.plot(row[x], row[y], color=color, linewidth=0.6, alpha=0.5)
            mean = np.mean([row[y] for row in runs], axis=0)
            axes.plot(runs[0][x], mean, color=color, linewidth=2, label=arm)
        axes.set_title(title, loc="left", fontsize=10, color=INK)
        axes.set_xlabel("epoch", color=INK)
        axes.grid(color="#dddddd", linewidth=0.6)
        axes.spines[["top", "right"]].set_visible(False)
    figure.axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
