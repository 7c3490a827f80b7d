"""Cores are those that a process may keep busy; threads follow them."""

import os
from pathlib import Path

import pytest
import torch

from fastmoco.config.loading import load_recipe
from fastmoco.core import cores, distributed
from fastmoco.core.cores import count_cores
from fastmoco.core.distributed import World, init_distributed
from fastmoco.errors import UsageError
from fastmoco.load.executor import get_settings

V1 = "7:cpuset:/x\n3:cpu,cpuacct:/job/step\n0::/\n"
QUOTAS = {
    "none": ("0::/\n", {}, 64),
    "not Linux": (None, {}, 64),
    "container": ("0::/\n", {"cpu.max": "800000 100000\n"}, 8),
    "unlimited": ("0::/a\n", {"cpu.max": "max 100000\n", "a/cpu.max": "max 100000\n"}, 64),
    "less than one": ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
    "more than there are": ("0::/\n", {"cpu.max": "9900000 100000\n"}, 64),
    "own": ("0::/a/b\n", {"a/b/cpu.max": "250000 100000\n"}, 2),
    "of one above": ("0::/a/b\n", {"a/cpu.max": "400000 50000\n", "a/b/cpu.max": "max 1\n"}, 8),
    "path from outside": ("0::/docker/1234\n", {"cpu.max": "300000 100000\n"}, 3),
    "version 1": (
        V1,
        {"cpu/job/cpu.cfs_quota_us": "600000\n", "cpu/job/cpu.cfs_period_us": "100000\n"},
        6,
    ),
    "version 1, unlimited": (
        V1,
        {"cpu/job/step/cpu.cfs_quota_us": "-1\n", "cpu/job/step/cpu.cfs_period_us": "100000\n"},
        64,
    ),
}


@pytest.fixture(autouse=True)
def of_64_cores(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """64 cores, without a quota."""
    monkeypatch.setattr(os, "cpu_count", lambda: 256)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(64)))
    monkeypatch.setattr(cores, "_CGROUPS", tmp_path / "cgroup")
    monkeypatch.setattr(cores, "_MOUNT", tmp_path / "mount")


@pytest.mark.parametrize("name", QUOTAS)
def test_cores_are_bound_by_affinity_and_quota(name: str, tmp_path: Path) -> None:
    cgroup, files, expected = QUOTAS[name]
    if cgroup:
        (tmp_path / "cgroup").write_text(cgroup)
    for path, text in files.items():
        (tmp_path / "mount" / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "mount" / path).write_text(text)
    assert count_cores(1) == expected
    assert count_cores(5) == max(1, expected // 5)


def test_decoding_threads_are_a_share_of_the_cores() -> None:
    threads = {
        (size, wanted): get_settings(
            load_recipe("cifar10_r18", [f"runtime.threads={wanted}"]).runtime,
            World(size=size, local_size=size),
            torch.device("cpu"),
        ).threads
        for size in (1, 8, 100)
        for wanted in (0, 40)
    }
    assert threads == {
        **{(1, 0): 16, (8, 0): 8, (100, 0): 1},
        **{(size, 40): 40 for size in (1, 8, 100)},
    }


@pytest.mark.parametrize("device", ["cpu", "cuda:0"])
def test_torch_has_its_share_of_the_cores(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a GPU too: torchrun would leave it one."""
    found: list[int] = []
    monkeypatch.setattr(torch, "set_num_threads", found.append)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    monkeypatch.setattr(distributed, "get_device", lambda *_: torch.device(device))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 128)
    with init_distributed("auto"):
        assert found == [64]
    monkeypatch.setattr(distributed, "dist", Concat())
    for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.setenv(name, "8")
    for name in ("RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.setenv(name, "0")
    with init_distributed("auto"):
        assert found == [64, 8]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 2)
    monkeypatch.setenv("WORLD_SIZE", "1")
    with init_distributed("auto"):
        assert found[2] == 2, "no more than OMP_NUM_THREADS says"


class Concat:
    """Ranks that are always there."""

    def init_process_group(self, *arguments: object, **options: object) -> None:
        """Wait for nobody."""

    destroy_process_group = init_process_group

    def get_rank(self) -> int:
        return 0


def test_mixed_decoding_needs_a_gpu() -> None:
    recipe = load_recipe("cifar10_r18", ["runtime.decode=mixed", "runtime.hw_decoder_load=0.9"])
    with pytest.raises(UsageError, match=r"mixed needs a GPU.*decode=auto"):
        get_settings(recipe.runtime, World(), torch.device("cpu"))
    settings = get_settings(recipe.runtime, World(), torch.device("cuda"))
    assert (settings.decode, settings.hw_decoder_load) == ("mixed", 0.9)
