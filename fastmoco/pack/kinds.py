"""What a file is: by its name where that tells enough, else by its first bytes.

A known extension says which files are meant as images, so that listing millions of them opens none;
what they are is seen when they are decoded. Files that have another extension or none are looked
at, and so are those whose extension stands for what is no image that training can read: a PNG may
be called `.heic`.
"""

import re
from collections.abc import Callable
from enum import Enum
from functools import cache
from importlib.util import find_spec
from typing import NamedTuple

START = 32  # bytes from which every kind below is known


class Fate(Enum):
    """What becomes of a file."""

    IMAGE = "is decoded"
    LEFT_OUT = "looks like an image and is none that can be packed: counted and listed"
    PASSED = "is not meant as an image: counted"


class Verdict(NamedTuple):
    """What becomes of a file, and why: the reason, or the group that it is counted in."""

    fate: Fate
    about: str = ""


IMAGE = Verdict(Fate.IMAGE)
SIDE_FILES, VIDEOS, ARCHIVES = "captions and side files", "videos", "archives"
HIDDEN, OTHERS = "hidden and system files and folders", "files of other kinds"
RAW_BESIDE = "raw camera files beside their image"

HEIC = "is HEIC, which the extra heif reads: pip install pillow-heif"
JPEG_2000 = "is JPEG 2000: convert it to PNG"
JPEG_XL = "is JPEG XL: convert it to PNG"
PHOTOSHOP = "is a Photoshop document: convert it to PNG"
RAW = "is a raw camera file: convert it to JPEG or PNG"

_IMAGES = "jpg jpeg jpe jfif pjpeg pjp mpo png apng webp bmp dib tif tiff gif avif pbm pgm pnm ppm"
_RAW = (
    "3fr arw cr2 cr3 crw dcr dng erf fff iiq k25 kdc mef mos mrw nef nrw orf pef raf raw rw2 rwl"
    " sr2 srf srw x3f"
)
_LEFT_OUT = {
    "heic heif heics heifs hif": HEIC,
    "jp2 j2k j2c jpc jpf jpx jpm": JPEG_2000,
    "jxl": JPEG_XL,
    "psd psb": PHOTOSHOP,
    "svg svgz eps": "is a vector drawing: convert it to PNG",
    "exr hdr": "holds high dynamic range: convert it to PNG",
    "dcm dicom": "is DICOM: convert it to PNG",
    "tga dds pcx ico icns xcf jxr wdp bpg flif": "is of another format: convert it to PNG",
    _RAW: RAW,
}
_PASSED = {
    "txt text json jsonl ndjson xml csv tsv md rst html htm yaml yml toml ini cfg conf log url lnk"
    " caption captions bbox cap tags xmp aae thm exif srt vtt npy npz pt pth ckpt pkl pickle mat h5"
    " hdf5 parquet arrow feather tfrecord rec idx lst py pyc ipynb c h cpp js css java r m sh bat"
    " pdf doc docx xls xlsx ppt pptx odt ods rtf tex bib db sqlite md5 sha1 sha256 ply obj stl"
    " wav mp3 flac ogg m4a aac": SIDE_FILES,
    "mp4 mov avi mkv webm m4v mpg mpeg wmv flv 3gp mts m2ts ogv": VIDEOS,
    "zip tar gz tgz bz2 xz zst 7z rar": ARCHIVES,
}
_BY_EXTENSION: dict[str, Verdict] = {
    extension: verdict
    for extensions, verdict in (
        (_IMAGES, IMAGE),
        *((names, Verdict(Fate.LEFT_OUT, why)) for names, why in _LEFT_OUT.items()),
        *((names, Verdict(Fate.PASSED, group)) for names, group in _PASSED.items()),
    )
    for extension in extensions.split()
}
_SYSTEM_FOLDERS = frozenset(
    {
        *(
            "@eadir",
            "@recycle",
            "@recently-snapshot",
            "@tmp",
            "#recycle",
            "#snapshot",
            "$recycle.bin",
        ),
        *(
            "recycler",
            "recycled",
            "system volume information",
            "lost+found",
            "__macosx",
            "__pycache__",
        ),
    }
)
_SYSTEM_FILES = frozenset(["thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"])

_TIFF = re.compile(rb"II[*+]\0|MM\0[*+]")
_STARTS: tuple[tuple[re.Pattern[bytes], Verdict], ...] = tuple(
    (re.compile(pattern, re.DOTALL), verdict)
    for pattern, verdict in (
        (rb"\xff\xd8\xff", IMAGE),
        (rb"\x89PNG\r\n\x1a\n", IMAGE),
        (rb"GIF8[79]a", IMAGE),
        (rb"RIFF....WEBP", IMAGE),
        (rb"BM.{4}\0{4}.{4}[\x0c\x28\x34\x38\x40\x6c\x7c]\0\0\0", IMAGE),
        (rb"....ftypavi[fs]", IMAGE),
        (rb"P[1-6]\s+(#|\d+\s)", IMAGE),
        (rb"....ftyp(hei[cxms]|hev[cxms]|mif1|msf1)", Verdict(Fate.LEFT_OUT, HEIC)),
        (rb"\0\0\0\x0cjP  |\xff\x4f\xff\x51", Verdict(Fate.LEFT_OUT, JPEG_2000)),
        (rb"\xff\x0a|\0\0\0\x0cJXL ", Verdict(Fate.LEFT_OUT, JPEG_XL)),
        (rb"8BPS", Verdict(Fate.LEFT_OUT, PHOTOSHOP)),
        (
            rb"....ftypcrx|FUJIFILMCCD-RAW|IIU\0|IIR[OS]|MMOR|FOVb|(II\*\0.{4}CR)",
            Verdict(Fate.LEFT_OUT, RAW),
        ),
        (_TIFF.pattern, IMAGE),
    )
)


def judge(name: str, start: Callable[[], bytes]) -> Verdict:
    """Return what becomes of a file.

    Args:
        name: its path, with slashes.
        start: gives its first `START` bytes; called only where the name does not tell enough.
    """
    base = name.rpartition("/")[2]
    stem, _, extension = base.rpartition(".")
    if base.startswith(".") or base.lower() in _SYSTEM_FILES:
        return Verdict(Fate.PASSED, HIDDEN)
    by_name = _BY_EXTENSION.get(extension.lower()) if stem else None
    if by_name is None:
        return by_content(start()) or Verdict(Fate.PASSED, OTHERS)
    if by_name.fate is not Fate.LEFT_OUT:
        return by_name
    first = start()
    if by_name.about == RAW and _TIFF.match(first):  # which most of them are, by their first bytes
        return by_name
    return by_content(first) or _readable(by_name)


def by_content(start: bytes) -> Verdict | None:
    """Return what the first bytes of a file say, None for what looks like no image."""
    found = next((verdict for pattern, verdict in _STARTS if pattern.match(start)), None)
    return found and _readable(found)


def _readable(verdict: Verdict) -> Verdict:
    return IMAGE if verdict.about == HEIC and heif_is_read() else verdict


@cache
def heif_is_read() -> bool:
    """Return whether the extra is installed that reads HEIC."""
    return find_spec("pillow_heif") is not None


def hidden_folder(folder: str) -> bool:
    """Return whether a folder, by its own name, is hidden or one that systems make."""
    hidden = folder.startswith(".") and folder not in (".", "..")
    return hidden or folder.lower() in _SYSTEM_FOLDERS
