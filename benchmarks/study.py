"""Runs the arms of a study, each with every seed, and compares their numbers with the first arm's.

    python benchmarks/study.py STUDY.yaml OUT [--seeds 0 1 2] [--jobs 2] [NAME=VALUE ...]

A study (benchmarks/studies/) holds

    about:     the question, a sentence
    commands:  of fastmoco, in their order; `{arm}` stands for the arm's own words
    arms:      a name, and its words; or a list of commands in place of `commands`
    measures:  a name, and where its number is: `knn_top1` (the last one of the training's rows)
               or `probe.top1` (of the last evaluation of that kind)
    panels:    lists x, y of the training's rows, to be drawn

and may use `{run}` (the run folder of this arm and seed), `{seed}`, `{train}` and `{test}` (the
demo's patches, cut on demand) and each NAME of the command line. With `base=RUN`, `{run}` begins as
a copy of RUN. Leaves rows.jsonl, study.png and a table in OUT; what is done is not run again.
"""

import argparse
import json
import os
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import yaml
from pydantic import BaseModel, ConfigDict
from scipy import stats

from fastmoco.core.environment import environment
from fastmoco.demo.demo import PHOTOGRAPHS, make_set
from fastmoco.plots import INK, make_figure

PATCHES = {"train": 200, "test": 50}


class Study(BaseModel):
    """See above."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    about: str
    commands: list[str] = []
    arms: dict[str, str | list[str]]
    measures: dict[str, str]
    panels: list[tuple[str, str]] = []

    def lines(self, arm: str) -> list[str]:
        """Return the commands of an arm."""
        own = self.arms[arm]
        return own if isinstance(own, list) else [c.replace("{arm}", own) for c in self.commands]


def main() -> int:
    """Run every arm with every seed, write the rows, draw them, return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("study", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="runs at a time, one core each")
    parser.add_argument("names", nargs="*", metavar="NAME=VALUE")
    options = parser.parse_args()
    study = Study.model_validate(yaml.safe_load(options.study.read_text()))
    names = dict(pair.split("=", 1) for pair in options.names)
    options.out.mkdir(parents=True, exist_ok=True)
    if any("{train}" in line for arm in study.arms for line in study.lines(arm)):
        for split, count in PATCHES.items():
            if split not in names:
                make_set(options.out, split, count, PHOTOGRAPHS)
                names[split] = str(options.out / split)
    with ThreadPoolExecutor(options.jobs) as pool:
        runs = [(arm, seed) for seed in options.seeds for arm in study.arms]
        rows = list(pool.map(lambda run: measure(study, options.out, *run, names), runs))
    lines = [{"kind": "environment", "study": study.about, **environment()}, *rows]
    (options.out / "rows.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (options.out / "table.md").write_text(table := "\n".join(tabulate(study, rows)) + "\n")
    print(table)
    if study.panels:
        draw(options.out / "study.png", study, rows)
    return 0


def measure(study: Study, out: Path, arm: str, seed: int, names: dict[str, str]) -> dict[str, Any]:
    """Run an arm with a seed, each command in a process of its own on one core.

    Raises:
        subprocess.CalledProcessError: a command failed; its output is in the log beside the run.
    """
    run = out / f"{''.join(c if c.isalnum() else '-' for c in arm)}-{seed}"
    row = run.with_suffix(".json")
    if row.exists():
        return dict(json.loads(row.read_text()))
    if "base" in names and not run.exists():
        shutil.copytree(names["base"], run)
    commands = [line.format(run=run, seed=seed, **names) for line in study.lines(arm)]
    quiet = os.environ | {"OMP_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
    with run.with_suffix(".log").open("a") as log:
        for command in commands:
            words = [sys.executable, "-m", "fastmoco", *shlex.split(command)]
            subprocess.run(words, check=True, env=quiet, stdout=log, stderr=log)
    found = {"arm": arm, "seed": seed, "commands": commands}
    found |= {name: read_number(run, place) for name, place in study.measures.items()}
    metrics = read_rows(run / "metrics.jsonl")
    found["curves"] = {y: [[r[x], r[y]] for r in metrics if y in r] for x, y in study.panels}
    row.write_text(json.dumps(found))
    print(arm, seed, {name: found[name] for name in study.measures}, flush=True)
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a .jsonl file; none where there is no file."""
    return [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []


def read_number(run: Path, place: str) -> float:
    """Return the last number of a name in the rows of training, or of a kind of evaluation."""
    kind, _, name = place.rpartition(".")
    rows = read_rows(run / ("evaluations.jsonl" if kind else "metrics.jsonl"))
    return float([r[name] for r in rows if name in r and (not kind or r["kind"] == kind)][-1])


def tabulate(study: Study, rows: Sequence[dict[str, Any]]) -> Iterator[str]:
    """Yield the lines of a table: mean, each seed, and the paired difference to the first arm.

    The interval is Student's, at 95 %, of the differences of equal seeds.
    """
    first = next(iter(study.arms))
    yield study.about + "\n"
    for name in study.measures:
        yield f"| {name} | mean | each seed | against {first}, 95 % |\n|---|---|---|---|"
        values = {a: np.array([r[name] for r in rows if r["arm"] == a]) for a in study.arms}
        for arm, numbers in values.items():
            each = " ".join(f"{number:.2f}" for number in numbers)
            gaps, gap = numbers - values[first], ""
            if arm != first:
                gap = f"{gaps.mean():+.2f}"
            if arm != first and len(gaps) > 1:
                half = stats.t.ppf(0.975, len(gaps) - 1) * stats.sem(gaps)
                gap += f" [{gaps.mean() - half:+.2f}, {gaps.mean() + half:+.2f}]"
            yield f"| {arm} | {numbers.mean():.2f} | {each} | {gap} |"
        yield ""


def draw(path: Path, study: Study, rows: Sequence[dict[str, Any]]) -> None:
    """Draw each panel: the mean over the seeds of an arm, and each seed thinly."""
    figure = make_figure(5 * len(study.panels), 4)
    axes = figure.subplots(1, len(study.panels), squeeze=False)[0]
    for panel, (x, y) in zip(axes, study.panels, strict=True):
        for number, arm in enumerate(study.arms):
            curves = np.array([row["curves"][y] for row in rows if row["arm"] == arm])
            for curve in curves:
                panel.plot(*curve.T, color=f"C{number}", linewidth=0.6, alpha=0.5)
            panel.plot(*curves.mean(axis=0).T, color=f"C{number}", linewidth=2, label=arm)
        panel.set_title(y.replace("_", " "), loc="left", fontsize=10, color=INK)
        panel.set_xlabel(x, color=INK)
        panel.grid(color="#dddddd", linewidth=0.6)
        panel.spines[["top", "right"]].set_visible(False)
    axes[0].legend(frameon=False, fontsize=9)
    figure.tight_layout()
    figure.savefig(path)


if __name__ == "__main__":
    sys.exit(main())
