"""`fastmoco shard`: what the user sees, exit codes, and what an interruption leaves."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest

from fastmoco import cli
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.pack.options import PackOptions

Make = Callable[..., Path]

# The real command, held still at its fifth image.
STALLED = """
import time
from contextlib import contextmanager
import fastmoco.cli as cli
from fastmoco.cli import data as sets

@contextmanager
def stalled(what):
    def on_progress(done, total):
        if done == 5:
            print("stalled", flush=True)
            time.sleep(120)
    yield on_progress

sets.progress = stalled
cli.main()
"""


@pytest.fixture
def run(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """Run the command line in this process: exit code, stdout, stderr."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["fastmoco", *map(str, arguments)])
        with pytest.raises(SystemExit) as end:
            cli.main()
        out, err = capsys.readouterr()
        code = end.value.code
        return code if isinstance(code, int) else 0, out, err

    return run


Run = Callable[..., tuple[int, str, str]]


def test_packs_and_sums_up(run: Run, make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    (source / "cat/bad.jpg").write_bytes(b"x")
    code, out, err = run("shard", source, tmp_path / "set", "--workers", 1, "--seed", 3)
    assert code == 0, err
    manifest = ShardSet(tmp_path / "set").manifest
    assert manifest.options["seed"] == 3
    lines = [line.strip() for line in out.splitlines()]
    assert lines[0].startswith(f"{tmp_path / 'set'}: 8 images, 2 classes, 1 shards, 0.0 MB")
    assert lines[1] == "mean " + " ".join(f"{value:.4f}" for value in manifest.mean)
    assert lines[4] == f"left out 1, listed in {tmp_path / 'set/rejects.jsonl'}:"
    assert lines[5] == "'cat/bad.jpg' is not an image of a known format"


def test_options_reach_the_pack(run: Run, make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", ("one",))
    assert run("shard", source, tmp_path / "set", "--unlabelled", "--shard-mb", 5)[0] == 0
    options = PackOptions(unlabelled=True, shard_mb=5).recorded()
    assert ShardSet(tmp_path / "set").manifest.options == options
    code, _, err = run("shard", source, tmp_path / "b", "--unlabelled", "--min-side", 33,
                       "--max-rejects", 2)  # fmt: skip
    assert code == 3 and "more than 2, so nothing was packed" in err and "smaller than 33" in err


@pytest.mark.parametrize(
    ("layout", "code", "message"),
    [
        (None, 2, "There is no file or folder"),
        ((), 3, "holds no images"),
        (("cat/1.png",), 3, "100 % accuracy"),
        (("train/cat/1.png", "train/dog/1.png", "val/cat/1.png", "val/ox/1.png"), 3, "differ in"),
    ],
)
def test_user_errors_are_plain_lines(
    run: Run, tmp_path: Path, layout: tuple[str, ...] | None, code: int, message: str
) -> None:
    if layout is not None:
        (tmp_path / "in").mkdir()
    for name in layout or ():
        (tmp_path / "in" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "in" / name).write_bytes(b"x")
    found, out, err = run("shard", tmp_path / "in", tmp_path / "set")
    assert (found, out) == (code, "")
    assert err.startswith("error: ") and message in err and "Traceback" not in err
    assert err.count("\n") <= 2 and not (tmp_path / "set").exists()


def test_like(run: Run, make_images: Make, tmp_path: Path, small_set: ShardSet) -> None:
    source = make_images(tmp_path / "in", ("bee", "cow"))
    code, out, err = run("shard", source, tmp_path / "set", "--like", small_set.root)
    assert code == 0 and "without images, 1: ape" in err and "no image of 1 classes: ape" in out
    assert set(ShardSet(tmp_path / "set").labels()) == {1, 2}, "numbered as in the training set"
    source = make_images(tmp_path / "in", ("dog",))
    code, _, err = run("shard", source, tmp_path / "other", "--like", small_set.root)
    assert code == 3 and "unknown there dog" in err


def test_existing_out_and_unknown_option(run: Run, make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    code, _, err = run("shard", source, tmp_path)
    assert code == 2 and "exists already" in err
    assert run("shard", source, tmp_path / "set", "--sede", 1)[0] == 2
    assert run("shard", source, tmp_path / "set", "--workers", 0)[0] == 2


def test_ctrl_c_is_one_line(make_images: Make, tmp_path: Path) -> None:
    source, out = make_images(tmp_path / "in", per_class=40), tmp_path / "set"
    command = [sys.executable, "-c", STALLED, "shard", str(source), str(out), "--workers", "2"]
    process = subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    with process:
        assert process.stdout and process.stdout.readline() == "stalled\n"
        os.killpg(process.pid, signal.SIGINT)  # a terminal tells the workers, too
        _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and err.splitlines()[1:] == ["interrupted"]
    assert not out.exists()


def test_help_loads_nothing_heavy() -> None:
    code = (
        "import sys, atexit; sys.argv = ['fastmoco', '--help']\n"
        "atexit.register(lambda: print(*sys.modules, file=sys.stderr))\n"
        "from fastmoco.cli import main; main()"
    )
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert "shard" in found.stdout
    heavy = {"torch", "nvidia", "numpy", "PIL", "pydantic", "webdataset", "yaml"}
    assert not heavy & set(found.stderr.split())


def test_the_version_is_that_of_the_installed_package(
    run: Callable[..., tuple[int, str, str]],
) -> None:
    assert run("--version") == (0, f"fastmoco {version('fastmoco')}\n", "")
