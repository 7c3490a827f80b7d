"""What holds for all commands: help, the environment, and values that no command takes."""

import re
import subprocess
import sys
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

import pytest
import typer

from fastmoco.cli import app

Run = Callable[..., tuple[int, str, str]]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]


def test_python_m() -> None:
    command = [sys.executable, "-m", "fastmoco", "--version"]
    found = subprocess.run(command, capture_output=True, text=True, check=True)
    assert found.stdout == f"fastmoco {version('fastmoco')}\n"


@pytest.mark.parametrize("name", list(COMMANDS))
def test_help_tells_every_default(run: Run, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    code, out, _ = run(name, "--help")
    assert code == 0
    shown = re.sub(r"[\s│]", "", out)
    for parameter in COMMANDS[name].params:
        for default in re.findall(r"\[default: .*?\]", parameter.help or ""):
            assert default.replace(" ", "") in shown, f"{parameter.name}: {default}"


@pytest.mark.parametrize(
    ("variables", "words"),
    [
        ({"RANK": "1"}, "no file or folder"),  # left by a scheduler: we are alone all the same
        ({"RANK": "1", "WORLD_SIZE": "1"}, "no file or folder"),
        ({"WORLD_SIZE": "2"}, "but no RANK: start several processes by torchrun, or `unset"),
        ({"WORLD_SIZE": "x"}, "WORLD_SIZE=x in the environment is no number: `unset WORLD_SIZE`"),
        ({"LOCAL_RANK": ""}, "LOCAL_RANK= in the environment is no number"),
    ],
)
def test_what_a_scheduler_left_behind(
    run: Run,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    variables: dict[str, str],
    words: str,
) -> None:
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    packs = "file" in words
    code, _, err = run(*(("shard", "absent", tmp_path / "x") if packs else ("knn", "absent")))
    assert code == 2 and words in err


@pytest.mark.parametrize(
    "option",
    [
        ("shard", "x", "y", "--max-mb", "nan"),
        ("shard", "x", "y", "--max-mpixels", "inf"),
        ("shard", "x", "y", "--seed", 2**64),
        ("finetune", "x", "--seed", 2**63),
        ("probe", "x", "--lr", "nan"),
    ],
)
def test_numbers_that_are_none(run: Run, option: tuple[object, ...]) -> None:
    code, _, err = run(*option)
    assert code == 2 and "Invalid value" in err


def test_help_of_the_launcher() -> None:
    launcher = Path(__file__).parents[2] / "launch/pretrain.py"
    found = subprocess.run([sys.executable, launcher, "--help"], capture_output=True, text=True)
    assert found.returncode == 0 and found.stdout.startswith("usage: pretrain RECIPE")
