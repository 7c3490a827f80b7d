"""README and docs: links lead somewhere, commands and options exist, keys are of the schema."""

import re
from pathlib import Path

import pytest
import typer

from fastmoco.cli import app
from fastmoco.config.loading import load_recipe
from fastmoco.errors import UsageError

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
COMMANDS = typer.main.get_command(app).commands  # type: ignore[attr-defined]
CODE = re.compile(r"`([^`\n]+)`|^    (.+)$", re.MULTILINE)
OLD = "changelog.md"  # names what is gone


def pieces(page: Path) -> list[str]:
    return [inline or block for inline, block in CODE.findall(page.read_text())]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", page.read_text()):
        assert (page.parent / target).exists(), target


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != OLD], ids=lambda page: page.name)
def test_commands_and_their_options_exist(page: Path) -> None:
    for piece in pieces(page):
        for name, rest in re.findall(r"\bfastmoco ([a-z]+)\b([^`;|]*)", piece):
            if name not in COMMANDS:
                continue  # `import fastmoco`, `.venv/bin/fastmoco`, or words
            options = {option for p in COMMANDS[name].params for option in p.opts}
            for option in re.findall(r"(?<!\S)--[a-z-]+", rest):
                assert option in options | {"--dry-run", "--help"}, (piece, option)


@pytest.mark.parametrize("page", [p for p in PAGES if p.name != OLD], ids=lambda page: page.name)
def test_keys_are_of_the_schema(page: Path) -> None:
    for piece in pieces(page):
        for key, value in re.findall(
            r"(?<![-\w./])([a-z][\w.]*\.[\w.]+)=([\w.\[\]{}:, /-]*\w)", piece
        ):
            try:
                load_recipe("moco_v2_imagenet_r50", [f"{key}={value}"])
            except UsageError as error:
                assert "unknown key" not in str(error) and "no key" not in str(error), piece
                assert "does not name a key" not in str(error), piece
