"""What is stored for an image: its bytes, new bytes, or a reason. PIL and DALI are the judges."""

import io
import re
import struct
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest
from PIL import Image
from tars import encoded

from fastmoco.pack import image as check
from fastmoco.pack.image import Checked, Rules, check_image, check_input, without_warnings
from fastmoco.pack.inputs import File
from fastmoco.pack.inputs import Pixels as RawPixels

Pixels = npt.NDArray[np.uint8]
Picture = Callable[..., Image.Image]


@pytest.fixture(autouse=True)
def _as_in_a_worker() -> Iterator[None]:
    with without_warnings():
        yield


def pixels(content: bytes) -> Pixels:
    with Image.open(io.BytesIO(content)) as image:
        return np.asarray(image.convert("RGB"))


def rotated(image: Image.Image, format: str, orientation: int = 6) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    return encoded(image, format, exif=exif)


def checked(content: bytes) -> Checked:
    result = check_image(content)
    assert isinstance(result, Checked), result
    return result


def dali_pixels(contents: list[bytes]) -> list[Pixels]:
    """Decode as training does, but singly: DALI 2.4 now and then crashes on a bad one of many."""
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline

    pipeline = Pipeline(batch_size=1, num_threads=1, device_id=None, prefetch_queue_depth=1)
    with pipeline:
        encoded = fn.external_source(name="encoded")
        pipeline.set_outputs(fn.decoders.image(encoded, device="cpu", adjust_orientation=False))
    pipeline.build()
    decoded = []
    for content in contents:
        pipeline.feed_input("encoded", [np.frombuffer(content, dtype=np.uint8)])
        decoded.append(np.array(pipeline.run()[0].at(0)))
    return decoded


def kept_kinds(image: Image.Image) -> dict[str, bytes]:
    return {
        "jpeg": encoded(image, "JPEG"),
        "jpeg 4:4:4": encoded(image, "JPEG", subsampling="4:4:4"),
        "jpeg progressive": encoded(image, "JPEG", progressive=True),
        "jpeg gray": encoded(image.convert("L"), "JPEG"),
        "jpeg upright exif": rotated(image, "JPEG", orientation=1),
        "jpeg and preview": encoded(image, "MPO", save_all=True, append_images=[image]),
        "png": encoded(image, "PNG"),
        "png gray": encoded(image.convert("L"), "PNG"),
        "png alpha": encoded(with_alpha(image), "PNG"),
        "png gray alpha": encoded(with_alpha(image).convert("LA"), "PNG"),
        "png palette": encoded(image.quantize(200), "PNG"),
        "png transparent palette": encoded(image.quantize(200), "PNG", transparency=3),
        "webp": encoded(image, "WEBP"),
        "webp lossless": encoded(image, "WEBP", lossless=True),
        "webp alpha": encoded(with_alpha(image), "WEBP", lossless=True),
    }


def with_alpha(image: Image.Image) -> Image.Image:
    image = image.copy()
    image.putalpha(Image.linear_gradient("L").resize(image.size))
    return image


def reencoded_kinds(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    frames = {"save_all": True, "append_images": [image.rotate(90)]}
    return {
        "animated gif": (encoded(image, "GIF", **frames), "png"),
        "animated webp": (encoded(image, "WEBP", lossless=True, **frames), "png"),
        "animated png": (encoded(image, "PNG", **frames), "png"),
        "pages": (encoded(image, "TIFF", **frames), "png"),
        "rotated jpeg": (rotated(image, "JPEG"), "jpg"),
        "rotated gray jpeg": (rotated(image.convert("L"), "JPEG"), "jpg"),
        "cmyk jpeg": (encoded(image.convert("CMYK"), "JPEG"), "jpg"),
        "rotated png": (rotated(image, "PNG"), "png"),
        "rotated webp": (rotated(image, "WEBP"), "png"),
        "1-bit png": (encoded(image.convert("1"), "PNG"), "png"),
        "4-bit png": (encoded(image.quantize(16), "PNG"), "png"),
        "png with a damaged end": (encoded(image, "PNG")[:-1] + b"?", "png"),
        "bmp": (encoded(image, "BMP"), "png"),
        "tiff": (encoded(image, "TIFF"), "png"),
        "gif": (encoded(image, "GIF"), "png"),
        "ppm": (encoded(image, "PPM"), "png"),
    }


def test_bytes_are_kept_where_the_decoder_is_sure(make_picture: Picture) -> None:
    kinds = kept_kinds(make_picture(1))
    results = {kind: checked(content) for kind, content in kinds.items()}
    for kind, content in kinds.items():
        assert results[kind].content == content, kind
        assert results[kind].extension == {"j": "jpg", "p": "png", "w": "webp"}[kind[0]], kind
        assert results[kind].progressive == (kind == "jpeg progressive"), kind
    for kind, found in zip(kinds, dali_pixels(list(kinds.values())), strict=True):
        np.testing.assert_array_equal(found, pixels(kinds[kind]), err_msg=kind)


def test_everything_else_is_reencoded_into_a_kept_kind(make_picture: Picture) -> None:
    kinds = reencoded_kinds(make_picture(1))
    results = [checked(content) for content, _ in kinds.values()]
    for (kind, (content, extension)), result in zip(kinds.items(), results, strict=True):
        assert result.content != content and result.extension == extension, kind
        assert checked(result.content).content == result.content, kind
        if extension == "png" and not kind.startswith("rotated") and "end" not in kind:
            np.testing.assert_array_equal(pixels(result.content), pixels(content), err_msg=kind)
    for result, found in zip(results, dali_pixels([r.content for r in results]), strict=True):
        np.testing.assert_array_equal(found, pixels(result.content))


@pytest.mark.parametrize("orientation", range(2, 9))
def test_rotation_is_baked_in(make_picture: Picture, orientation: int) -> None:
    image = make_picture(1)
    turns = [Image.Transpose(number) for number in (0, 3, 1, 5, 4, 6, 2)]
    upright = np.asarray(image.transpose(turns[orientation - 2]))
    result = checked(rotated(image, "PNG", orientation))
    np.testing.assert_array_equal(pixels(result.content), upright)
    assert (result.height, result.width) == upright.shape[:2]


def test_rotated_jpeg_stays_close_and_full_chroma(make_picture: Picture) -> None:
    content = rotated(make_picture(1), "JPEG", 3)
    result = checked(content)
    difference = pixels(result.content)[::-1, ::-1].astype(int) - pixels(content)
    assert np.abs(difference).mean() < 1.5
    with Image.open(io.BytesIO(result.content)) as image:
        assert {layer[1:3] for layer in image.layer} == {(1, 1)}  # type: ignore[attr-defined]


@pytest.mark.parametrize("format", ["PNG", "TIFF"])
def test_sixteen_bit_gray_is_rounded(format: str) -> None:
    values = np.arange(65536, dtype=np.uint16).reshape(256, 256)
    result = checked(encoded(Image.fromarray(values), format))
    expected = np.rint(values / 257).astype(np.uint8)
    np.testing.assert_array_equal(pixels(result.content)[..., 0], expected)


def test_damaged_exif_is_no_rotation(make_picture: Picture) -> None:
    content = encoded(make_picture(1), "JPEG", exif=b"Exif\0\0garbage that is not a TIFF")
    assert checked(content).content == content


def test_only_regular_huffman_coded_jpeg_is_kept(make_picture: Picture) -> None:
    content = encoded(make_picture(1), "JPEG")
    assert check._frame_marker(content) == check.BASELINE
    assert check._frame_marker(content.replace(b"\xff\xc0", b"\xff\xc9")) == 0xC9  # arithmetic
    filled = content.replace(b"\xff\xc0", b"\xff\xff\xff\xc0")  # fill bytes are legal
    assert checked(filled).content == filled
    strayed = content.replace(b"\xff\xc0", b"?\xff\xc0")  # and stray ones are not
    assert check._frame_marker(strayed) == 0
    assert checked(strayed).content not in (strayed, content)
    assert check._frame_marker(b"\xff\xd8" + b"\xff" * 9) == 0


def test_sums_are_exact(make_picture: Picture) -> None:
    for content in kept_kinds(make_picture(2)).values():
        result, values = checked(content), pixels(content).astype(np.int64)
        assert (result.height, result.width) == values.shape[:2]
        assert result.statistics
        assert result.statistics.pixels == values.shape[0] * values.shape[1]
        assert result.statistics.sums == tuple(values.sum(axis=(0, 1)))
        assert result.statistics.squares == tuple((values**2).sum(axis=(0, 1)))


def png_header(width: int, height: int) -> bytes:
    """A PNG that is only a header: what it claims costs nothing."""
    header = b"IHDR" + struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    chunk = struct.pack(">I", 13) + header + struct.pack(">I", zlib.crc32(header))
    return b"\x89PNG\r\n\x1a\n" + chunk + struct.pack(">I", 0) + b"IDAT" + b"\0" * 4


def refused(image: Image.Image) -> dict[str, tuple[bytes, str]]:
    jpeg, png = encoded(image, "JPEG"), encoded(image, "PNG")
    damaged = bytearray(png)
    damaged[-14] ^= 1  # behind the last pixel, in the checksum: only libpng minds
    return {
        "nothing": (b"", "not an image"),
        "text": (b"<html>not found</html>" * 9, "not an image"),
        "other format": (encoded(image, "ICO"), "not an image"),
        "cut jpeg": (jpeg[: len(jpeg) // 2], "cannot be decoded"),
        "cut png": (png[: len(png) // 2], "cannot be decoded"),
        "damaged png": (bytes(damaged), "cannot be decoded"),
        "huge": (png_header(10_001, 10_000), "more than 100 million pixels"),
        "bomb": (png_header(60_000, 60_000), "more than 100 million pixels"),
        "long": (png_header(65_536, 9), "a side of more than 65535"),
    }


def test_what_cannot_be_stored_has_a_reason(make_picture: Picture) -> None:
    for kind, (content, reason) in refused(make_picture(1)).items():
        result = check_image(content)
        assert isinstance(result, str), kind
        assert re.search(reason, result), (kind, result)
        assert check_image(content) == result, kind  # no address of an object in the words


def test_limits(make_picture: Picture) -> None:
    content = encoded(make_picture(1, (9, 7)), "PNG")
    assert isinstance(check_image(content, Rules(min_side=7, max_pixels=63)), Checked)
    assert check_image(content, Rules(min_side=8)) == "is 9 x 7, smaller than 8 pixels"
    assert check_image(content, Rules(max_pixels=62)) == "has more than 6.2e-05 million pixels"


def check_file(path: Path, rules: Rules = Rules()) -> Checked | str:
    return check_input(File(str(path)), rules, measure=True)


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    assert check_file(tmp_path / "gone.png") == "cannot be read (No such file or directory)"
    (tmp_path / "big.png").write_bytes(b"x" * (2**20 + 1))
    assert check_file(tmp_path / "big.png", Rules(max_bytes=2**20)) == "is larger than 1 MiB"


def test_the_extension_of_the_file_means_nothing(tmp_path: Path, make_picture: Picture) -> None:
    (tmp_path / "a.jpg").write_bytes(encoded(make_picture(1), "PNG"))
    result = check_file(tmp_path / "a.jpg")
    assert isinstance(result, Checked) and result.extension == "png"


@pytest.mark.parametrize("mode", ["RGB", "L"])
def test_raw_pixels_are_stored_losslessly(make_picture: Picture, mode: str) -> None:
    values = np.asarray(make_picture(4).convert(mode))
    result = check_input(RawPixels(values), Rules(), measure=False)
    assert isinstance(result, Checked) and result.extension == "png"
    with Image.open(io.BytesIO(result.content)) as image:
        np.testing.assert_array_equal(np.asarray(image), values)


@pytest.mark.parametrize("size", [(90, 60), (60, 90), (61, 61)])
def test_a_shrunk_image_is_pils_antialiased_resize(
    make_picture: Picture, size: tuple[int, int]
) -> None:
    picture = make_picture(5, size)
    result = check_image(encoded(picture, "PNG"), Rules(short_side=30, quality=95))
    assert isinstance(result, Checked) and result.extension == "jpg"
    expected = tuple(round(side * 30 / min(size)) for side in size)
    assert (result.width, result.height) == expected
    resized = picture.resize(expected, Image.Resampling.BILINEAR)
    assert result.content == encoded(resized, "JPEG", quality=95, subsampling="4:2:0")
    assert result.statistics and result.statistics.pixels == expected[0] * expected[1]


def test_a_large_jpeg_is_shrunk_close_to_its_full_decode(make_picture: Picture) -> None:
    """The scaled decode that comes first must not show."""
    content = encoded(make_picture(6, (640, 480)), "JPEG", quality=95)
    result = check_image(content, Rules(short_side=100, quality=95))
    assert isinstance(result, Checked)
    full = Image.fromarray(pixels(content)).resize((133, 100), Image.Resampling.BILINEAR)
    assert np.abs(pixels(result.content).astype(int) - np.asarray(full)).mean() < 2


def test_shrinking_turns_and_leaves_small_images_alone(make_picture: Picture) -> None:
    rules = Rules(short_side=30)
    turned = check_image(rotated(make_picture(1, (80, 60)), "JPEG"), rules)
    assert isinstance(turned, Checked) and (turned.width, turned.height) == (30, 40)
    small = encoded(make_picture(1, (80, 30)), "JPEG")
    kept = check_image(small, rules)
    assert isinstance(kept, Checked) and kept.content == small


@pytest.mark.parametrize("size", [(90, 60), (61, 90), (20, 25)])
def test_a_square_is_the_middle_resized(make_picture: Picture, size: tuple[int, int]) -> None:
    """Of larger and of smaller images; what has the size keeps its bytes."""
    picture, side = make_picture(5, size), min(size)
    result = check_image(encoded(picture, "PNG"), Rules(square=30, quality=95))
    assert isinstance(result, Checked) and (result.width, result.height) == (30, 30)
    left, top = (size[0] - side) // 2, (size[1] - side) // 2
    middle = picture.crop((left, top, left + side, top + side))
    resized = middle.resize((30, 30), Image.Resampling.BILINEAR)
    assert result.content == encoded(resized, "JPEG", quality=95, subsampling="4:2:0")
    kept = check_image(result.content, Rules(square=30))
    assert isinstance(kept, Checked) and kept.content == result.content


def test_the_scaled_check_refuses_the_same_files(make_picture: Picture) -> None:
    """Images whose pixels are not measured are decoded at an eighth of their size."""
    noise = np.random.default_rng(0).integers(0, 256, (300, 300, 3), dtype=np.uint8)
    picture = Image.blend(make_picture(1, (300, 300)), Image.fromarray(noise), 0.2)
    generator, verdicts = np.random.default_rng(3), []
    for kind in ({}, {"progressive": True}, {"restart_marker_blocks": 4}, {"subsampling": 0}):
        content = encoded(picture, "JPEG", **kind)
        for trial in range(120):
            damaged = bytearray(content)
            for at in generator.integers(2, len(content), generator.integers(0, 3)):
                damaged[at] = generator.integers(256)
            cut = generator.integers(1, len(content) + 1) if trial % 2 else len(content)
            full = check_image(bytes(damaged[:cut]), measure=True)
            scaled = check_image(bytes(damaged[:cut]), measure=False)
            assert isinstance(full, str) == isinstance(scaled, str), (kind, trial, full, scaled)
            if isinstance(full, Checked) and isinstance(scaled, Checked):
                assert full.content == scaled.content and scaled.statistics is None
                assert (full.height, full.width) == (scaled.height, scaled.width)
            verdicts.append(isinstance(full, str))
    assert 100 < sum(verdicts) < 400  # both kinds are many


def webps_with_exif(make_picture: Picture) -> list[bytes]:
    exif = Image.Exif()
    exif[0x010E] = "taken on holiday"
    images = [make_picture(seed, (33 + seed, 40)) for seed in range(6)]
    images += [with_alpha(image) for image in images]
    options = [{}, {"lossless": True}, {"icc_profile": b"odd"}, {"xmp": b"<odd/>1"}]
    return [encoded(i, "WEBP", exif=exif, **some) for i in images for some in options]  # type: ignore[arg-type]


def test_webp_with_exif_is_kept_where_dali_reads_it(make_picture: Picture) -> None:
    contents = webps_with_exif(make_picture)
    stored = [checked(content).content for content in contents]
    kept = sum(a == b for a, b in zip(contents, stored, strict=True))
    assert 0 < kept < len(contents)  # both kinds occur
    for content, found in zip(stored, dali_pixels(stored), strict=True):
        np.testing.assert_array_equal(found, pixels(content))


@pytest.mark.parametrize(
    "kind", ["jpeg", "jpeg progressive", "png", "png alpha", "webp", "webp lossless", "webp exif"]
)
def test_whatever_passes_decodes_in_dali(make_picture: Picture, kind: str) -> None:
    """One image that DALI cannot decode kills its batch: damage at random must not get there."""
    kinds = kept_kinds(make_picture(3)) | {"webp exif": webps_with_exif(make_picture)[1]}
    content, generator = kinds[kind], np.random.default_rng(7)
    passed = []
    for trial in range(300):
        damaged = bytearray(content)
        start = len(content) - 40 if trial % 2 else 0  # decoders differ most about the end
        for at in generator.integers(start, len(content), generator.integers(1, 4)):
            damaged[at] = generator.integers(256)
        cut = generator.integers(1, len(content)) if trial % 4 == 0 else len(content)
        result = check_image(bytes(damaged[:cut]))
        if isinstance(result, Checked):
            passed.append(result.content)
    assert passed
    for stored, found in zip(passed, dali_pixels(passed), strict=True):
        np.testing.assert_array_equal(found, pixels(stored))
