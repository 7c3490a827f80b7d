"""Shards of webdataset and img2dataset, whose images are packed anew.

`fastmoco index` adopts such shards as they are; packing also takes the images that training cannot
read as they are stored.
"""

from collections.abc import Sequence
from itertools import islice
from pathlib import Path

import numpy as np

from fastmoco.dataset.classes import Found
from fastmoco.errors import DataError
from fastmoco.pack.foreign import BESIDE, Contents, get_label
from fastmoco.pack.inputs import ArchiveInputs, Concat, Span
from fastmoco.pack.kinds import hidden_folder
from fastmoco.pack.sources.agree import in_one_numbering
from fastmoco.pack.sources.archive import refuse_compressed
from fastmoco.pack.sources.base import Names, Passed, Reject, Source, by_name, check_labels
from fastmoco.pack.sources.tree import agree_on_splits, says_split, split_word
from fastmoco.pack.tar import Damage, Member, walk

_LOOKED_AT = 64  # members: enough to see whether anything stands beside the images


def is_webdataset(path: Path) -> bool:
    """Return whether a tar, or the first one of a folder without folders, is a shard.

    It is if labels stand beside its images, or other texts and all lies in one folder: there may be
    captions in class folders, too.
    """
    tars = get_shards(path) if path.is_dir() else [path]
    if not tars or tars[0].suffix != ".tar" or (path.is_dir() and _has_folders(path)):
        return False
    members = [m for m in islice(walk(tars[0]), _LOOKED_AT) if isinstance(m, Member)]
    contents = Contents(members)
    flat = len({image.name.rpartition("/")[0] for image in contents.images}) == 1
    sides = ("cls", "json", "txt") if flat else ("cls",)
    return any(contents.side(image, side) for image in contents.images for side in sides)


def _has_folders(path: Path) -> bool:
    folders = (entry.name for entry in path.iterdir() if entry.is_dir())
    return any(not hidden_folder(name) and name != "_tmp" for name in folders)  # of img2dataset


def get_shards(folder: Path) -> list[Path]:
    """Return the tars of a folder, in the order of their names."""
    return sorted(path for path in folder.glob("[!.]*.tar") if path.is_file())


def get_splits(shards: Sequence[Path]) -> dict[str, list[Path]]:
    """Return shards by the split that their names say; "" for all if they do not say one each.

    `imagenet-train-0007.tar` says train, if there is another split beside it.
    """
    stems = [shard.stem for shard in shards]
    if not all(map(says_split, stems)) or not agree_on_splits(stems):
        return {"": list(shards)}
    found: dict[str, list[Path]] = {}
    for shard, stem in zip(shards, stems, strict=True):
        found.setdefault(split_word(stem), []).append(shard)
    return found if len(found) > 1 else {"": list(shards)}


def open_webdataset(path: Path, unlabelled: bool = False) -> dict[str, Source]:
    """Open the samples of shards: their image, and the label in their member `.cls`.

    Args:
        path: a tar, or a folder of them.
        unlabelled: read no labels.

    Returns:
        The source of each split that the shards' names say, "" without splits.

    Raises:
        DataError: a shard is damaged or compressed, there is no image, or a split has a class that
            the one to train on has not.
    """
    shards = get_shards(path) if path.is_dir() else [path]
    if not shards:
        raise DataError(f"{path} holds no *.tar.")
    sources = {
        split: _source(mine, f"{path} {split}".rstrip(), unlabelled)
        for split, mine in get_splits(shards).items()
    }
    return in_one_numbering(sources, str(path))


def _source(shards: Sequence[Path], where: str, unlabelled: bool) -> Source:
    names, parts, left_out = Names(), list[ArchiveInputs](), list[Reject]()
    values, codes = Found(), list[int]()
    passed: dict[str, Passed] = {}
    has_json = False
    for shard in shards:
        refuse_compressed(shard)
        contents = Contents(_members(shard))
        places: list[tuple[int, int]] = []
        with shard.open("rb") as stream:
            for image, reason in contents.images_and_faults():
                name = f"{shard.name}!{image.name}"
                if reason == BESIDE:
                    passed.setdefault("further images of samples", Passed(name)).count += 1
                    continue
                if reason:
                    left_out.append(Reject(name, reason))
                    continue
                names.add(name)
                places.append((image.offset, image.size))
                value = None if unlabelled else get_label(stream, contents, image, None)
                codes.append(-1 if value is None else values.code(value))
                has_json = has_json or contents.side(image, "json") is not None
        table = np.array(places, dtype=np.int64).reshape(-1, 2)
        parts.append(ArchiveInputs(shard, Span, table, table[:, 1]))
    if not names:
        raise DataError(f"{where} holds no images.")
    labels, classes = values.get_labels(codes)
    check_labels(labels, classes, where)
    notes = []
    if has_json and not classes and not unlabelled:
        notes = ["the .json members may hold labels: fastmoco index --label-key FIELD reads them"]
    return Source(
        names=names,
        labels=labels,
        classes=classes,
        inputs=Concat(parts),
        left_out=sorted(left_out, key=by_name),
        passed=passed,
        labels_from="the .cls members" if classes else "",
        notes=notes,
    )


def _members(shard: Path) -> list[Member]:
    members = []
    for member in walk(shard):
        if isinstance(member, Damage):
            raise DataError(f"{shard} cannot be read as a tar: it {member.reason}.")
        members.append(member)
    return members
