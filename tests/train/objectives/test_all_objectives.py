"""Every objective goes on bit for bit, leaves nothing behind a bad step, and never waits."""

import copy
import importlib.util
import io
import json
import sys
from pathlib import Path

import pytest
import torch
from states import tensors

from fastmoco.core.distributed import World
from fastmoco.pretrain import main
from fastmoco.runs.run_folder import RunFolder
from fastmoco.train.engine import Engine

_SPEC = importlib.util.spec_from_file_location(
    "step_counters", Path(__file__).parents[1] / "counters.py"
)
counters = importlib.util.module_from_spec(_SPEC)
sys.modules[_SPEC.name] = counters  # its dataclasses look themselves up
_SPEC.loader.exec_module(counters)

OBJECTIVES = {
    "moco": {"name": "moco", "queue": 20, "bn_group": 4},
    "end_to_end": {"name": "end_to_end", "bn_group": 4, "symmetric": True},
    "simclr": {"name": "simclr"},
    "memory_bank": {"name": "memory_bank", "queue": 20, "bn_group": 4},
}


@pytest.fixture(params=OBJECTIVES)
def section(request) -> dict:
    return OBJECTIVES[request.param]


def engine_of(worker, section: dict) -> Engine:
    recipe = worker.recipe_of({"objective": section, "precision": "fp32"})
    return Engine(recipe, World(), torch.device("cpu"), worker.IDS)


def take(engine: Engine, worker, step: int, value: float | None = None) -> bool:
    views = [view.float() for view in worker.images(16, step)]
    if value is not None:
        views[0][3, 1, 2, 2] = value
    return bool(engine.step(*views, step, worker.ids(16, step)).ok)


def test_a_loaded_state_goes_on_to_the_same_bits(worker, section):
    whole, first, second = (engine_of(worker, section) for _ in range(3))
    for step in range(4):
        take(whole, worker, step)
        if step < 2:
            take(first, worker, step)
    file = io.BytesIO()
    torch.save(first.state(), file)
    file.seek(0)
    second.load(torch.load(file, weights_only=True))
    for step in (2, 3):
        take(second, worker, step)
    ours, theirs = tensors(second.state()), tensors(whole.state())
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_bad_step_leaves_the_state_and_a_good_one_moves_it(worker, section):
    engine = engine_of(worker, section)
    take(engine, worker, 0)
    before = tensors(copy.deepcopy(engine.state()))
    assert not take(engine, worker, 1, torch.nan)
    after = tensors(engine.state())
    changed = [n for n in before if not torch.equal(before[n], after[n]) and "guard" not in n]
    assert not changed
    assert take(engine, worker, 1)
    after = tensors(engine.state())
    still = {n for n in before if torch.equal(before[n], after[n])}
    idle = ("num_batches_tracked", "guard", "scale", "filled")
    assert all(any(part in n for part in idle) for n in still)


def test_the_host_never_waits_for_the_device(worker, section):
    engine = engine_of(worker, section)
    take(engine, worker, 0)
    views = [view.float() for view in worker.images(16, 1)]
    ids = worker.ids(16, 1)
    assert counters.host_syncs(lambda: engine.step(*views, 1, ids)) == 0


def test_a_run_that_stops_and_goes_on_is_the_run_that_did_not(recipe, section, tmp_path, capsys):
    view = "{jitter: [0.4, 0.4, 0.4, 0.1]}"
    views = [view] if section["name"] == "memory_bank" else [view, view]
    changes = [
        *(f"objective={json.dumps(section)}", f"views=[{', '.join(views)}]", "monitor=null"),
        *("schedule.epochs=2", "runtime.precision=fp32"),
    ]
    command = [str(recipe), *changes]
    assert main([*command, "--dry-run"]) == 0
    told = capsys.readouterr().out
    assert ("shuffle on" in told) == (section["name"] in ("moco", "end_to_end"))
    assert ("24 x 16" in told) == (section["name"] == "memory_bank")
    assert main([*command, f"out={tmp_path / 'whole'}"]) == 0
    assert main([*command, f"out={tmp_path / 'parts'}", "stop_epoch=1"]) == 0
    assert main([*command, f"out={tmp_path / 'parts'}"]) == 0
    ours, theirs = (state_of(tmp_path / name) for name in ("parts", "whole"))
    assert len(ours) > 50 and ours.keys() == theirs.keys()
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    rows = [row for row in RunFolder(tmp_path / "whole").rows() if row["kind"] == "step"]
    assert all(0 <= row["pretext_top1"] <= row["pretext_top5"] <= 1 for row in rows)


def state_of(root: Path) -> dict[str, torch.Tensor]:
    newest = max((root / "checkpoints").iterdir(), key=lambda folder: folder.name)
    return tensors(torch.load(newest / "state.pt", weights_only=True))
