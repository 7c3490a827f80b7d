"""Starts the worker on one or more ranks, for real, over gloo."""

import importlib.util
import json
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

WORKER = Path(__file__).with_name("worker.py")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


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
        out = tmp_path / f"ranks{ranks}.pt"
        shared = {
            **os.environ,
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(free_port()),
            "WORLD_SIZE": str(ranks),
            "LOCAL_WORLD_SIZE": str(ranks // nodes),
            "OMP_NUM_THREADS": "1",
            "PYTHONWARNINGS": "error::UserWarning,error::FutureWarning",
        }
        command = [sys.executable, str(program), str(out), json.dumps(spec)]
        started = [
            subprocess.Popen(
                command,
                env=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank % (ranks // nodes))},
                stderr=subprocess.PIPE,
                text=True,
            )
            for rank in range(ranks)
        ]
        errors = [process.communicate(timeout=240)[1] for process in started]
        assert all(process.returncode == 0 for process in started), "\n".join(errors)
        saved: dict[str, Any] = torch.load(out, weights_only=True)
        out.unlink()  # pytest would keep a gigabyte of it
        return saved

    return run
