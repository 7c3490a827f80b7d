"""Known image sets: what a `shards/*.yaml` says of a set, and whether a source is that set."""

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field, field_validator

from fastmoco.core.strict_yaml import Count, Strict, near, parse_yaml, validate_as
from fastmoco.errors import DataError, UsageError
from fastmoco.pack.options import PackOptions
from fastmoco.pack.packer import sources_for
from fastmoco.pack.sources import FORMATS
from fastmoco.pack.sources.base import Source

FileName = Annotated[str, Field(pattern=r"^[^/\\]+$")]
Checksum = Annotated[str, Field(pattern=r"^(md5:[0-9a-f]{32}|sha256:[0-9a-f]{64})$")]


class Split(Strict):
    """One split of a known set.

    Attributes:
        images: how many it has.
        labelled: whether they have labels.
        optional: whether the set is whole without it.
    """

    images: Count
    labelled: bool = True
    optional: bool = False


class Options(Strict):
    """Pack options that suit the set; those given on the command line come first."""

    shard_mb: Count | None = None
    short_side: Count | None = None
    square: Count | None = None
    quality: Annotated[int, Field(ge=1, le=100)] | None = None
    min_side: Count | None = None


class Spec(Strict):
    """A known image set.

    Attributes:
        about: what it is, in one line.
        format: a name of `sources.FORMATS`.
        classes: their number or their names.
        checksums: of files as published; a file that is not there is not missed.
    """

    name: str
    about: Annotated[str, Field(pattern=r"^[^\n]+$")]
    format: str
    splits: Annotated[dict[str, Split], Field(min_length=1)]
    classes: Count | list[str]
    checksums: dict[FileName, Checksum] = Field(default_factory=dict)
    options: Options = Options()

    @field_validator("format")
    @classmethod
    def _known_format(cls, value: str) -> str:
        if value not in FORMATS:
            hint = near(value, list(FORMATS)).removesuffix(".")
            raise ValueError(f"there is no format {value!r}{hint}")
        return value


def load_spec(path: Path) -> Spec:
    """Read the description of a known set.

    Raises:
        UsageError: no such file, an unknown key, or a value that does not fit.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"The description {path} cannot be read: {error}.") from error
    return validate_as(Spec, parse_yaml(text, str(path)), str(path))


def open_known(
    path: Path, source: Path | None, out: Path, given: Mapping[str, Any]
) -> tuple[PackOptions, dict[str, Source]]:
    """Open a known set, once it is sure that the source is that set.

    Args:
        path: of the description.
        source: where the images lie.
        out: see `writer.sources_for`.
        given: options that the user gave, by their names in `PackOptions`.

    Returns:
        The options that suit the set, and its splits, for `writer.pack_sources`.

    Raises:
        UsageError: the description is faulty, or there is no source.
        DataError: the source is not the set described.
    """
    spec = load_spec(path)
    if source is None:
        raise UsageError(f"{path} describes {spec.name}: say by --source DIR where its files lie.")
    suited = spec.options.model_dump(exclude_none=True)
    options = PackOptions(**{"format": spec.format, **suited, **given})
    sources = sources_for(source, out, options)
    check(spec, sources, source, options.unlabelled)
    return options, sources


def check(
    spec: Spec, sources: Mapping[str, Source], source_dir: Path, unlabelled: bool = False
) -> None:
    """Refuse a source that is not the set described: splits, counts, classes, checksums.

    Args:
        source_dir: the folder or file that `sources` were opened from. Files with a checksum are
            looked for here and one folder below, and read in full.
        unlabelled: the sources were opened without labels.

    Raises:
        DataError: naming what is wrong, what was expected and what was found.
    """
    _check_splits(spec, sources)
    for split, source in sources.items():
        expected = spec.splits[split]
        if len(source) != expected.images:
            raise DataError(
                f"{spec.name}, split {split}: expected {expected.images} images, found "
                f"{len(source)}: get the files again."
            )
        if not unlabelled:
            _check_classes(spec, split, source.classes)
    for name, checksum in spec.checksums.items():
        for file in _files(source_dir, name):
            _check_sum(spec, file, checksum)


def _check_splits(spec: Spec, sources: Mapping[str, Source]) -> None:
    needed = {name for name, split in spec.splits.items() if not split.optional}
    missing, odd = sorted(needed - set(sources)), sorted(set(sources) - set(spec.splits))
    if missing or odd:
        raise DataError(
            f"{spec.name}: expected the splits {', '.join(spec.splits)}, found "
            f"{', '.join(filter(None, sources)) or 'none'}: name the folder that holds the whole "
            "set, or pack what there is without the description."
        )


def _check_classes(spec: Spec, split: str, found: list[str]) -> None:
    where = f"{spec.name}, split {split}"
    if not spec.splits[split].labelled:
        if found:
            raise DataError(f"{where}: expected no labels, found {len(found)} classes.")
        return
    number = spec.classes if isinstance(spec.classes, int) else len(spec.classes)
    if len(found) != number:
        raise DataError(f"{where}: expected {number} classes, found {len(found) or 'no labels'}.")
    # The order is the adapter's, or that of --like.
    if isinstance(spec.classes, list) and sorted(found) != sorted(spec.classes):
        odd = ", ".join(sorted(set(found) - set(spec.classes))[:5])
        raise DataError(f"{where}: expected the classes {', '.join(spec.classes)}, found {odd}.")


def _files(source_dir: Path, name: str) -> list[Path]:
    if source_dir.is_file():
        return [source_dir] if source_dir.name == name else []
    folders = [source_dir, *(entry for entry in source_dir.iterdir() if entry.is_dir())]
    return [folder / name for folder in folders if (folder / name).is_file()]


def _check_sum(spec: Spec, file: Path, checksum: str) -> None:
    kind, _, expected = checksum.partition(":")
    with file.open("rb") as stream:
        found = hashlib.file_digest(stream, lambda: _hasher(kind)).hexdigest()
    if found != expected:
        raise DataError(
            f"{spec.name}: {file} has the {kind} {found}, expected {expected}: it is damaged or "
            "another version; get it again."
        )


def _hasher(kind: str) -> "hashlib._Hash":
    # md5 as published guards against damage only: allowed where it is not for security.
    return hashlib.new(kind, usedforsecurity=False)
