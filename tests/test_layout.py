"""Imports go down one list only: a newcomer can read the road of the data from top to bottom."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import fastmoco

PACKAGE = Path(fastmoco.__file__).parent
# Stations that share a line never import each other.
ORDER = [
    {"__main__"},
    {"cli"},
    {"demo"},
    {"label", "viz", "check"},
    {"pretrain"},
    {"train", "evaluate", "interop"},
    {"runs"},
    {"load", "pack", "models", "loggers"},
    {"dataset", "config", "plots"},
    {"core"},
    {"errors"},
]
LEVEL = {station: level for level, stations in enumerate(ORDER) for station in stations}


def station_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported_stations(source: str) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    names = {name for name in names if name.startswith("fastmoco.")}
    return {name.split(".")[1] for name in names} - {"__version__"}


def faults(station: str, source: str) -> set[str]:
    others = imported_stations(source) - {station}
    return {other for other in others if LEVEL[other] <= LEVEL[station]}


@pytest.mark.parametrize(
    "path", [p for p in PACKAGE.rglob("*.py") if p.name != "__init__.py"], ids=lambda p: p.stem
)
def test_imports_go_down(path):
    assert station_of(path) in LEVEL, "a new station needs its place in ORDER"
    assert not faults(station_of(path), path.read_text())


def test_the_rule_sees_a_fault():
    assert faults("load", "from fastmoco.pack.packer import pack") == {"pack"}
    assert faults("evaluate", "def f():\n    import fastmoco.train.engine") == {"train"}
    assert faults("core", "from fastmoco import config") == {"config"}
    assert not faults("train", "from fastmoco.load.loader import Loader")


def test_help_imports_nothing_heavy():
    code = "import sys, fastmoco.cli; print(*sorted({n.split('.')[0] for n in sys.modules}))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not set(ran.stdout.split()) & {"torch", "nvidia", "numpy", "PIL", "pydantic", "yaml"}
    assert "typer" in ran.stdout.split()


def test_the_launcher_is_thin():
    launcher = PACKAGE.parent / "launch" / "pretrain.py"
    assert len(launcher.read_text().splitlines()) <= 40


def test_all_that_is_printed_is_cleaned() -> None:
    """By `echo`; what compares and measures prints no names from outside."""
    for path in PACKAGE.rglob("*.py"):
        if path.name == "terminal.py":
            continue
        calls = [n.func for n in ast.walk(ast.parse(path.read_text())) if isinstance(n, ast.Call)]
        assert "print" not in {call.id for call in calls if isinstance(call, ast.Name)}, path
