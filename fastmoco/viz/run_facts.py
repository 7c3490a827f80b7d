"""What the files of a run folder say, without looking at an image."""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastmoco.config.encoder import EncoderSpec
from fastmoco.config.loading import differences, load_recipe, recipe_names
from fastmoco.config.recipe import Recipe, Runtime
from fastmoco.loggers.collapse import find_collapse
from fastmoco.plots import curves_in
from fastmoco.runs.run_folder import ORIGIN, RunFolder, parse_row

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Number:
    """A line of evaluations.jsonl, in words; an empty word is not known.

    Attributes:
        kind: "knn", "probe", ...
        step: of the checkpoint.
        top1, top5: percent.
        protocol: `key=value`, by commas.
        sets: which samples, `train: PATH (N samples, set ID)`.
        cautions: what speaks against the number.
    """

    kind: str
    step: str
    top1: str
    top5: str
    protocol: str
    sets: list[str]
    cautions: list[str]

    @classmethod
    def of(cls, row: Row) -> "Number":
        """Return a row in words, whatever keys it has."""
        best = row.get("chosen") or row.get("best") or {}
        protocol = ({"lr": best["lr"]} if "lr" in best else {}) | (row.get("protocol") or {})
        return cls(
            str(row.get("kind", "")),
            str(row.get("step", "")),
            _percent(row.get("top1", best.get("top1"))),
            _percent(row.get("top5", best.get("top5"))),
            ", ".join(f"{key}={_in_words(value)}" for key, value in protocol.items()),
            [f"{name}: {_described(one)}" for name, one in (row.get("sets") or {}).items()],
            list(row.get("cautions") or []),
        )


@dataclass(frozen=True)
class Facts:
    """What is known of a run from its files.

    Attributes:
        name: of the run.
        spec: of its encoder.
        recipe: the resolved one; None: the weights were imported.
        changed: what differs from the shipped recipe of its name, as "key: shipped -> here"; None:
            no such recipe ships, or it came without one.
        config: the text of config.yaml, or of an import's encoder.json.
        versions: what the run ran on.
        status: how its last start ended, in words.
        metrics: rows of metrics.jsonl.
        latest: the last value of each curve, in words, by its title.
        warnings: what the last epoch that was measured says of a collapse.
        evaluations: rows of evaluations.jsonl.
        numbers: the same in words, newest first.
        origin: of weights that another program trained: their file; else empty.
    """

    name: str
    spec: EncoderSpec
    recipe: Recipe | None
    changed: list[str] | None
    config: str
    versions: dict[str, str]
    status: str
    metrics: list[dict[str, Any]]
    latest: dict[str, str]
    warnings: list[str]
    evaluations: list[dict[str, Any]]
    numbers: list[Number]
    origin: dict[str, Any]


def gather(run: RunFolder) -> Facts:
    """Return what the files of a run say; all but config.yaml may be missing.

    Raises:
        UsageError: there is no run here, or its config.yaml is not a recipe.
    """
    described = run.config if run.config.is_file() else run.root / "encoder.json"
    recipe, metrics = run.recipe(), run.rows()
    versions = _json(run.root / "versions.json")
    evaluations = read_rows(run.root / "evaluations.jsonl")
    measured = [row for row in metrics if row.get("kind") == "epoch" and "rankme" in row]
    return Facts(
        run.name,
        run.spec(),
        recipe,
        _changed(recipe) if recipe else None,
        described.read_text(),
        {name: _in_words(value) for name, value in sorted(versions.items()) if value},
        _status(_json(run.root / "status.json")),
        metrics,
        {curve.title: f"{curve.points(metrics)[1][-1]:.4g}" for curve in curves_in(metrics)},
        find_collapse(measured[-1]) if measured else [],
        evaluations,
        [Number.of(row) for row in reversed(evaluations)],
        _json(run.root / ORIGIN),
    )


def _changed(recipe: Recipe) -> list[str] | None:
    """Return how a run's recipe differs from the shipped one in what decides its number."""
    if recipe.name not in recipe_names():
        return None
    shipped, here = (
        one.model_dump(
            mode="json",
            # Where things lie, what the machine is, and what the set says of its colors.
            exclude={
                "data": {"sets"},
                "encoder": {"mean", "std"},
                "runtime": set(Runtime.model_fields) - {"precision", "accumulate"},
                **dict.fromkeys(("out", "monitor", "checkpoints"), True),
            },
        )
        for one in (load_recipe(recipe.name), recipe)
    )
    return differences(shipped, here)


def _status(status: Row) -> str:
    if not status:
        return "no status.json: it is still running, or was killed"
    if status.get("code") is None:
        return f"not ended, or killed; {status.get('message', '')}"
    ended = "ended well" if status.get("code") == 0 else f"exit code {status.get('code')}"
    return f"{ended}: {status.get('message', '')}"


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        return {}
    try:
        found: dict[str, Any] = json.loads(path.read_text())
    except ValueError:
        return {}
    return found


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Return the rows of a JSONL file; one cut short by a kill is left out."""
    if not path.is_file():
        return []
    lines = path.read_text().splitlines(keepends=True)
    return [row for line in lines if (row := parse_row(line)) is not None]


def _percent(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"


def _in_words(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, Iterable) and not isinstance(value, str | Mapping):
        return " ".join(_in_words(item) for item in value)
    return str(value)


def _described(one: Row) -> str:
    parts = [f"{one['samples']} samples"] if "samples" in one else []
    parts += [f"set {one['set_id'][:12]}"] if "set_id" in one else []
    parts += [f"labels {one['labels']}"] if "labels" in one else []
    return f"{one.get('path', '')} ({', '.join(parts)})"
