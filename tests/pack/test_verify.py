"""Every way to damage a set that we know of, and the words in which `verify` names it."""

import json
import os
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.manifest import hash_set, write_manifest
from fastmoco.dataset.shard_set import LABEL_DTYPE, SAMPLE_DTYPE, ShardSet, write_labels
from fastmoco.errors import DataError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack
from fastmoco.pack.verify import Finding, unhashed, verify

Make = Callable[..., Path]


@pytest.fixture(scope="module")
def packed(make_images: Make, tmp_path_factory: pytest.TempPathFactory) -> ShardSet:
    """Three shards of JPEGs and PNGs in two classes."""
    root = tmp_path_factory.mktemp("packed")
    make_images(root / "in", ("cat", "dog"), 4, (600, 500), "png")
    make_images(root / "in", ("cat", "dog"), 6)
    pack(root / "in", root / "set", PackOptions(shard_mb=1))
    return ShardSet(root / "set")


@pytest.fixture
def copied(packed: ShardSet, tmp_path: Path) -> ShardSet:
    """A copy that a test may damage."""
    return ShardSet(Path(shutil.copytree(packed.root, tmp_path / "copy")))


def flip(path: Path, offset: int, mask: int = 0x01) -> None:
    with path.open("r+b") as stream:
        stream.seek(offset)
        byte = stream.read(1)[0]
        stream.seek(offset)
        stream.write(bytes([byte ^ mask]))


def shard_of(one: ShardSet, row: int) -> Path:
    return one.root / one.manifest.shards[int(one.samples["shard"][row])].name


def tarfile_reads(header: bytes) -> bool:
    try:
        return bool(tarfile.TarInfo.frombuf(header, "utf-8", "strict"))
    except tarfile.HeaderError:
        return False


def first_row(one: ShardSet, shard: int) -> int:
    return int(np.flatnonzero(one.samples["shard"] == shard)[0])


def only(findings: list[Finding]) -> Finding:
    assert len(findings) == 1, [str(finding) for finding in findings]
    return findings[0]


def test_a_sound_set_has_no_findings(packed: ShardSet) -> None:
    assert len(packed.manifest.shards) > 1
    assert verify(packed.root, full=False) == []
    told: list[tuple[int, int]] = []
    assert verify(packed.root, full=True, on_progress=lambda *done: told.append(done)) == []
    assert told[-1] == (len(packed), len(packed)) and len(told) == len(packed.manifest.shards)


def test_worker_processes_find_the_same(copied: ShardSet) -> None:
    flip(shard_of(copied, 3), int(copied.samples["offset"][3]) + 100)
    flip(shard_of(copied, 18), int(copied.samples["offset"][18]) + 100)
    alone = verify(copied.root, full=True)
    assert {finding.sample for finding in alone} == {3, 18}
    assert verify(copied.root, full=True, workers=2) == alone


@pytest.mark.parametrize("row", [0, 7, 19])
@pytest.mark.parametrize("part", [0.0, 0.5, 0.999])
def test_a_flipped_byte_in_an_image(copied: ShardSet, row: int, part: float) -> None:
    entry = copied.samples[row]
    path = shard_of(copied, row)
    flip(path, int(entry["offset"]) + int(part * int(entry["size"])))
    assert verify(copied.root, full=False) == []
    found = only(verify(copied.root, full=True))
    assert (found.file, found.sample, found.name) == (path.name, row, copied.get_name(row))
    assert "changed after packing; it " in found.what


def test_each_flipped_image_is_named(copied: ShardSet) -> None:
    rows = [1, 2, 12]
    for row in rows:
        flip(shard_of(copied, row), int(copied.samples["offset"][row]) + 50)
    found = verify(copied.root, full=True)
    assert [(f.sample, f.name) for f in found] == [(row, copied.get_name(row)) for row in rows]


def test_a_flipped_byte_anywhere_in_a_header_is_named(copied: ShardSet) -> None:
    """Every 29th of its 512 bytes, and each of the checksum, on a header in mid-shard."""
    path, row = shard_of(copied, 2), 2
    start = int(copied.samples["offset"][row]) - 512
    sound = path.read_bytes()
    for place in [*range(0, 512, 29), *range(148, 156)]:
        flip(path, start + place, 0x10)
        found = only(verify(copied.root, full=True))
        assert found.file == path.name
        if tarfile_reads(path.read_bytes()[start : start + 512]):
            assert place in range(148, 156) and "SHA-256" in found.what  # such as 0 for a blank
        else:
            assert (found.sample, found.name) == (row, copied.get_name(row)), place
            assert "damaged header" in found.what
        path.write_bytes(sound)


@pytest.mark.parametrize("row", [0, 5])
def test_a_damaged_header_of_a_label_is_put_down_to_its_sample(copied: ShardSet, row: int) -> None:
    start = int(copied.samples["offset"][row]) - 3 * 512  # label header, label, image header
    flip(shard_of(copied, row), start + 3)
    found = only(verify(copied.root, full=True))
    assert found.sample == row and "damaged header" in found.what


def test_a_zeroed_header_does_not_end_the_shard(copied: ShardSet) -> None:
    path, row = shard_of(copied, 4), 4
    with path.open("r+b") as stream:
        stream.seek(int(copied.samples["offset"][row]) - 512)
        stream.write(bytes(512))
    flip(shard_of(copied, 5), int(copied.samples["offset"][5]) + 9)
    first, second = verify(copied.root, full=True)
    assert first.sample == 4 and "holds zeros" in first.what
    assert second.sample == 5


def test_a_flipped_byte_in_a_label(copied: ShardSet) -> None:
    flip(shard_of(copied, 6), int(copied.samples["offset"][6]) - 2 * 512)
    found = only(verify(copied.root, full=True))
    assert found.sample == 6 and "its label is" in found.what
    assert found.file == shard_of(copied, 6).name


def test_a_flipped_byte_in_the_padding(copied: ShardSet) -> None:
    path = shard_of(copied, 0)
    flip(path, path.stat().st_size - 1)
    found = only(verify(copied.root, full=True))
    assert found.file == path.name and "it is the padding" in found.what


@pytest.mark.parametrize("full", [False, True])
@pytest.mark.parametrize("part", [*np.linspace(0, 0.97, 8).tolist(), "header", "boundary"])
def test_ten_cuts_have_ten_right_answers(copied: ShardSet, part: float | str, full: bool) -> None:
    row = first_row(copied, 1)
    path = shard_of(copied, row)
    rows = np.flatnonzero(copied.samples["shard"] == 1)
    at = {
        "header": int(copied.samples["offset"][row + 1]) - 100,
        "boundary": int(copied.samples["offset"][row + 1]) - 3 * 512,
    }
    cut = at[part] if isinstance(part, str) else int(part * path.stat().st_size)
    os.truncate(path, cut)
    ends = copied.samples["offset"][rows] + copied.samples["size"][rows]
    lost = rows[ends > cut].tolist()
    found = only(verify(copied.root, full))
    assert found.file == path.name
    assert f"has {cut} bytes, not {copied.manifest.shards[1].bytes}" in found.what
    assert f"{len(lost)} of its {len(rows)} samples are lost" in found.what
    assert (found.sample, found.name) == (lost[0], copied.get_name(lost[0]))


@pytest.mark.parametrize("full", [False, True])
def test_a_cut_in_the_padding_loses_nothing(copied: ShardSet, full: bool) -> None:
    path = shard_of(copied, 0)
    os.truncate(path, path.stat().st_size - 1024)
    assert "all its samples are there" in only(verify(copied.root, full)).what


def test_a_cut_shard_is_still_searched(copied: ShardSet) -> None:
    path = shard_of(copied, 0)
    flip(path, int(copied.samples["offset"][1]) + 20)
    os.truncate(path, int(copied.samples["offset"][3]))
    cut, flipped = verify(copied.root, full=True)
    assert cut.sample == 3 and flipped.sample == 1


@pytest.mark.parametrize("full", [False, True])
def test_a_missing_shard_is_one_finding(copied: ShardSet, full: bool) -> None:
    row = first_row(copied, 1)
    path = shard_of(copied, row)
    path.unlink()
    found = only(verify(copied.root, full))
    assert found.file == path.name and found.what.startswith("is missing; ")
    assert found.name == copied.get_name(row)


def test_swapped_shards_are_both_named(copied: ShardSet) -> None:
    first, second = (copied.root / shard.name for shard in copied.manifest.shards[:2])
    first.rename(copied.root / "aside")
    second.rename(first)
    (copied.root / "aside").rename(second)
    found = verify(copied.root, full=True)
    assert [f.file for f in found] == [first.name, second.name]
    assert f"content of {second.name}" in found[0].what
    assert f"content of {first.name}" in found[1].what


def test_a_shard_of_another_set_is_one_finding(copied: ShardSet, make_images: Make) -> None:
    make_images(copied.root.parent / "in", ("x", "y"), 6, (200, 100), "png")
    pack(copied.root.parent / "in", copied.root.parent / "other", PackOptions(seed=3))
    path = shard_of(copied, 0)
    content = (copied.root.parent / "other/shard-000000.tar").read_bytes()
    path.write_bytes(content[: path.stat().st_size].ljust(path.stat().st_size, b"\0"))
    assert "it is another file" in only(verify(copied.root, full=True)).what


def test_an_extra_tar_is_named(copied: ShardSet) -> None:
    shutil.copy(shard_of(copied, 0), copied.root / "shard-000099.tar")
    found = only(verify(copied.root, full=False))
    assert (found.file, found.what) == ("shard-000099.tar", "is not part of the set")


def test_stale_indexes(copied: ShardSet) -> None:
    path = shard_of(copied, 0).with_suffix(".idx")
    header, *lines = path.read_text().splitlines()
    stale = {
        "reversed": [header, *reversed(lines)],
        "wrong size": [header, lines[0], lines[1].replace(".", "x."), *lines[2:]],
        "words": [header, *lines[:-1], "no index"],
    }
    wrong = {"reversed": len(lines) // 2 * 2, "wrong size": 1, "words": 1}
    for name, content in stale.items():
        path.write_text("\n".join(content) + "\n")
        assert verify(copied.root, full=False) == []
        found = only(verify(copied.root, full=True))
        assert found.file == path.name and found.what.startswith("line "), name
        count = f"{wrong[name]} of {len(lines)} lines are wrong"
        assert (count in found.what) == (wrong[name] > 1)


@pytest.mark.parametrize("full", [False, True])
def test_an_index_of_another_length(copied: ShardSet, full: bool) -> None:
    path = shard_of(copied, 0).with_suffix(".idx")
    sound = path.read_bytes()
    changes = {
        "lines and says": sound.rsplit(b"\n", 2)[0] + b"\n",
        "does not begin with": b"\xff\x00\xfe" * 100,
        "is missing": None,
    }
    for words, content in changes.items():
        path.unlink()
        if content is not None:
            path.write_bytes(content)
        found = only(verify(copied.root, full))
        assert found.file == path.name and words in found.what
        path.write_bytes(sound)


def test_a_changed_table_is_named_and_not_the_shard(copied: ShardSet) -> None:
    sound, shard = np.array(copied.samples), shard_of(copied, 5).name
    label = 1 - int(sound["label"][5])
    changes = [("offset", 512), ("size", 7), ("hash", 7), ("shard", 1), ("label", label)]
    for column, value in [*changes, ("height", 9), ("width", 9), ("label", 77)]:
        table = sound.copy()
        table[column][5] = value
        np.save(copied.root / "samples.npy", table)
        found = verify(copied.root, full=True)
        about = [f for f in found if f.file == "samples.npy"]
        assert [(f.sample, f.name) for f in about][:1] == [(5, copied.get_name(5))], column
        assert all(f.file != shard for f in found), column


def test_what_only_the_sums_tell(copied: ShardSet) -> None:
    path = copied.root / "manifest.json"
    sound = json.loads(path.read_text())
    path.write_text(json.dumps(sound | {"class_counts": [0, 20]}))
    assert "class counts" in only(verify(copied.root, full=True)).what
    path.write_text(json.dumps(sound | {"set_id": "0" * 64}))
    assert "set_id does not fit" in only(verify(copied.root, full=True)).what


@pytest.mark.parametrize("full", [False, True])
def test_tables_of_another_length(copied: ShardSet, full: bool) -> None:
    for name in ("samples.npy", "names.idx.npy", "names.txt", "rejects.jsonl"):
        path = copied.root / name
        sound = path.read_bytes()
        for content in (sound[:-1], sound + b"x\n", b"", None):
            path.unlink()
            if content is not None:
                path.write_bytes(content)
            if content == sound or (content == sound + b"x\n" and name.endswith(".npy")):
                path.write_bytes(sound)
                continue  # numpy reads what the header announces
            if name == "rejects.jsonl" and content in (b"", sound[:-1]):
                path.write_bytes(sound)
                continue  # the set has none
            assert only(verify(copied.root, full)).file in (name, "names.txt"), content
            path.write_bytes(sound)
    assert verify(copied.root, full) == []


def test_damaged_names(copied: ShardSet) -> None:
    end = int(copied.name_offsets[4]) - 1
    flip(copied.root / "names.txt", end)
    assert "no line feed behind name 3" in only(verify(copied.root, full=True)).what
    flip(copied.root / "names.txt", end)
    offsets = np.array(copied.name_offsets)
    offsets[5], offsets[6] = offsets[6], offsets[5]
    np.save(copied.root / "names.idx.npy", offsets)
    assert "does not ascend" in only(verify(copied.root, full=True)).what


def test_counts_that_do_not_add_up(copied: ShardSet) -> None:
    path = copied.root / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["shards"][0]["samples"] += 1
    path.write_text(json.dumps(manifest))
    for full in (False, True):
        assert verify(copied.root, full)[0].file == "manifest.json"


def test_side_tables_are_looked_at(copied: ShardSet) -> None:
    rows = np.array([(3, 0, 1.0)], dtype=LABEL_DTYPE)
    path = write_labels(copied, "mine", rows, ["a"], "by hand")
    assert verify(copied.root, full=False) == []
    np.save(path, np.array([(99, 0, 1.0)], dtype=LABEL_DTYPE))
    found = only(verify(copied.root, full=False))
    assert found.file == "labels/mine.npy" and "ids must lie in 0..19" in found.what
    path.with_suffix(".json").unlink()
    assert "cannot be read" in only(verify(copied.root, full=False)).what

    path.unlink()
    write_labels(copied, "mine", rows, ["a"], "by hand")
    path.unlink()
    assert "cannot be read" in only(verify(copied.root, full=False)).what


@pytest.mark.parametrize(
    "name",
    [
        "samples.npy",
        "names.txt",
        "names.idx.npy",
        "manifest.json",
        "labels/mine.npy",
        "shard-000000.idx",
    ],
)
def test_any_changed_byte_is_found(copied: ShardSet, name: str) -> None:
    """None of them ends in a traceback: in a header, in a value, or where only a hash can tell."""
    rows = np.array([(row, row % 2, 1.0) for row in range(20)], dtype=LABEL_DTYPE)
    write_labels(copied, "mine", rows, ["a", "b"], "by hand")
    path = copied.root / name
    sound = path.read_bytes()
    random = np.random.default_rng(0)
    for place in random.choice(len(sound), 6, replace=False):
        changed = bytearray(sound)
        changed[place] ^= int(random.integers(1, 256))
        path.write_bytes(changed)
        try:
            assert verify(copied.root, full=True), f"byte {place} was changed"
        except DataError as error:
            assert name == "manifest.json" and name in str(error)
    path.write_bytes(sound)
    assert verify(copied.root, full=True) == []


def test_what_only_a_hash_can_tell(copied: ShardSet) -> None:
    path = copied.root / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["classes"].reverse()
    path.write_text(json.dumps(manifest))
    assert only(verify(copied.root, full=False)).file == "manifest.json"
    del manifest["sha256"]
    path.write_text(json.dumps(manifest))
    assert verify(copied.root, full=True) == [], "as of an older set, which has no hashes"
    assert "manifest.json" in unhashed(copied.root)
    for channels in ([float("nan")] * 3, [0.5]):
        path.write_text(json.dumps(manifest | {"mean": channels}))
        with pytest.raises(DataError, match=r"manifest.json is damaged"):
            verify(copied.root, full=False)


def test_no_manifest_is_an_error_in_words(copied: ShardSet) -> None:
    (copied.root / "manifest.json").write_text("{")
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        verify(copied.root, full=True)


def test_an_image_that_never_decoded_is_named(copied: ShardSet) -> None:
    """A set whose hashes all fit, written by a packer that did not check."""
    path, row = shard_of(copied, 0), 0
    entry = copied.samples[row]
    with path.open("r+b") as stream:
        stream.seek(int(entry["offset"]))
        stream.write(bytes(int(entry["size"])))
    rebuild(copied, path, row)
    found = only(verify(copied.root, full=True))
    assert (found.file, found.sample) == (path.name, row) and "cannot be decoded" in found.what


def rebuild(one: ShardSet, path: Path, row: int) -> None:
    """Make hashes and set id fit a changed shard."""
    import hashlib

    rows = np.array(one.samples)
    content = bytes(int(rows["size"][row]))
    digest = hashlib.sha256(content).digest()[:8]
    rows["hash"][row] = int.from_bytes(digest, "little")
    np.save(one.root / "samples.npy", rows)
    manifest = one.manifest.model_copy(deep=True)
    manifest.shards[0].sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    manifest.set_id = hash_set(manifest.shards, rows)
    write_manifest(one.root, manifest)


def test_the_set_id_is_that_of_the_whole_table_at_once() -> None:
    import hashlib

    rows = np.zeros(70_000, dtype=SAMPLE_DTYPE)
    rows["offset"] = np.arange(70_000)
    digest = hashlib.sha256(b"fastmoco 1\n" + rows.tobytes()).hexdigest()
    assert hash_set([], rows) == digest


def test_tarfile_agrees_on_what_is_there(packed: ShardSet) -> None:
    from fastmoco.pack.tar import Member, walk

    for shard in packed.manifest.shards:
        with tarfile.open(packed.root / shard.name) as tar:
            wanted = [Member(m.name, m.offset_data, m.size, True) for m in tar]
        assert list(walk(packed.root / shard.name)) == wanted
