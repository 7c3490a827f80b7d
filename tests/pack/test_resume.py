"""What an interrupted pack leaves, and what the next one makes of it."""

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
from filelock import FileLock
from PIL import Image

from fastmoco.core.rng import Stream, shuffled
from fastmoco.errors import UsageError
from fastmoco.pack import packer
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pack.parallel import ordered_map
from fastmoco.pack.worker import make_fragment

Make = Callable[..., Path]

KILLS = 20
PACK = """
import sys
from pathlib import Path
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

if __name__ == "__main__":
    options = PackOptions(shard_mb=1, workers=int(sys.argv[3]))
    pack(Path(sys.argv[1]), Path(sys.argv[2]), options, lambda *done: print(done, flush=True))
"""


def content_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


@pytest.fixture(scope="module")
def noisy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """14 MB of PNGs that cannot be compressed, one of them no image, in two classes."""
    root = tmp_path_factory.mktemp("noisy") / "in"
    generator = np.random.default_rng(0)
    for number in range(160):
        path = root / "ab"[number % 2] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        noise = generator.integers(0, 256, (150, 200, 3), dtype=np.uint8)
        Image.fromarray(noise).save(path, compress_level=1)
    (root / "a/bad.png").write_bytes(b"x")
    return root


def test_killed_at_random_and_resumed_gives_the_same_bytes(noisy: Path, tmp_path: Path) -> None:
    script = tmp_path / "pack.py"
    script.write_text(PACK)
    pack(noisy, tmp_path / "at_once", PackOptions(shard_mb=1, workers=2))
    out, chance, kept = tmp_path / "set", random.Random(1), []
    for kill in range(KILLS):
        command = [sys.executable, str(script), str(noisy), str(out), str(1 + kill % 2)]
        with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
            assert process.stdout
            for _ in range(chance.randrange(12)):  # images done since this attempt began
                process.stdout.readline()
            time.sleep(chance.uniform(0, 0.02))
            process.send_signal(signal.SIGKILL)
        kept.append(len(list(tmp_path.glob(".set.partial/.*.record"))))
    # How many states the kills meet is a matter of chance and speed: several, at the least.
    assert not out.exists() and kept == sorted(kept) and len(set(kept)) > 2, kept
    pack(noisy, out, PackOptions(shard_mb=1, workers=2))
    assert content_of(out) == content_of(tmp_path / "at_once")


def interrupted(source: Path, out: Path, options: PackOptions, after: int) -> None:
    """Stop a pack after a number of images, as Ctrl-C does."""

    def stop(done: int, total: int) -> None:
        if done >= after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pack(source, out, options, stop)


def test_workers_that_outlive_their_attempt_leave_nothing(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options, out, runs = PackOptions(shard_mb=1, workers=1), tmp_path / "set", []

    def noted(function, tasks, workers):
        return ordered_map(function, (runs.append(task) or task for task in tasks), workers)

    monkeypatch.setattr(packer, "ordered_map", noted)
    interrupted(noisy, out, options, after=40)
    last = runs[-1]

    def late(done: int, total: int) -> None:
        with suppress(FileNotFoundError):
            make_fragment(last)

    pack(noisy, out, options, late)
    pack(noisy, tmp_path / "at_once", options)
    assert content_of(out) == content_of(tmp_path / "at_once")


def test_finished_shards_are_not_made_again(
    noisy: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = PackOptions(shard_mb=1)
    interrupted(noisy, tmp_path / "set", options, 100)
    partial = tmp_path / ".set.partial"
    shards = {path: path.stat().st_mtime_ns for path in partial.glob("*.tar")}
    finished = {path for path in shards if (partial / f".{path.stem}.record").exists()}
    assert 3 < len(finished) == len(shards) - 1
    seen: list[int] = []
    monkeypatch.setattr("fastmoco.pack.packer.ordered_map", lambda function, tasks, workers: (
        seen.extend(range(run.first, run.first + len(run.inputs))) or make_fragment(run)
        for run in tasks
    ))  # fmt: skip
    pack(noisy, tmp_path / "set", options)
    assert len(seen) < 161 - 60 and seen == list(range(seen[0], 161))


def test_a_damaged_shard_is_made_again(noisy: Path, tmp_path: Path) -> None:
    options = PackOptions(shard_mb=1)
    pack(noisy, tmp_path / "at_once", options)
    interrupted(noisy, tmp_path / "set", options, 100)
    first, second, third = sorted(tmp_path.glob(".set.partial/*.tar"))[:3]
    first.write_bytes(first.read_bytes()[:-1] + b"x")
    second.unlink()
    (third.parent / f".{third.stem}.record").write_bytes(b"PK damaged")
    pack(noisy, tmp_path / "set", options)
    assert content_of(tmp_path / "set") == content_of(tmp_path / "at_once")


@pytest.mark.parametrize("change", ["seed", "options", "file", "new file"])
def test_a_changed_source_or_option_starts_over(
    make_images: Make, tmp_path: Path, change: str
) -> None:
    source = make_images(tmp_path / "in", per_class=40)
    interrupted(source, tmp_path / "set", PackOptions(), 20)
    options = PackOptions(seed=int(change == "seed"), min_side=1 + int(change == "options"))
    if change == "file":
        (source / "cat/0000.jpg").write_bytes((source / "dog/0000.jpg").read_bytes())
    if change == "new file":
        (source / "cat/new.jpg").write_bytes((source / "dog/0000.jpg").read_bytes())
    pack(source, tmp_path / "set", options)
    pack(source, tmp_path / "at_once", options)
    assert content_of(tmp_path / "set") == content_of(tmp_path / "at_once")


def test_values_that_filled_their_range_before_the_stop_still_do(tmp_path: Path) -> None:
    """One 16-bit image does, in the first shard; those that are left are nearly black."""
    source, generator = tmp_path / "in", np.random.default_rng(0)
    source.mkdir()
    bright = shuffled(0, Stream.ORDER, 0, 40)[0]
    for number in range(40):
        noise = generator.integers(0, 65536 if number == bright else 4096, (200, 200), np.uint16)
        Image.fromarray(noise).save(source / f"{number:02d}.png", compress_level=1)
    options = PackOptions(shard_mb=1)
    pack(source, tmp_path / "at_once", options)
    interrupted(source, tmp_path / "set", options, 30)
    assert list(tmp_path.glob(".set.partial/.*.record"))
    pack(source, tmp_path / "set", options)
    assert content_of(tmp_path / "set") == content_of(tmp_path / "at_once")


def test_splits_appear_together_and_resume(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", per_class=60)
    options = PackOptions(splits=(("train", 0.5), ("val", 0.5)))
    interrupted(source, tmp_path / "sets", options, 100)  # within the second
    assert not (tmp_path / "sets").exists()
    assert (tmp_path / ".sets.partial/train/manifest.json").exists()
    pack(source, tmp_path / "sets", options)
    pack(source, tmp_path / "at_once", options)
    for split in ("train", "val"):
        assert content_of(tmp_path / "sets" / split) == content_of(tmp_path / "at_once" / split)
    assert sorted(path.name for path in (tmp_path / "sets").iterdir()) == ["train", "val"]


def test_two_packs_into_one_place(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    with (
        FileLock(tmp_path / ".set.lock"),
        pytest.raises(UsageError, match="Another process is writing"),
    ):
        pack(source, tmp_path / "set", PackOptions())
    pack(source, tmp_path / "set", PackOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


def test_progress_counts_every_image(make_images: Make, tmp_path: Path) -> None:
    seen: list[tuple[int, int]] = []
    pack(
        make_images(tmp_path / "in", per_class=40),
        tmp_path / "set",
        PackOptions(),
        lambda done, total: seen.append((done, total)),
    )
    assert seen == [(done, 80) for done in range(1, 81)]
