"""Starts the ranks of a run as real processes that can be killed, with a fault if wanted.

They come out of a server that has imported torch once: thirty starts would else be mostly imports.
"""

import itertools
import os
import resource
import runpy
import signal
import socket
import sys
import time
import warnings
from collections.abc import Callable
from multiprocessing import get_context
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(["fastmoco.pretrain"])


def start(
    log: Path, *arguments: str, ranks: int = 1, fault: str | None = None
) -> list[BaseProcess]:
    """Start `pretrain ARGUMENTS` on some ranks; each writes to `log` with its number added."""
    return _start(_pretrain, (arguments, fault), log, ranks)


def start_script(log: Path, command: list[str], ranks: int, nodes: int = 1) -> list[BaseProcess]:
    """Start a script on some ranks, as if on so many machines; a warning of torch's is an error."""
    return _start(_script, (command,), log, ranks, nodes)


def _start(
    target: Callable[..., None],
    arguments: tuple[object, ...],
    log: Path,
    ranks: int,
    nodes: int = 1,
) -> list[BaseProcess]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    each = ranks // nodes
    started = []
    for rank in range(ranks):
        places = {"RANK": rank, "LOCAL_RANK": rank % each, "OMP_NUM_THREADS": 1}
        if ranks > 1:
            places |= {"WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": each}
            places |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        environment = {name: str(value) for name, value in places.items()}
        started.append(CONTEXT.Process(target=_rank, args=(environment, log, target, arguments)))
    for process in started:
        process.start()
    return started


def finish(processes: list[BaseProcess], timeout_s: float = 120) -> list[int | None]:
    """Wait for all and return their exit codes; one that does not end is killed (-9)."""
    deadline = time.monotonic() + timeout_s
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()
    return [process.exitcode for process in processes]


def words(log: Path, rank: int = 0) -> str:
    """Return what a rank printed."""
    return Path(f"{log}.{rank}").read_text()


def _rank(
    environment: dict[str, str],
    log: Path,
    target: Callable[..., None],
    arguments: tuple[object, ...],
) -> None:
    os.environ.update(environment)
    out = os.open(f"{log}.{environment['RANK']}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(out, 1)
    os.dup2(out, 2)
    target(*arguments)


def _pretrain(arguments: tuple[str, ...], fault: str | None) -> None:
    if fault:
        name, _, detail = fault.partition(":")
        FAULTS[name](int(os.environ["RANK"]), detail)
    from fastmoco.pretrain import main

    sys.exit(main(arguments))


def _script(command: list[str]) -> None:
    warnings.simplefilter("error", UserWarning)
    warnings.simplefilter("error", FutureWarning)
    sys.argv = command
    runpy.run_path(command[0], run_name="__main__")


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _kill_in_save(rank: int, where: str) -> None:
    """SIGKILL in the second save: before the sync, before the rename, or while old ones go."""
    import fastmoco.core.files
    import fastmoco.runs.run_folder

    patch, saves = pytest.MonkeyPatch(), []
    commit, rmtree = fastmoco.core.files._commit, fastmoco.runs.run_folder.shutil.rmtree

    def dying_commit(partial: Path, final: Path) -> None:
        saves.append(final)
        if len(saves) == 2 and where == "sync":
            _kill()
        if len(saves) == 2 and where == "rename":
            patch.setattr(Path, "rename", lambda *_: _kill())
        commit(partial, final)

    def dying_rmtree(path: Path, *args: object, **options: object) -> None:
        if where == "purge" and Path(path).name.startswith("step-") and Path(path).exists():
            (Path(path) / "manifest.json").unlink()
            _kill()
        rmtree(path, *args, **options)

    patch.setattr(fastmoco.core.files, "_commit", dying_commit)
    patch.setattr(fastmoco.runs.run_folder.shutil, "rmtree", dying_rmtree)


def _full_disk(rank: int, saves: str) -> None:
    """No room for a checkpoint in the saves of these numbers, such as "2" or "2,3,4"."""
    from fastmoco.runs.run_folder import RunFolder

    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    full, count, save = {int(n) for n in saves.split(",")}, [0], RunFolder.save

    def limited(self: RunFolder, *args: object) -> Path:
        count[0] += 1
        limit = 1_000_000 if count[0] in full else resource.RLIM_INFINITY
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
        try:
            return save(self, *args)
        finally:
            unlimited = (resource.RLIM_INFINITY, resource.RLIM_INFINITY)
            resource.setrlimit(resource.RLIMIT_FSIZE, unlimited)

    RunFolder.save = limited


def _at_step(act: Callable[[], None]) -> Callable[[int, str], None]:
    """Return a fault that does something on one rank before a step, given as "RANK,STEP"."""

    def fault(rank: int, detail: str) -> None:
        from fastmoco.train.engine import Engine

        where, step = (int(n) for n in detail.split(","))
        take = Engine.step

        def faulty(self: Engine, query: object, key: object, number: int, *ids: object) -> object:
            if (rank, number) == (where, step):
                act()
            return take(self, query, key, number, *ids)

        Engine.step = faulty

    return fault


def _slow(rank: int, seconds: str) -> None:
    """Every step takes so much longer: time for a test to do something in between."""
    from fastmoco.train.engine import Engine

    take = Engine.step

    def slow(self: Engine, *args: object) -> object:
        time.sleep(float(seconds))
        return take(self, *args)

    Engine.step = slow


def _skewed_clock(rank: int, seconds: str) -> None:
    """Rank 0's clock goes on by so much each time that it is read, rank 1's by three times that."""
    from fastmoco.train import loop

    ticks = itertools.count(0, int(seconds) * (1 + 2 * rank))
    loop.time = SimpleNamespace(monotonic=lambda: next(ticks), perf_counter=time.perf_counter)


def _slow_monitor(rank: int, seconds: str) -> None:
    """The monitor takes so long for each image."""
    from fastmoco.evaluate import features as embed

    cast = embed.Preprocessing.cast

    def slow(self: embed.Preprocessing, images: torch.Tensor) -> torch.Tensor:
        time.sleep(float(seconds))
        return cast(self, images)

    embed._BATCH = 1
    embed.Preprocessing.cast = slow


FAULTS = {
    "kill_in_save": _kill_in_save,
    "full_disk": _full_disk,
    "stall": _at_step(lambda: time.sleep(3600)),
    "die": _at_step(lambda: os._exit(9)),
    "slow": _slow,
    "skewed_clock": _skewed_clock,
    "slow_monitor": _slow_monitor,
}
