"""Zips and tars are read in place: the same images as the folder, and nothing of what harms."""

import io
import os
import struct
import tarfile
import zipfile
from pathlib import Path

import pytest

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Span, Unreadable, Zipped
from fastmoco.pack.sources.archive import LINK, open_tar, open_zip
from fastmoco.pack.sources.base import Reject

NAMES = ["a/1.png", "a/2.jpg", "b/3.png"]


def content_of(name: str) -> bytes:
    return (name * 300).encode()


def write_zip(path: Path, names=NAMES, method=zipfile.ZIP_DEFLATED) -> Path:
    with zipfile.ZipFile(path, "w", method) as archive:
        for name in names:
            archive.writestr(name, content_of(name))
    return path


def write_tar(path: Path, names=NAMES, mode="w", format=tarfile.PAX_FORMAT) -> Path:
    with tarfile.open(path, mode, format=format) as archive:
        for name in names:
            info = tarfile.TarInfo(name)
            info.size = len(content_of(name))
            archive.addfile(info, io.BytesIO(content_of(name)))
    return path


def expected(names=NAMES) -> dict[str, bytes]:
    return {name: content_of(name) for name in names}


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_a_zip_gives_what_is_in_it(tmp_path, get_bytes, get_labels, method):
    found = open_zip(write_zip(tmp_path / "x.zip", method=method))[""]
    assert get_bytes(found) == expected()
    assert get_labels(found) == {"a/1.png": "a", "a/2.jpg": "a", "b/3.png": "b"}


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_a_tar_gives_what_is_in_it(tmp_path, get_bytes, get_labels, format):
    names = NAMES if format == tarfile.USTAR_FORMAT else [*NAMES, "b/" + 200 * "é" + ".png"]
    found = open_tar(write_tar(tmp_path / "x.tar", names, format=format))[""]
    assert get_bytes(found) == expected(names)
    assert get_labels(found)["b/3.png"] == "b"


def test_members_are_sorted_by_name_whatever_their_order(tmp_path, get_bytes):
    for opened in (
        open_zip(write_zip(tmp_path / "x.zip", NAMES[::-1])),
        open_tar(write_tar(tmp_path / "x.tar", NAMES[::-1])),
    ):
        assert list(opened[""].names) == NAMES
        assert get_bytes(opened[""]) == expected()


def test_one_folder_around_all_does_not_count(tmp_path, get_bytes, get_labels):
    names = [f"top/{split}/{name}" for split in ("train", "val") for name in NAMES]
    for opened in (
        open_zip(write_zip(tmp_path / "x.zip", names)),
        open_tar(write_tar(tmp_path / "x.tar", names)),
    ):
        assert set(opened) == {"train", "val"}
        assert get_bytes(opened["val"]) == expected(names[3:])
        assert set(get_labels(opened["train"]).values()) == {"a", "b"}


def test_hidden_members_do_not_count(tmp_path):
    names = [*NAMES, "a/._1.png", "__MACOSX/a/1.png", ".cache/1.png"]
    for opened in (
        open_zip(write_zip(tmp_path / "x.zip", names)),
        open_tar(write_tar(tmp_path / "x.tar", names)),
    ):
        assert list(opened[""].names) == NAMES and opened[""].left_out == []


def test_paths_that_leave_are_left_out(tmp_path):
    names = ["../up.png", "/root.png", "a/../../up.png"]
    reason = "has a path that leaves the archive"
    opened = open_zip(write_zip(tmp_path / "x.zip", [*NAMES, *names]))[""]
    assert list(opened.names) == NAMES
    assert opened.left_out == [Reject(name, reason) for name in names]
    opened = open_tar(write_tar(tmp_path / "x.tar", [*NAMES, *names]))[""]
    assert list(opened.names) == NAMES
    assert {reject.name for reject in opened.left_out} == set(names)


def test_a_damaged_member_is_named_when_read(tmp_path):
    for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        path = write_zip(tmp_path / "x.zip", method=method)
        damaged = bytearray(path.read_bytes())
        place = damaged.index(b"a/2.jpg") + len(b"a/2.jpg") + 5
        damaged[place] ^= 1
        path.write_bytes(damaged)
        found = open_zip(path)[""]
        assert found.inputs[0].read(10**6) == content_of("a/1.png")
        with pytest.raises(Unreadable, match="damaged"):
            found.inputs[1].read(10**6)


def test_a_zip_member_cannot_inflate_beyond_its_claim_or_the_limit(tmp_path):
    path = tmp_path / "bomb.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("1.png", bytes(10**6))
        archive.writestr("2.png", b"x")
    found = open_zip(path)[""]
    with pytest.raises(Unreadable, match="larger than"):
        found.inputs[0].read(10**5)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    content[directory + 24 : directory + 28] = struct.pack("<I", 10)  # claims ten bytes
    path.write_bytes(content)
    with pytest.raises(Unreadable, match="damaged"):
        open_zip(path)[""].inputs[0].read(10**5)


def test_zip_members_that_claim_what_is_not_there_are_left_out(tmp_path):
    path = write_zip(tmp_path / "x.zip", ["1.png", "2.png"], zipfile.ZIP_STORED)
    whole = path.read_bytes()
    directory = whole.index(b"PK\x01\x02")
    for field, reason in ((20, "beyond the end"), (24, "more bytes than it can hold")):
        content = bytearray(whole)
        content[directory + field : directory + field + 4] = struct.pack("<I", 2**32 - 2)
        path.write_bytes(content)
        found = open_zip(path)[""]
        assert list(found.names) == ["2.png"]
        assert found.left_out[0].name == "1.png" and reason in found.left_out[0].reason


def test_a_zip_member_is_not_read_beyond_the_limit(tmp_path):
    member = Zipped(str(write_zip(tmp_path / "x.zip")), 0, 2**40, 10, 0, 0)
    with pytest.raises(Unreadable, match="larger than"):
        member.read(10**6)


def test_an_archive_that_went_away_is_a_reason(tmp_path):
    for member in (Span(str(tmp_path / "x"), 0, 1), Zipped(str(tmp_path / "x"), 0, 1, 1, 0, 0)):
        with pytest.raises(Unreadable, match="cannot be read"):
            member.read(10**6)


def test_encrypted_and_oddly_packed_zip_members_and_links_are_left_out(tmp_path):
    path = tmp_path / "x.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("1.png", b"x")
        archive.writestr("2.png", b"x")
        archive.writestr("4.png", b"x", zipfile.ZIP_LZMA)
        link = zipfile.ZipInfo("3.png")
        link.external_attr = 0o120777 << 16
        archive.writestr(link, b"/etc/passwd")
    content = bytearray(path.read_bytes())
    second = content.index(b"PK\x01\x02", content.index(b"PK\x01\x02") + 4)
    content[second + 8] |= 1  # as a member that needs a password has it
    path.write_bytes(content)
    found = open_zip(path)[""]
    assert list(found.names) == ["1.png"]
    assert found.left_out == [
        Reject("2.png", "is encrypted"),
        Reject("3.png", LINK),
        Reject("4.png", "is compressed in a way that few tools read"),
    ]


def test_links_and_devices_in_a_tar_are_left_out(tmp_path):
    path = write_tar(tmp_path / "x.tar", ["1.png"])
    with tarfile.open(path, "a") as archive:
        for number, kind in enumerate(
            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE), 2
        ):
            info = tarfile.TarInfo(f"{number}.png")
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
    found = open_tar(path)[""]
    assert list(found.names) == ["1.png"]
    reasons = {reject.name: reject.reason for reject in found.left_out}
    assert list(reasons) == [f"{n}.png" for n in range(2, 6)]
    assert "is a link, which is not followed" in reasons["2.png"]
    assert reasons["3.png"] == "is a link to what is no image of the archive"
    assert reasons["4.png"] == reasons["5.png"] == "is not a regular file"


def test_hard_links_in_a_tar_are_images_under_each_name(tmp_path, get_bytes, get_labels):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("b/4.png")
        info.type, info.linkname = tarfile.LNKTYPE, "a/1.png"
        archive.addfile(info)
    found = open_tar(path)[""]
    assert get_bytes(found) == {**expected(), "b/4.png": content_of("a/1.png")}
    assert get_labels(found)["b/4.png"] == "b"
    assert found.notes == ["1 hard links are packed under each of their names"]


def test_the_last_member_of_a_name_counts(tmp_path, get_bytes):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("a/1.png")
        info.size = 5
        archive.addfile(info, io.BytesIO(b"later"))
    found = open_tar(path)[""]
    assert get_bytes(found) == {**expected(), "a/1.png": b"later"}
    assert found.notes == ["1 members are left out for later ones of the same name"]


def test_a_zip_of_windows_has_backslashes(tmp_path, get_labels):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        for name in ("train", "val"):
            for kind in "ab":
                info = zipfile.ZipInfo("x")
                info.filename, info.create_system = f"top\\{name}\\{kind}\\1.png", 0
                archive.writestr(info, b"x")
    found = open_zip(tmp_path / "x.zip")
    assert get_labels(found["val"]) == {"top/val/a/1.png": "a", "top/val/b/1.png": "b"}


def test_names_that_are_utf8_without_saying_so(tmp_path):
    path = write_zip(tmp_path / "x.zip", ["a/é.png", "b/é.png"])
    content = path.read_bytes().replace(b"\x00\x08\x08\x00", b"\x00\x00\x08\x00")
    for mark in (b"PK\x03\x04", b"PK\x01\x02"):
        at = -1
        while (at := content.find(mark, at + 1)) >= 0:
            flag = at + (6 if mark == b"PK\x03\x04" else 8)
            content = content[: flag + 1] + b"\0" + content[flag + 2 :]
    path.write_bytes(content)
    assert list(open_zip(path)[""].names) == ["a/é.png", "b/é.png"]


def test_a_linked_class_folder_in_an_archive_is_not_lost(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    with tarfile.open(path, "a") as archive:
        info = tarfile.TarInfo("c")
        info.type, info.linkname = tarfile.SYMTYPE, "/data/c"
        archive.addfile(info)
    with pytest.raises(DataError, match=r"All of the class c is left out.*tar -h"):
        open_tar(path)


@pytest.mark.parametrize("content", [b"\xff\xd8\xff\xe0 jpeg", b"\x89PNG\r\n\x1a\n png"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_members_without_an_extension_are_looked_at(tmp_path, content, method):
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("1", content * 9)
        archive.writestr("2", b"no image" * 9)
    with tarfile.open(tmp_path / "x.tar", "w") as archive:
        for name, held in (("1", content), ("2", b"no image")):
            info = tarfile.TarInfo(name)
            info.size = len(held)
            archive.addfile(info, io.BytesIO(held))
    for found in (open_zip(tmp_path / "x.zip")[""], open_tar(tmp_path / "x.tar")[""]):
        assert list(found.names) == ["1"]
        assert found.passed["files of other kinds"].count == 1


@pytest.mark.parametrize(
    ("mode", "remedy"), [("w:gz", "gzip -d"), ("w:bz2", "bzip2 -d"), ("w:xz", "xz -d")]
)
def test_a_compressed_tar_is_refused_with_the_remedy(tmp_path, mode, remedy):
    path = write_tar(tmp_path / "x.tar", mode=mode)
    with pytest.raises(DataError, match=f"compressed.*`{remedy} x.tar`"):
        open_tar(path)


def test_a_tar_with_a_damaged_header_is_refused_wherever_it_is(tmp_path):
    # Python's tarfile takes all but the first for the end: the images behind would be lost.
    whole = write_tar(tmp_path / "x.tar").read_bytes()
    headers = [i for i in range(0, len(whole), 512) if whole[i + 257 : i + 262] == b"ustar"]
    assert len(headers) == 3
    for header in headers:
        damaged = bytearray(whole)
        damaged[header + 3] ^= 1
        (tmp_path / "x.tar").write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read as a tar"):
            open_tar(tmp_path / "x.tar")


def test_a_tar_cut_anywhere_is_refused_or_its_last_image_is_unreadable(tmp_path):
    path = write_tar(tmp_path / "x.tar")
    whole = path.read_bytes()
    end = whole.rindex(content_of("b/3.png")) + len(content_of("b/3.png"))
    for cut in [*range(0, end, 100), *range(0, end, 512)]:
        path.write_bytes(whole[:cut])
        with pytest.raises((DataError, Unreadable)):
            found = open_tar(path)[""]
            for row in range(len(found)):
                found.inputs[row].read(10**6)


def test_a_tar_header_that_claims_ten_gigabytes(tmp_path):
    info = tarfile.TarInfo("1.png")
    info.size = 10 * 2**30
    for kind in (tarfile.REGTYPE, tarfile.XHDTYPE, tarfile.GNUTYPE_LONGNAME):
        info.type = kind
        header = info.tobuf(tarfile.GNU_FORMAT)
        path = tmp_path / "x.tar"
        path.write_bytes(header + bytes(4096))
        with pytest.raises(DataError, match="cannot be read as a tar"):
            open_tar(path)


def test_a_header_of_a_gigabyte_is_not_read_though_it_is_there(tmp_path):
    info = tarfile.TarInfo("1.png")
    info.type, info.size = tarfile.XHDTYPE, 2**30
    path = tmp_path / "x.tar"
    path.write_bytes(info.tobuf(tarfile.GNU_FORMAT))
    os.truncate(path, 2**31)  # takes no space
    with pytest.raises(DataError, match="a header claims 1073741824 bytes"):
        open_tar(path)


@pytest.mark.parametrize("content", [b"", b"no archive at all", bytes(1024)])
def test_what_is_no_archive_is_refused(tmp_path, content):
    path = tmp_path / "x"
    path.write_bytes(content)
    for opened in (open_zip, open_tar):
        with pytest.raises(DataError):
            opened(path)


def test_a_zip_with_offsets_beyond_64_bits_is_refused(tmp_path):
    path = write_zip(tmp_path / "x.zip", ["1.png"], zipfile.ZIP_STORED)
    content = bytearray(path.read_bytes())
    directory = content.index(b"PK\x01\x02")
    extra = struct.pack("<HHQ", 1, 8, 2**64 - 1)  # the zip64 field, with the offset alone
    content[directory + 42 : directory + 46] = b"\xff" * 4
    content[directory + 30 : directory + 32] = struct.pack("<H", len(extra))
    name_end = directory + 46 + len("1.png")
    content[name_end:name_end] = extra
    end = content.index(b"PK\x05\x06")
    size = struct.unpack("<I", content[end + 12 : end + 16])[0]
    content[end + 12 : end + 16] = struct.pack("<I", size + len(extra))
    path.write_bytes(content)
    with pytest.raises(DataError):
        open_zip(path)
