"""What `inspect` says of a set, against plain counting; and the sheet of samples."""

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console

import fastmoco.pack.inspect as station
from fastmoco.dataset.shard_set import SAMPLE_DTYPE, ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.inspect import contact_sheet, inspect_set, show
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def mixed(make_images: Make, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """JPEGs and PNGs of three shapes; one input that is no image."""
    root = tmp_path_factory.mktemp("mixed")
    make_images(root / "in", ("cat", "dog"), 5, (300, 200))
    make_images(root / "in", ("cat", "a[b]ird"), 4, (32, 32), "png")
    make_images(root / "in", ("tall",), 3, (20, 90))
    (root / "in/cat/broken.jpg").write_bytes(b"x")
    pack(root / "in", root / "set", PackOptions())
    return ShardSet(root / "set")


def printed(root: Path) -> str:
    console = Console(file=io.StringIO(), width=100)
    show(inspect_set(root), console)
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def test_counts(mixed: ShardSet) -> None:
    found = inspect_set(mixed.root)
    assert (found.samples, found.rejected, found.shards, found.unlabelled) == (21, 1, 1, 0)
    assert found.classes == {"a[b]ird": 4, "cat": 9, "dog": 5, "tall": 3}
    assert found.formats == {"jpg": 13, "png": 8}
    assert found.bytes == (mixed.root / "shard-000000.tar").stat().st_size
    assert found.image_bytes == int(mixed.samples["size"].sum())
    assert found.options == mixed.manifest.options


def test_spreads_are_those_of_plain_counting(
    mixed: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(station, "CHUNK", 4)
    found = inspect_set(mixed.root)
    sides = sorted(np.minimum(mixed.samples["height"], mixed.samples["width"]).tolist())
    assert (found.short_sides.least, found.short_sides.most) == (20, 200)
    assert found.short_sides.median == sides[10]
    assert found.short_sides.bins == ((16, 32, 3), (32, 64, 8), (64, 128, 0), (128, 256, 10))
    sizes = sorted(mixed.samples["size"].tolist())
    assert (found.sizes.least, found.sizes.median, found.sizes.most) == (
        sizes[0],
        sizes[10],
        sizes[-1],
    )
    for low, high, count in found.sizes.bins:
        assert count == sum(low <= size < high for size in sizes)


@pytest.mark.parametrize("seed", range(5))
def test_the_median_is_exact_over_the_whole_range(
    mixed: ShardSet, monkeypatch: pytest.MonkeyPatch, seed: int
) -> None:
    random = np.random.default_rng(seed)
    rows = np.zeros(1 + seed * 7, dtype=SAMPLE_DTYPE)
    rows["size"] = np.exp(random.uniform(0, np.log(2**32 - 1), len(rows)))
    fake = ShardSet(mixed.root)
    monkeypatch.setattr(ShardSet, "samples", rows)
    monkeypatch.setattr(ShardSet, "__len__", lambda self: len(rows))
    found = station._spread(fake, lambda part: part["size"])
    ordered = sorted(rows["size"].tolist())
    assert found.median == ordered[(len(rows) - 1) // 2]
    assert sum(count for _, _, count in found.bins) == len(rows)


def test_what_is_printed(mixed: ShardSet) -> None:
    text = printed(mixed.root)
    assert "21, all labelled" in text and "jpg 13, png 8" in text
    assert "1, see rejects.jsonl" in text
    assert "a[b]ird" in text  # a name is not markup
    assert "short side, pixels: 20 to 200, median 32" in text
    lines = text.splitlines()
    bars = [line.count("#") for line in lines if re.match(r" *\d+ +- +\d+ ", line)]
    assert bars[:4] == [10, 26, 0, 32]  # of 3, 8, 0 and 10 samples
    assert max(map(len, lines)) <= 100


def test_many_classes_and_odd_names() -> None:
    classes = dict.fromkeys((f"c{number:02d}" for number in range(26)), 1) | {"c20": 9}
    rows = station._class_rows(classes)
    assert len(rows) == 21 and rows[-1] == ("and 6 more", "1 to 9")
    assert station.printable("z\x1b[31m\udcff\n") == r"z\x1b[31m\udcff\n"


def test_a_set_without_labels(make_images: Make, tmp_path: Path) -> None:
    pack(make_images(tmp_path / "in", (), 3), tmp_path / "set", PackOptions())
    text = printed(tmp_path / "set")
    assert "3, no label" in text and "\nclasses\n" not in text
    contact_sheet(tmp_path / "set", tmp_path / "sheet.png")
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG" and sheet.size[0] > sheet.size[1] / 2


def cells(path: Path) -> list[Image.Image]:
    with Image.open(path) as sheet:
        across, down = (sheet.width - 8) // 136, (sheet.height - 8) // 152
        corners = [(8 + x * 136, 8 + y * 152) for y in range(down) for x in range(across)]
        return [sheet.crop((x, y, x + 128, y + 128)) for x, y in corners]


def test_the_sheet_shows_the_samples_in_order(mixed: ShardSet, tmp_path: Path) -> None:
    contact_sheet(mixed.root, tmp_path / "sheet.png", count=21)
    found = cells(tmp_path / "sheet.png")
    assert len(found) == 25
    for row in range(21):
        with Image.open(mixed.root.parent / "in" / mixed.get_name(row)) as image:
            wanted = np.asarray(image.resize((16, 16)), dtype=float)
        cell = found[row]
        scale = 128 // max(image.size) or 128 / max(image.size)
        width, height = (round(side * scale) for side in image.size)
        left, top = (128 - width) // 2, (128 - height) // 2
        shown = cell.crop((left, top, left + width, top + height)).resize((16, 16))
        assert np.abs(np.asarray(shown, dtype=float) - wanted).mean() < 8, row
    assert all(np.asarray(cell).min() == 255 for cell in found[21:])


def test_the_choice_is_that_of_the_seed(mixed: ShardSet, tmp_path: Path) -> None:
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        contact_sheet(mixed.root, tmp_path / f"{name}.png", count=4, seed=seed)
    first, same, other = ((tmp_path / f"{name}.png").read_bytes() for name in "abc")
    assert first == same != other


def test_a_damaged_image_is_a_gray_cell(mixed: ShardSet, tmp_path: Path) -> None:
    root = Path(shutil.copytree(mixed.root, tmp_path / "copy"))
    with (root / "shard-000000.tar").open("r+b") as stream:
        stream.seek(int(mixed.samples["offset"][0]))
        stream.write(bytes(int(mixed.samples["size"][0])))
    contact_sheet(root, tmp_path / "sheet.png", count=21)
    assert np.unique(np.asarray(cells(tmp_path / "sheet.png")[0])).tolist() == [0xDD]


def test_what_is_refused(mixed: ShardSet, tmp_path: Path) -> None:
    with pytest.raises(DataError, match="not a shard set"):
        inspect_set(tmp_path)
    with pytest.raises(UsageError, match="cannot be written"):
        contact_sheet(mixed.root, tmp_path / "no/such/folder.png")
    root = Path(shutil.copytree(mixed.root, tmp_path / "copy"))
    (root / "shard-000000.idx").unlink()
    with pytest.raises(DataError, match="`fastmoco verify` tells more"):
        inspect_set(root)
