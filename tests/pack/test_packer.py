"""The bytes of a set: against tarfile, PIL, webdataset, DALI and wds2idx; and what stops a pack."""

import hashlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from fastmoco.core.rng import Stream, shuffled
from fastmoco.dataset.shard_set import ShardSet
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack, pack_sources, sources_for

Make = Callable[..., Path]

STALLED_PACK = """
import sys, time
from pathlib import Path
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

def stall(done, total):
    if done == 5:
        print("stalled", flush=True)
        time.sleep(120)

pack(Path(sys.argv[1]), Path(sys.argv[2]), PackOptions(workers=2), stall)
"""


def content_of(root: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in root.iterdir()}


def many_shards(make_images: Make, tmp_path: Path) -> ShardSet:
    """Two formats, three shards: about 2.6 MB of noise-free pictures under a bound of 1 MB."""
    source = make_images(tmp_path / "source", per_class=4, size=(600, 500), extension="png")
    make_images(source, ("eel", "fox"), per_class=6)
    pack(source, tmp_path / "set", PackOptions(shard_mb=1))
    return ShardSet(tmp_path / "set")


def test_tar_index_and_table_agree(make_images: Make, tmp_path: Path) -> None:
    shards = many_shards(make_images, tmp_path)
    assert len(shards.manifest.shards) > 1 and len(shards) == 20
    row = 0
    for number, shard in enumerate(shards.manifest.shards):
        path = shards.root / shard.name
        assert path.stat().st_size == shard.bytes <= 10**6
        assert hashlib.sha256(path.read_bytes()).hexdigest() == shard.sha256
        header, *lines = path.with_suffix(".idx").read_text().splitlines()
        assert header == f"v1.2 {shard.samples}" and len(lines) == shard.samples
        with tarfile.open(path) as tar:
            members = tar.getmembers()
            for line, pair in zip(
                lines, zip(members[::2], members[1::2], strict=True), strict=True
            ):
                check_sample(shards, row, number, tar, pair, line)
                row += 1
    assert row == len(shards)


def check_sample(
    shards: ShardSet,
    row: int,
    shard: int,
    tar: tarfile.TarFile,
    pair: tuple[tarfile.TarInfo, tarfile.TarInfo],
    line: str,
) -> None:
    label, image = pair
    sample, name = shards.samples[row], shards.get_name(row)
    parts = [(m.name.split(".")[1], m.offset_data, m.size, m.name) for m in pair]
    assert line == " ".join(str(field) for part in parts for field in part)
    assert [m.name.split(".")[0] for m in pair] == [f"{row:08d}"] * 2
    assert (sample["shard"], sample["offset"], sample["size"]) == (shard, *parts[1][1:3])
    content = tar.extractfile(image).read()  # type: ignore[union-attr]
    assert content == (shards.root.parent / "source" / name).read_bytes()
    assert int(sample["hash"]).to_bytes(8, "little") == hashlib.sha256(content).digest()[:8]
    assert tar.extractfile(label).read() == str(sample["label"]).encode()  # type: ignore[union-attr]
    assert shards.manifest.classes[sample["label"]] == name.split("/")[0]
    with Image.open(io.BytesIO(content)) as picture:
        assert picture.size == (sample["width"], sample["height"])


def test_tars_are_plain_ustar(small_set: ShardSet) -> None:
    raw = (small_set.root / small_set.manifest.shards[0].name).read_bytes()
    with tarfile.open(fileobj=io.BytesIO(raw)) as tar:
        for member in tar:
            assert member.type == tarfile.REGTYPE and not member.pax_headers and member.mtime == 0
            assert raw[member.offset + 257 : member.offset + 265] == b"ustar\x0000"
            assert member.offset_data == member.offset + 512


def test_the_index_is_that_of_wds2idx(small_set: ShardSet, tmp_path: Path) -> None:
    tool = Path(sys.executable).parent / "wds2idx"
    if not tool.exists():
        pytest.skip("DALI's wds2idx is not installed")
    tar = small_set.root / small_set.manifest.shards[0].name
    subprocess.run([sys.executable, tool, tar, tmp_path / "idx"], check=True, capture_output=True)
    assert tar.with_suffix(".idx").read_bytes() == (tmp_path / "idx").read_bytes()


@pytest.mark.filterwarnings("ignore::ResourceWarning")  # webdataset leaves its streams open
def test_stock_webdataset_reads_a_set(small_set: ShardSet) -> None:
    import webdataset

    url = str(small_set.root / small_set.manifest.shards[0].name)
    dataset = webdataset.WebDataset(url, shardshuffle=False, empty_check=False).decode("rgb8")
    samples = list(dataset)
    assert [int(sample["__key__"]) for sample in samples] == list(range(len(small_set)))
    assert [sample["cls"] for sample in samples] == small_set.labels().tolist()
    for row, sample in enumerate(samples):
        np.testing.assert_array_equal(sample["jpg"], original(small_set, row))


def original(shards: ShardSet, row: int) -> np.ndarray:
    with Image.open(shards.root.parent / "source" / shards.get_name(row)) as image:
        return np.asarray(image.convert("RGB"))


def test_dalis_own_reader_reads_a_set(make_images: Make, tmp_path: Path) -> None:
    fn = pytest.importorskip("nvidia.dali.fn")
    from nvidia.dali import Pipeline

    shards = many_shards(make_images, tmp_path)
    tars = [str(shards.root / shard.name) for shard in shards.manifest.shards]
    pipeline = Pipeline(batch_size=len(shards), num_threads=1, device_id=None)
    with pipeline:
        encoded, label = fn.readers.webdataset(
            paths=tars,
            index_paths=[tar.replace(".tar", ".idx") for tar in tars],
            ext=["jpg;png", "cls"],
            missing_component_behavior="error",
        )
        pipeline.set_outputs(fn.decoders.image(encoded, adjust_orientation=False), label)
    pipeline.build()
    images, labels = pipeline.run()
    for row in range(len(shards)):
        np.testing.assert_array_equal(np.array(images.at(row)), original(shards, row))
        assert int(bytes(np.array(labels.at(row)))) == shards.labels()[row]


def test_bytes_depend_on_nothing_but_input_and_options(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "source", per_class=30)
    (source / "cat/bad.jpg").write_bytes(b"x")
    pack(source, tmp_path / "one", PackOptions(workers=1))
    pack(source, tmp_path / "elsewhere/two", PackOptions(workers=2))
    shutil.copytree(source, tmp_path / "moved")
    pack(tmp_path / "moved", tmp_path / "three", PackOptions(workers=2))
    pack(source, tmp_path / "seeded", PackOptions(seed=1))
    one = content_of(tmp_path / "one")
    assert one == content_of(tmp_path / "elsewhere/two") == content_of(tmp_path / "three")
    assert one["shard-000000.tar"] != content_of(tmp_path / "seeded")["shard-000000.tar"]
    assert (
        ShardSet(tmp_path / "one").manifest.set_id != ShardSet(tmp_path / "seeded").manifest.set_id
    )


def test_the_shuffle_is_frozen() -> None:
    assert shuffled(0, Stream.ORDER, 0, 10).tolist() == [0, 2, 9, 1, 8, 5, 4, 3, 6, 7]
    many = shuffled(1, Stream.ORDER, 0, 10_000)
    assert np.array_equal(np.sort(many), np.arange(10_000))
    assert abs(np.corrcoef(many, np.arange(10_000))[0, 1]) < 0.05


def test_manifest_counts_and_statistics(small_set: ShardSet) -> None:
    manifest = small_set.manifest
    assert (manifest.samples, manifest.rejected, manifest.progressive) == (24, 0, 0)
    assert manifest.classes == ["ape", "bee", "cow"] and manifest.class_counts == [8, 8, 8]
    assert manifest.options == PackOptions().recorded()
    assert not {"workers", "format", "like", "max_rejects"} & set(manifest.options)
    pixels = np.concatenate([original(small_set, row).reshape(-1, 3) for row in range(24)]) / 255
    np.testing.assert_allclose(manifest.mean, pixels.mean(axis=0), rtol=1e-12)
    np.testing.assert_allclose(manifest.std, pixels.std(axis=0), rtol=1e-12)


def test_unlabelled_set_has_no_cls(make_images: Make, tmp_path: Path) -> None:
    pack(make_images(tmp_path / "in", ()), tmp_path / "set", PackOptions())
    flat = ShardSet(tmp_path / "set")
    assert flat.labels().tolist() == [-1] * 4 and flat.manifest.class_counts == []
    with tarfile.open(tmp_path / "set/shard-000000.tar") as tar:
        assert tar.getnames() == [f"{row:08d}.jpg" for row in range(4)]


def test_unfit_images_are_skipped_and_listed(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    (source / "dog/0001.jpg").write_bytes(b"x")
    (source / "cat/0002.jpg").write_bytes((source / "cat/0002.jpg").read_bytes()[:200])
    (source / "cat/notes.txt").write_bytes(b"x")
    assert pack(source, tmp_path / "set", PackOptions())[""].samples == 6
    lines = (tmp_path / "set/rejects.jsonl").read_text().splitlines()
    rejects = {entry["name"]: entry["reason"] for entry in map(json.loads, lines)}
    assert list(rejects) == ["cat/0002.jpg", "dog/0001.jpg"]
    assert rejects["dog/0001.jpg"] == "is not an image of a known format"
    shards = ShardSet(tmp_path / "set")
    assert shards.manifest.rejected == 2 and shards.manifest.class_counts == [3, 3]
    assert not {shards.get_name(row) for row in range(6)} & set(rejects)


def test_too_many_unfit_images_stop_the_pack(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", per_class=8)
    for path in sorted(source.glob("*/*"))[2:13]:
        path.write_bytes(b"x")
    with pytest.raises(DataError, match=r"11 of 16 .*--max-rejects 11 (?s:.*)is not an image"):
        pack(source, tmp_path / "set", PackOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]
    assert pack(source, tmp_path / "set", PackOptions(max_rejects=11))[""].samples == 5


def test_a_class_that_would_be_gone_stops_the_pack(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", per_class=8)
    for path in (source / "dog").iterdir():
        path.write_bytes(b"x")
    for limit in (None, 3, 8):
        with pytest.raises(DataError, match=r"All 8 images of the class dog would be left out"):
            pack(source, tmp_path / "set", PackOptions(max_rejects=limit))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in"]


def test_the_value_that_would_pass_counts_all_splits(make_images: Make, tmp_path: Path) -> None:
    source = tmp_path / "in"
    for split in ("train", "val"):
        make_images(source / split, per_class=5)
        for name in ("cat", "dog"):
            (source / split / name / "0003.jpg").write_bytes(b"x")
    (source / "train/cat/photo.jp2").write_bytes(b"\0\0\0\x0cjP  ")
    with pytest.raises(DataError, match=r"5 of 21 images .* --max-rejects 5 puts up with them"):
        pack(source, tmp_path / "set", PackOptions(max_rejects=1))
    assert not (tmp_path / "set").exists()
    found = pack(source, tmp_path / "set", PackOptions(max_rejects=5))
    assert {split: manifest.rejected for split, manifest in found.items()} == {"train": 3, "val": 2}


def test_nothing_fit_is_refused(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    with pytest.raises(DataError, match="None of the images is fit"):
        pack(source, tmp_path / "set", PackOptions(min_side=1000))
    assert not (tmp_path / "set").exists()


@pytest.mark.parametrize("stem", ["a b", "a.b.c", "ünïcode 😀", "new\nline", "\udcff\udc80 bytes"])
def test_any_name_finds_its_way_back(make_images: Make, tmp_path: Path, stem: str) -> None:
    source = make_images(tmp_path / "in", ())
    (source / "0000.jpg").rename(source / f"{stem}.jpg")
    (source / f"{stem}.png").write_bytes(b"x")
    pack(source, tmp_path / "set", PackOptions())
    shards = ShardSet(tmp_path / "set")
    names = sorted(shards.get_name(row) for row in range(4))
    assert names == sorted(["0001.jpg", "0002.jpg", "0003.jpg", f"{stem}.jpg"])
    assert json.loads((tmp_path / "set/rejects.jsonl").read_text())["name"] == f"{stem}.png"


def test_out_must_be_new_and_outside(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in")
    (tmp_path / "taken").mkdir()
    (tmp_path / "dangling").symlink_to("nowhere")
    for out in (tmp_path / "taken", tmp_path / "dangling"):
        with pytest.raises(UsageError, match="exists already"):
            pack(source, out, PackOptions())
    with pytest.raises(UsageError, match="lies inside"):
        pack(source, source / "cat/set", PackOptions())


def test_a_second_pack_that_listed_while_the_first_was_at_it(
    make_images: Make, tmp_path: Path
) -> None:
    source, out = make_images(tmp_path / "in"), tmp_path / "set"
    sources = sources_for(source, out, PackOptions())
    pack(source, out, PackOptions())
    with pytest.raises(UsageError, match="exists already"):
        pack_sources(sources, out, PackOptions())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


FULL_DISK = """
import resource, sys
from pathlib import Path
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack

resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
try:
    pack(Path(sys.argv[1]), Path(sys.argv[2]), PackOptions())
except Exception as error:
    print(f"{type(error).__name__}: {error}")
"""


def test_a_failing_write_is_plain_words(make_images: Make, tmp_path: Path) -> None:
    source = make_images(tmp_path / "in", per_class=20)
    command = [sys.executable, "-W", "always::ResourceWarning", "-c", FULL_DISK]
    found = subprocess.run(
        [*command, source, tmp_path / "set"], capture_output=True, text=True, check=True
    )
    assert found.stdout == (
        f"DataError: {tmp_path / 'set'} cannot be written: File too large. Finished shards are "
        "kept: the same command goes on.\n"
    )
    assert "ResourceWarning" not in found.stderr and "Traceback" not in found.stderr
    assert not (tmp_path / "set").exists()
    assert pack(source, tmp_path / "set", PackOptions())[""].samples == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


def children(pid: int) -> list[int]:
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split(")")[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_an_interrupted_pack_leaves_nothing_under_its_name(
    make_images: Make, tmp_path: Path, number: signal.Signals
) -> None:
    source, out = make_images(tmp_path / "in", per_class=20), tmp_path / "set"
    command = [sys.executable, "-c", STALLED_PACK, str(source), str(out)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout and process.stdout.readline() == b"stalled\n"
        assert (tmp_path / ".set.partial/shard-000000.tar").exists() and not out.exists()
        workers = children(process.pid)
        assert len(workers) >= 2
        process.send_signal(number)
    assert not out.exists()
    deadline = time.monotonic() + 20
    while any(alive(pid) for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(alive(pid) for pid in workers)
    assert pack(source, out, PackOptions())[""].samples == 40
    assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "set"]


def test_workers_load_neither_torch_nor_pydantic() -> None:
    code = "import sys, fastmoco.pack.parallel, fastmoco.pack.worker; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, check=True, text=True)
    assert not {"torch", "webdataset", "pydantic", "nvidia"} & set(found.stdout.split())


def test_a_killed_worker_is_plain_words(
    make_images: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = make_images(tmp_path / "in", per_class=200)

    calls: list[int] = []

    def kill_workers(done: int, total: int) -> None:
        calls.append(done)
        for child in children(os.getpid()) if len(calls) == 1 else []:
            if b"spawn_main" in Path(f"/proc/{child}/cmdline").read_bytes():
                os.kill(child, signal.SIGKILL)

    with pytest.raises(DataError, match="fewer --workers"):
        pack(source, tmp_path / "set", PackOptions(), kill_workers)
    assert not (tmp_path / "set").exists()
