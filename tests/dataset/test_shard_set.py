"""Opening a set: what is damaged is named, what belongs to another set is refused."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from fastmoco.dataset.shard_set import (
    LABEL_DTYPE,
    SAMPLE_DTYPE,
    ConcatShardSets,
    ShardSet,
    read_labels,
    write_labels,
)
from fastmoco.errors import DataError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import pack


def get_rows(*entries: tuple[int, int, float]) -> np.ndarray:
    return np.array(list(entries), dtype=LABEL_DTYPE)


def change_manifest(root: Path, **changes: object) -> None:
    path = root / "manifest.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_table_row_is_32_bytes() -> None:
    assert SAMPLE_DTYPE.itemsize == 32


def test_no_set(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"not a shard set \(no manifest.json\).*fastmoco shard"):
        ShardSet(tmp_path)


def test_a_truncated_shard_is_named(copied: ShardSet) -> None:
    path = copied.root / "shard-000000.tar"
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataError, match=r"shard-000000.tar has \d+ bytes, not \d+: copy the set"):
        ShardSet(copied.root)
    path.unlink()
    with pytest.raises(DataError, match=r"shard-000000.tar is missing"):
        ShardSet(copied.root)


def test_a_newer_format_is_refused_in_words(copied: ShardSet) -> None:
    change_manifest(copied.root, format_version=99, a_field_of_the_future=1)
    with pytest.raises(DataError, match=r"format version 99, .* reads up to 2: upgrade fastmoco"):
        ShardSet(copied.root)


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"format_version": 1}'])
def test_a_damaged_manifest_is_named(copied: ShardSet, text: str) -> None:
    (copied.root / "manifest.json").write_text(text)
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        ShardSet(copied.root)


@pytest.mark.parametrize("name", ["../copy/shard-000000.tar", "/etc/passwd", "sub/shard.tar", ".."])
def test_a_shard_outside_the_set_is_refused(copied: ShardSet, name: str) -> None:
    shard = copied.manifest.shards[0].model_dump() | {"name": name}
    change_manifest(copied.root, shards=[shard])
    with pytest.raises(DataError, match=r"manifest.json is damaged"):
        ShardSet(copied.root)


def test_damaged_tables_are_named(copied: ShardSet) -> None:
    np.save(copied.root / "samples.npy", np.zeros(23, dtype=SAMPLE_DTYPE))
    with pytest.raises(DataError, match=r"samples.npy has 23 rows, the manifest says 24"):
        _ = ShardSet(copied.root).samples
    np.save(copied.root / "samples.npy", np.zeros(24, dtype=[("offset", "<u8")]))
    with pytest.raises(DataError, match=r"lacks the columns \['hash'"):
        _ = ShardSet(copied.root).samples
    (copied.root / "names.idx.npy").write_bytes(b"x")
    with pytest.raises(DataError, match=r"names.idx.npy cannot be read"):
        ShardSet(copied.root).get_name(0)


def test_columns_are_found_by_name(small_set: ShardSet, copied: ShardSet) -> None:
    table = np.zeros(24, dtype=[*reversed(SAMPLE_DTYPE.descr), ("later", "<f4")])
    for column in SAMPLE_DTYPE.names or ():
        table[column] = small_set.samples[column]
    np.save(copied.root / "samples.npy", table)
    found = ConcatShardSets.open([copied.root]).rows(np.arange(24))
    np.testing.assert_array_equal(found, small_set.samples)


def test_describe_names_sample_image_and_shard(small_set: ShardSet) -> None:
    words = small_set.describe(3)
    assert words.startswith(f"sample 3 ({small_set.get_name(3)}) in ")
    assert words.endswith("/set/shard-000000.tar")


def test_label_tables_round_trip(copied: ShardSet, tmp_path: Path) -> None:
    before = {path.name for path in copied.root.iterdir()}
    rows = get_rows((7, 1, 0.5), (2, 0, 1.0))
    for table in ("round-1", tmp_path / "elsewhere" / "mine.npy"):
        path = write_labels(copied, table, rows, ["no", "yes"], "by hand")
        assert path.is_file() and json.loads(path.with_suffix(".json").read_text())["origin"]
        read, classes = read_labels(copied, table)
        np.testing.assert_array_equal(read, np.sort(rows, order="id"))
        assert classes == ["no", "yes"]
        labels = copied.labels(table)
        assert labels[7] == 1 and labels[2] == 0 and (labels == -1).sum() == 22
    assert {path.name for path in copied.root.iterdir()} == before | {"labels"}


def test_a_label_table_of_another_set_is_refused(
    copied: ShardSet, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    path = write_labels(copied, tmp_path / "mine.npy", get_rows((0, 0, 1.0)), ["a"], "by hand")
    pack(make_images(tmp_path / "in"), tmp_path / "other", PackOptions())
    other = ShardSet(tmp_path / "other")
    match = f"belongs to set {copied.manifest.set_id[:12]}.*is set {other.manifest.set_id[:12]}"
    with pytest.raises(DataError, match=match):
        other.labels(path)
    with pytest.raises(DataError, match=r"absent.npy cannot be read"):
        other.labels("absent")


@pytest.mark.parametrize(
    ("entries", "message"),
    [
        ([(1, 0, 1.0), (1, 0, 1.0)], "twice"),
        ([(-1, 0, 1.0)], r"ids must lie in 0\.\.23"),
        ([(24, 0, 1.0)], r"ids must lie in 0\.\.23"),
        ([(0, 2, 1.0)], r"Labels must lie in 0\.\.1"),
        ([(0, -1, 1.0)], r"Labels must lie in 0\.\.1"),
    ],
)
def test_unsound_labels_are_not_written(
    copied: ShardSet, entries: list[tuple[int, int, float]], message: str
) -> None:
    with pytest.raises(DataError, match=message):
        write_labels(copied, "bad", get_rows(*entries), ["a", "b"], "by hand")
    assert not (copied.root / "labels").exists()


def test_a_collection_runs_through_its_sets(
    small_set: ShardSet, tmp_path: Path, make_images: Callable[..., Path]
) -> None:
    pack(make_images(tmp_path / "in"), tmp_path / "other", PackOptions())
    both = ConcatShardSets.open([small_set.root, tmp_path / "other"])
    assert len(both) == 32 and both.starts.tolist() == [0, 24, 32]
    which, rows = both.locate(np.array([0, 23, 24, 31]))
    assert (which.tolist(), rows.tolist()) == ([0, 0, 1, 1], [0, 23, 0, 7])
    found = both.rows(np.array([31, 5]))
    assert found[0] == both.sets[1].samples[7] and found[1] == small_set.samples[5]
    assert both.describe(24) == both.sets[1].describe(0)
    assert both.set_ids == [s.manifest.set_id for s in both.sets]


def test_opening_reads_no_table(copied: ShardSet, monkeypatch: pytest.MonkeyPatch) -> None:
    """Tables are mapped on first use, and using a row does not read the others."""
    loads: list[str | None] = []
    load = np.load

    def counted(path: Path, *args: object, **options: object) -> object:
        loads.append(options.get("mmap_mode"))  # type: ignore[arg-type]
        return load(path, *args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(np, "load", counted)
    opened = ShardSet(copied.root)
    assert loads == []
    opened.describe(3)
    ConcatShardSets([opened]).rows(np.array([5, 1]))
    assert loads == ["r", "r"]  # names.idx.npy and samples.npy, once each
    for table in (opened.samples, opened.name_offsets, opened.name_bytes):
        assert isinstance(table, np.memmap)


def test_opening_asks_once_for_each_shard(
    copied: ShardSet, monkeypatch: pytest.MonkeyPatch
) -> None:
    import os

    asked: list[str] = []
    stat = os.stat

    def counted(path: object, *args: object, **options: object) -> os.stat_result:
        if str(path).endswith(".tar"):
            asked.append(str(path))
        return stat(path, *args, **options)  # type: ignore[call-overload]

    monkeypatch.setattr(os, "stat", counted)
    ShardSet(copied.root)
    assert asked == [str(copied.root / shard.name) for shard in copied.manifest.shards]


def test_a_damaged_label_table_is_refused(copied: ShardSet) -> None:
    path = write_labels(copied, "mine", get_rows((1, 0, 1.0), (2, 1, 1.0)), ["a", "b"], "by hand")
    for entries, message in (
        ([(2, 0, 1.0), (1, 0, 1.0)], "not sorted"),
        ([(1, 0, 1.0), (99, 0, 1.0)], r"ids must lie in 0\.\.23"),
        ([(1, 7, 1.0)], r"labels must lie in 0\.\.1"),
    ):
        np.save(path, get_rows(*entries))
        with pytest.raises(DataError, match=f"mine.npy is damaged: .*{message}"):
            copied.labels("mine")
    np.save(path, np.zeros((3, 2)))
    with pytest.raises(DataError, match="its rows are not"):
        copied.labels("mine")
    path.write_bytes(b"")
    with pytest.raises(DataError, match=r"mine.npy cannot be read"):
        copied.labels("mine")
    path.unlink()
    with pytest.raises(DataError, match=r"mine.npy cannot be read"):
        copied.labels("mine")


def test_a_label_table_that_was_changed_is_refused(copied: ShardSet) -> None:
    """Though it is sound in itself; one of before there were hashes is taken."""
    path = write_labels(copied, "mine", get_rows((1, 0, 1.0), (2, 1, 1.0)), ["a", "b"], "by hand")
    np.save(path, get_rows((1, 1, 1.0), (2, 0, 1.0)))
    with pytest.raises(DataError, match="was changed after it was written"):
        copied.labels("mine")
    about = json.loads(path.with_suffix(".json").read_text())
    del about["sha256"]
    path.with_suffix(".json").write_text(json.dumps(about))
    assert copied.labels("mine").tolist()[:3] == [-1, 1, 0]


@pytest.mark.parametrize(
    ("descr", "shape"),
    [
        ("'|u1'", "(10**18, 4, 4)"),
        ("'|u1'", "(1000000000000000000, 4, 4)"),
        ("'|u1'", "(4611686018427387904, 4)"),
        ("'|u1'", "(-5, 4)"),
        ("'|u1'", "()"),
        ("'|O'", "(3,)"),
        ("[" * 3000 + "]" * 3000, "(3,)"),
        ("__import__('os').abort()", "(3,)"),
    ],
)
def test_the_header_of_an_array_is_not_believed(copied: ShardSet, descr: str, shape: str) -> None:
    header = f"{{'descr': {descr}, 'fortran_order': False, 'shape': {shape}}}\n".encode()
    magic = b"\x93NUMPY\x01\x00" + len(header).to_bytes(2, "little")
    for name in ("labels/mine.npy", "samples.npy"):
        write_labels(copied, "mine", get_rows((1, 0, 1.0)), ["a"], "by hand")
        (copied.root / name).write_bytes(magic + header + bytes(64))
        with pytest.raises(DataError, match="cannot be read") as caught:
            one = ShardSet(copied.root)
            _ = one.samples, one.name_offsets, one.labels("mine")
        assert len(str(caught.value)) < 600
