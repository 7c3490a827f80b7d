"""What two runs must have in common to be the same run, and how a run ended."""

import json
from pathlib import Path
from typing import Any

import torch

from fastmoco.runs.run_folder import RunFolder

CLOCK = {"images_per_s", "data_wait_percent", "memory_mb"}


def tensors(value: object, name: str = "") -> dict[str, torch.Tensor]:
    """Return every tensor of a nested state by its path."""
    if isinstance(value, torch.Tensor):
        return {name: value}
    items = value.items() if isinstance(value, dict) else enumerate(value)
    nested = [(k, v) for k, v in items if isinstance(v, dict | list | torch.Tensor)]
    return {n: t for k, v in nested for n, t in tensors(v, f"{name}.{k}").items()}


def numbers(root: Path) -> list[dict]:
    """Return the metrics of a run without what depends on the clock."""
    return [{k: v for k, v in row.items() if k not in CLOCK} for row in RunFolder(root).rows()]


def status(root: Path) -> Any:
    """Return how the last start of a run ended."""
    return json.loads((root / "status.json").read_text())
