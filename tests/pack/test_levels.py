"""Images of more than 8 bits: mapped by levels that fit the set, or refused with those levels."""

import json
import re
import struct
import tarfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tars import encoded

RunCommand = Callable[..., tuple[int, str, str]]
Values = npt.NDArray[Any]


def values(seed: int) -> Values:
    """Smooth values in 0..1, all of it."""
    coarse = np.random.default_rng(seed).random((5, 6)).astype(np.float32)
    found = np.asarray(Image.fromarray(coarse).resize((48, 40), Image.Resampling.BILINEAR))
    return (found - found.min()) / (found.max() - found.min())


def write(folder: Path, encode: Callable[[Values], bytes], suffix: str, scale: float, low: float):
    for name in "ab":
        for number in range(6):
            path = folder / name / f"{number}{suffix}"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(encode(real(path, scale, low)))
    return folder


def real(path: Path, scale: float, low: float) -> Values:
    return low + (scale - low) * values(100 * ord(path.parent.name) + int(path.stem))


def png(v: Values) -> bytes:
    return encoded(Image.fromarray(np.rint(v).astype(np.uint16)), "PNG")


def tiff(v: Values) -> bytes:
    return encoded(Image.fromarray(np.rint(v).astype(np.uint16)), "TIFF")


def whole(v: Values) -> bytes:
    return encoded(Image.fromarray(np.rint(v).astype(np.int32)), "TIFF")


def floating(v: Values) -> bytes:
    return encoded(Image.fromarray(v.astype(np.float32)), "TIFF")


def hot(v: Values) -> bytes:
    """One pixel is broken."""
    array = np.rint(v).astype(np.uint16)
    array[3, 3] = 65535
    return encoded(Image.fromarray(array), "TIFF")


def color(v: Values) -> bytes:
    """A 16-bit RGB PNG, which PIL does not write: all colors alike."""
    lines = (b"\0" + row.repeat(3).astype(">u2").tobytes() for row in np.rint(v))
    header = struct.pack(">IIBBBBB", v.shape[1], v.shape[0], 16, 2, 0, 0, 0)
    parts = ((b"IHDR", header), (b"IDAT", zlib.compress(b"".join(lines))), (b"IEND", b""))
    chunks = (
        struct.pack(">I", len(c)) + n + c + struct.pack(">I", zlib.crc32(n + c)) for n, c in parts
    )
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunks)


def pgm(v: Values) -> bytes:
    return b"P5 48 40 65535\n" + np.rint(v).astype(">u2").tobytes()


def ppm(v: Values) -> bytes:
    return b"P6 48 40 65535\n" + np.rint(v).repeat(3).astype(">u2").tobytes()


def stored(folder: Path) -> Iterator[tuple[str, Values]]:
    names = (folder / "names.txt").read_text().splitlines()
    with tarfile.open(folder / "shard-000000.tar") as tar:
        images = [tar.extractfile(m) for m in tar.getmembers() if m.name.endswith("png")]
        for name, stream in zip(names, images, strict=True):
            assert stream
            yield name, np.asarray(Image.open(stream).convert("L")).astype(float)


REFUSED = [
    (png, ".png", 4080, 0, "16-bit gray images use 0 to 4080 of 0 to 65535", (0, 4095)),
    (tiff, ".tif", 255, 0, "16-bit gray images use 0 to 255 of", (0, 255)),
    (png, ".png", 36000, 31000, "16-bit gray images use 31000 to 36000", (31000, 36000)),
    (hot, ".tif", 4080, 0, "16-bit gray images use", (0, 4095)),
    (color, ".png", 4080, 0, "16-bit color images use 0 to", (0, 4095)),
    (pgm, ".pgm", 4080, 0, "16-bit gray images use 0 to 4080", (0, 4095)),
    (floating, ".tif", 1, 0, "32-bit floating-point images hold 0 to 1,", (0, 1)),
    (floating, ".tif", 250, -50, "32-bit floating-point images hold -50 to 250,", (-50, 250)),
    (whole, ".tif", 3000, -1000, "32-bit images hold -1000 to 3000,", (-1000, 3000)),
]


@pytest.mark.parametrize(("encode", "suffix", "scale", "low", "words", "levels"), REFUSED)
def test_values_without_a_range_stop_with_levels_that_work(
    run: RunCommand,
    encode: Callable[[Values], bytes],
    suffix: str,
    scale: float,
    low: float,
    words: str,
    levels: tuple[float, float],
    tmp_path: Path,
) -> None:
    source = write(tmp_path / "source", encode, suffix, scale, low)
    pack = ("shard", source, tmp_path / "set", "--workers", 1)
    code, _, err = run(*pack)
    assert code == 3 and words in err and "Nothing was packed" in err
    assert not (tmp_path / "set").exists()
    said = re.findall(r"--levels (\S+)", err)[-1]
    assert tuple(map(float, said.split(":"))) == pytest.approx(levels, abs=1e-3)
    code, _, err = run(*pack, "--levels", said)
    assert code == 0, err
    for name, found in stored(tmp_path / "set"):
        wanted = (real(source / name, scale, low) - levels[0]) * 255 / (levels[1] - levels[0])
        found[3, 3] = wanted[3, 3]
        np.testing.assert_allclose(found, wanted, atol=0.6)


@pytest.mark.parametrize(("encode", "suffix"), [(png, ".png"), (pgm, ".pgm"), (color, ".png")])
def test_values_that_fill_their_range_are_packed(
    run: RunCommand, encode: Callable[[Values], bytes], suffix: str, tmp_path: Path
) -> None:
    source = write(tmp_path / "source", encode, suffix, 20_000, 0)
    code, _, err = run("shard", source, tmp_path / "set", "--workers", 1)
    assert code == 0, err
    for name, found in stored(tmp_path / "set"):
        np.testing.assert_allclose(found, real(source / name, 20_000, 0) / 257, atol=1.1)


def test_a_value_that_is_no_number_is_left_out(run: RunCommand, tmp_path: Path) -> None:
    source = write(tmp_path / "source", floating, ".tif", 1, 0)
    broken = values(7)
    broken[0, 0] = np.nan
    (source / "a" / "0.tif").write_bytes(floating(broken))
    code, out, err = run("shard", source, tmp_path / "set", "--workers", 1, "--levels", "0:1")
    assert code == 0 and "'a/0.tif' holds values that are not finite" in out, err
    (source / "a" / "0.tif").write_bytes(ppm(4080 * values(1)))
    code, out, err = run("shard", source, tmp_path / "third", "--workers", 1, "--levels", "0:1")
    assert (
        code == 0 and "is 16-bit color in a PPM: for --levels or --gray, save it as PNG" in out
    ), err
    for wrong in ("1:0", "a:b", "0", "0:nan", "0:inf"):
        code, _, err = run("shard", source, tmp_path / "other", "--levels", wrong)
        assert code == 2 and f"--levels {wrong}: write LOW:HIGH" in err


def test_a_channel_that_is_the_same_everywhere_has_a_deviation_of_1(
    run: RunCommand, tmp_path: Path
) -> None:
    for name in "ab":
        for number in range(3):
            rgb = np.zeros((8, 8, 3), np.uint8)
            rgb[..., 1] = np.random.default_rng(number).integers(0, 200, (8, 8))
            (tmp_path / "source" / name).mkdir(parents=True, exist_ok=True)
            Image.fromarray(rgb).save(tmp_path / "source" / name / f"{number}.png")
    code, _, err = run("shard", tmp_path / "source", tmp_path / "set", "--workers", 1)
    assert code == 0 and "all pixels of all images have one value of red and blue: the dev" in err
    manifest = json.loads((tmp_path / "set" / "manifest.json").read_text())
    assert manifest["std"][0] == manifest["std"][2] == 1 and 0 < manifest["std"][1] < 0.5
