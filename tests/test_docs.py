"""README and docs: links lead somewhere, commands and options exist, keys are of the schema."""

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer
from PIL import Image

from fastmoco.cli import app, main
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


TOY = [
    *("encoder.arch=resnet10", "encoder.stem=small-stride2", "encoder.image_size=32"),
    *("encoder.dim=16", "batch=8", "objective.bn_group=4", "objective.queue=64"),
    *("schedule.epochs=1", "runtime.device=cpu", "runtime.log_every=1", "monitor=null"),
]
FOR_TOYS = {
    "pretrain": TOY,
    "bench": [*TOY, "--steps", "2"],
    "probe": ["--epochs", "2", "--device", "cpu"],
    "report": ["--device", "cpu"],
}
NOT_HERE = {
    "git clone": "a network",
    "pip install": "a network",
    "make demo": "two minutes; tests/demo runs its parts",
}


def commands(page: Path) -> list[str]:
    """Return the commands of a page's indented blocks, in order."""
    text = page.read_text().replace("\\\n", " ")
    blocks = re.findall(r"^    (.+)$", text, re.MULTILINE)
    programs = r"(fastmoco|torchrun|git|pip|make|python) "
    return [line for line in blocks if re.match(programs, line)]


def run(command: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    """Run a command in this process: dozens of starts of Python would cost minutes."""
    program, *words = shlex.split(command, comments=True)
    if program == "fastmoco":
        words = [program, *words, *FOR_TOYS.get(words[0], ())]
        monkeypatch.setattr(sys, "argv", words)
        try:
            code = main()
        except SystemExit as end:
            code = end.code
        out, err = capsys.readouterr()
    else:
        if program == "torchrun":
            assert words[0] == "--nproc_per_node=8"
            ranks = ["--standalone", "--nproc_per_node=2"]
            launcher = [sys.executable, "-m", "torch.distributed.run"]
            words = [*launcher, *ranks, str(ROOT / words[1]), *words[2:], *TOY]
        else:
            assert program == "sed"
            words = ["bash", "-c", command]
        done = subprocess.run(words, capture_output=True, text=True, timeout=600)
        code, out, err = done.returncode, done.stdout, done.stderr
    assert not code, (command, out[-500:], err[-2000:])
    assert "Traceback" not in err


@pytest.mark.slow
@pytest.mark.parametrize(
    ("page", "made"),
    [
        ("README.md", ["photos/train", "photos/test"]),
        ("docs/quick-start.md", ["photos", "labelled/train", "labelled/test"]),
    ],
)
def test_the_commands_run_one_after_the_other(
    page, made, make_images, tmp_path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    for number, folder in enumerate(made):
        make_images(tmp_path / folder, ("cat", "dog"), 8 + number, (40, 48), "jpg")
    if "labelled/train" in made:
        for split, like in (("train", []), ("test", ["--like", "data/train"])):
            command = shlex.join(["fastmoco", "shard", f"labelled/{split}", f"data/{split}", *like])
            run(command, monkeypatch, capsys)
    for command in commands(ROOT / page):
        if not any(command.startswith(known) for known in NOT_HERE):
            run(command, monkeypatch, capsys)


@pytest.mark.slow
@pytest.mark.timeout(1800)  # a dozen commands, three minutes on a busy machine
def test_the_walk_through_runs(tmp_path: Path, monkeypatch, capsys) -> None:
    """On fewer patches, of two colors; the commands but for their sizes."""
    monkeypatch.chdir(tmp_path)
    random = np.random.default_rng(0)
    for split, count in (("train", 40), ("test", 8)):
        for label, color in (("red", (200, 60, 40)), ("blue", (40, 60, 200))):
            folder = tmp_path / "demo" / "patches" / split / label
            folder.mkdir(parents=True)
            for number in range(count):
                levels = color + random.normal(0, 20, (40, 40, 3))
                image = Image.fromarray(levels.clip(0, 255).astype(np.uint8))
                image.save(folder / f"{number}.png")
    _, section = (ROOT / "docs" / "few-labels.md").read_text().split("## A walk-through")
    lines = re.findall(r"^    (.+)$", section, re.MULTILINE)
    assert len(lines) == 13
    for line in lines:
        if line == "fastmoco demo":  # minutes; tests/demo runs its parts
            continue
        smaller = line.replace("--budget 152", "--budget 64").replace(
            "100 --batch 64", "3 --batch 16"
        )
        run(smaller, monkeypatch, capsys)
    assert (tmp_path / "runs" / "mine" / "report" / "report.html").stat().st_size > 0
