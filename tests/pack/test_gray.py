"""Sets of one channel: what is stored, bit for bit, and what the manifest says of it."""

import io
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tars import encoded

from fastmoco.core.gray import as_shown
from fastmoco.dataset.manifest import Manifest
from fastmoco.dataset.reader import Reader
from fastmoco.dataset.shard_set import ConcatShardSets, ShardSet
from fastmoco.pack.inspect import contact_sheet
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pack.verify import verify

from .test_levels import color, floating, png, values

Make = Callable[..., Path]


def stored(root: Path, **options: object) -> tuple[Manifest, dict[str, bytes]]:
    """Pack `root/in` into `root/set`; return its manifest and its images by their names."""
    pack(root / "in", root / "set", PackOptions(gray=True, **options))
    one = ShardSet(root / "set")
    images = Reader(ConcatShardSets([one])).fetch(np.arange(len(one)))
    return one.manifest, {one.get_name(i): image.tobytes() for i, image in enumerate(images)}


def opened(content: bytes) -> Image.Image:
    image = Image.open(io.BytesIO(content))
    image.load()
    return image


@pytest.fixture
def mixed(tmp_path: Path, make_picture: Callable[..., Image.Image]) -> dict[str, bytes]:
    """Images of every kind in `tmp_path/in`, by their names."""
    wide, picture = 65535 * values(1), make_picture(3)
    files = {
        "deep.png": png(wide),
        "deep.tif": encoded(Image.fromarray(np.rint(wide).astype(np.uint16)), "TIFF"),
        "color16.png": color(wide),
        "gray.jpg": encoded(picture.convert("L"), "JPEG"),
        "gray.png": encoded(picture.convert("L"), "PNG"),
        "alpha.png": encoded(picture.convert("LA"), "PNG"),
        "bits.png": encoded(picture.convert("1"), "PNG"),
        "color.jpg": encoded(picture, "JPEG"),
        "color.png": encoded(picture, "PNG"),
        "color.webp": encoded(picture, "WEBP"),
    }
    (tmp_path / "in").mkdir()
    for name, content in files.items():
        (tmp_path / "in" / name).write_bytes(content)
    return files


def test_gray_is_kept_and_color_becomes_gray(mixed: dict[str, bytes], tmp_path: Path) -> None:
    manifest, images = stored(tmp_path)
    kept = {name for name in mixed if images[name] == mixed[name]}
    assert kept == {"deep.png", "gray.jpg", "gray.png", "alpha.png"}
    deep = np.rint(65535 * values(1))
    for name in ("deep.png", "deep.tif"):
        assert np.array_equal(np.asarray(opened(images[name])), deep)
    assert np.abs(np.asarray(opened(images["color16.png"])) - deep).max() <= 1
    modes = {name: opened(image).mode for name, image in images.items()}
    assert {modes.pop(name) for name in ("deep.png", "deep.tif", "color16.png")} == {"I;16"}
    assert modes.pop("alpha.png") == "LA" and set(modes.values()) == {"L"}
    for name in ("color.png", "color.webp"):
        wanted = np.asarray(opened(mixed[name]).convert("RGB").convert("L"))
        assert np.array_equal(np.asarray(opened(images[name])), wanted)
    assert (manifest.channels, manifest.bits, manifest.format_version) == (1, 16, 2)
    assert verify(tmp_path / "set", full=True) == []
    # Against numpy, on levels of 0..1.
    levels = [
        np.asarray(image).astype(float).ravel() / 65535
        if image.mode == "I;16"
        else np.asarray(image.convert("L")).astype(float).ravel() / 255
        for image in map(opened, images.values())
    ]
    assert manifest.mean == pytest.approx([np.concatenate(levels).mean()], abs=1e-12)
    assert manifest.std == pytest.approx([np.concatenate(levels).std()], abs=1e-12)


def test_eight_bits_stay_eight(make_images: Make, tmp_path: Path) -> None:
    make_images(tmp_path / "in", extension="png")
    manifest, _ = stored(tmp_path)
    pack(tmp_path / "in", tmp_path / "colors", PackOptions())
    colors = ShardSet(tmp_path / "colors").manifest
    assert (manifest.bits, len(manifest.mean)) == (8, 1) and manifest.set_id != colors.set_id
    # What an older fastmoco reads has no word that it does not know.
    written = json.loads((tmp_path / "colors/manifest.json").read_bytes())
    assert written["format_version"] == 1 and not {"channels", "bits"} & written.keys()
    assert "gray" not in written["options"]


def test_levels_are_of_sixteen_bits(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    (tmp_path / "in/a.png").write_bytes(png(4095 * values(1)))
    (tmp_path / "in/b.tif").write_bytes(floating(4095 * values(2)))
    manifest, images = stored(tmp_path, levels=(0, 4095))
    for name, exact in (("a.png", np.rint(4095 * values(1))), ("b.tif", 4095 * values(2))):
        found = np.asarray(opened(images[name])).astype(float)
        assert np.abs(found - exact * 65535 / 4095).max() <= 0.51
    assert len(np.unique(np.asarray(opened(images["a.png"])))) > 256 and manifest.bits == 16


@pytest.mark.parametrize("options", [{"square": 20}, {"short_side": 20}])
def test_resized_images_keep_their_bits(options: dict[str, int], tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    array = np.rint(65535 * values(1))  # 40 x 48
    (tmp_path / "in/a.png").write_bytes(png(array))
    _, images = stored(tmp_path, **options)
    small = opened(images["a.png"])
    cut = array[:, 4:44] if "square" in options else array
    wanted = Image.fromarray(cut.astype(np.float32)).resize(small.size, Image.Resampling.BILINEAR)
    assert small.mode == "I;16" and min(small.size) == 20
    assert np.abs(np.asarray(small) - np.asarray(wanted)).max() <= 0.51


def test_few_levels_are_shown_from_black_to_white(tmp_path: Path) -> None:
    (tmp_path / "in").mkdir()
    stripes = np.tile(np.uint16([30000, 30100]), (32, 16))
    Image.fromarray(stripes).save(tmp_path / "in/a.png")
    stored(tmp_path, levels=(0, 65535))
    contact_sheet(tmp_path / "set", tmp_path / "sheet.png")
    cell = np.asarray(Image.open(tmp_path / "sheet.png").convert("L"))[8:136, 8:136]
    assert np.ptp(cell) == 85  # two of six deviations
    # Where they are many, a level is shown as itself.
    assert as_shown(np.array([0, 0.5, 1]), 0.5, 0.3).tolist() == [0, 128, 255]
