"""Starts the worker on one or more ranks, for real, over gloo."""

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import ranked
import torch

WORKER = Path(__file__).with_name("worker.py")


@pytest.fixture(scope="session")
def worker() -> ModuleType:
    """The worker as a module: its recipe and its images."""
    spec = importlib.util.spec_from_file_location("moco_worker", WORKER)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_ranks(tmp_path: Path) -> Callable[..., dict[str, Any]]:
    """`run_ranks(ranks, nodes=1, steps=..., recipe={...}, nan=[step, rank])`: rank 0's log.

    `program` is the script to start instead of the worker; it takes OUT and a JSON object too.
    """

    def run(ranks: int, nodes: int = 1, program: Path = WORKER, **spec: Any) -> Any:
        out, log = tmp_path / f"ranks{ranks}.pt", tmp_path / "log"
        command = [str(program), str(out), json.dumps(spec)]
        codes = ranked.finish(ranked.start_script(log, command, ranks, nodes), timeout_s=240)
        told = "\n".join(ranked.words(log, rank) for rank in range(ranks))
        assert codes == [0] * ranks, told
        saved: dict[str, Any] = torch.load(out, weights_only=True)
        out.unlink()  # pytest would keep a gigabyte of it
        return saved

    return run
