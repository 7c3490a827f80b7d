"""What the layout of folders says: which split and which class an image belongs to.

Everything is read from the folders that hold images, never from one image at a time: there are few
folders. How they are read: see `reader`.
"""

import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from functools import cache

import numpy as np
import numpy.typing as npt

from fastmoco.dataset.classes import few
from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, InputSubset
from fastmoco.pack.kinds import ARCHIVES
from fastmoco.pack.sources.agree import matched
from fastmoco.pack.sources.base import Names, Passed, Reject, Source, by_name, numbered
from fastmoco.pack.sources.found import Found, get_folder
from fastmoco.pack.sources.masks import few_valued, get_stems, mask_beside
from fastmoco.pack.sources.reader import Branch, How, Looks, Reader
from fastmoco.pack.sources.tree import Node, is_training, make_tree

NO_IMAGES = "folders without images"


def sources_by_layout(
    found: Found, names: Names, paths: Iterable[str], inputs: Inputs, where: str, how: How
) -> dict[str, Source]:
    """Return the source of each split of what was found; "" where there are none.

    `train/cat/1.jpg` is of the split train and the class cat, `cat/1.jpg` of the class cat.

    Args:
        found: what is beside the images.
        names: of the images, in the order of their bytes.
        paths: the names with slashes, from which the layout is read.
        inputs: of each name.
        where: what holds them, for errors.
        how: see `How`.

    Raises:
        DataError: there are no images, the layout does not give sound labels, or it can be read
            in two ways.
    """
    if not names:
        raise DataError(f"{where} holds no images{_instead(found)}.")
    codes, folders = numbered(map(get_folder, paths))
    root = make_tree(folders, np.bincount(codes, minlength=len(folders)))
    mask = None if how.classes_at else mask_beside(names)
    if mask:
        raise DataError(
            f"{where} holds masks beside images ({mask}), and they are no images of a class: move "
            "them elsewhere, or take them as images by --classes-at 1."
        )

    def get_rows(node: Node) -> npt.NDArray[np.int64]:
        numbers = [one.number for one in node.folders()]
        return np.flatnonzero(np.isin(codes, numbers))

    def rejects(reasons: Mapping[int, str]) -> list[Reject]:
        return [
            Reject(names[row], reason)
            for number, reason in reasons.items()
            for row in np.flatnonzero(codes == number).tolist()
        ]

    looks = Looks(
        stems=cache(lambda node: get_stems(names, get_rows(node))),
        few=cache(lambda node: few_valued(inputs, get_rows(node).tolist())),
    )
    branches, beside = Reader(found, where, how, looks).branches(root)
    agreed = _agreed(branches, where)
    sources: dict[str, Source] = {}
    untold = list(found.left_out)
    for split, branch in branches.items():
        left_out = [r for r in untold if branch.base.holds(r.name)]
        untold = [r for r in untold if not branch.base.holds(r.name)]
        part = _source(branch, agreed, names, codes, inputs)
        sources[split] = replace(part, left_out=[*left_out, *rejects(branch.strays)])
    first = next(iter(sources))  # tells what belongs to no split, too
    others = [*sources[first].left_out, *untold, *rejects(beside)]
    sources[first] = replace(
        sources[first],
        left_out=others,
        passed=found.passed | _folders_without_images(found, root),
        notes=[*found.notes, *sources[first].notes],
    )
    return {s: replace(o, left_out=sorted(o.left_out, key=by_name)) for s, o in sources.items()}


def _instead(found: Found) -> str:
    """Return what a source holds in place of images."""
    for reject in found.left_out:
        return f" ({reject.name} {reject.reason})"
    held = ", ".join(f"{one.count} {kind} ({one.first})" for kind, one in found.passed.items())
    several = ", pack each by itself or unpack it" if ARCHIVES in found.passed else ""
    return held and f"; it holds {held}{several}"


def _source(
    branch: Branch,
    agreed: Sequence[str],
    names: Names,
    codes: npt.NDArray[np.int32],
    inputs: Inputs,
) -> Source:
    number_of = {name: number for number, name in enumerate(agreed)}
    means = matched(list(dict.fromkeys(branch.classes.values())), agreed)
    of_folder = np.full(int(codes.max()) + 1, -2, dtype=np.int32)
    for folder, name in branch.classes.items():
        of_folder[folder] = number_of[means[name]] if name else -1
    labels = of_folder[codes]
    rows = np.flatnonzero(labels > -2)
    if len(rows) < len(names):  # else a copy of all that there is
        names, inputs = names.pick(rows), InputSubset(inputs, rows)
    labelled = any(branch.classes.values())
    return Source(
        names=names,
        labels=labels[rows],
        classes=list(agreed) if labelled else [],
        inputs=inputs,
        left_out=[],
        labels_from=branch.labels_from,
        notes=branch.notes,
    )


def _folders_without_images(found: Found, root: Node) -> dict[str, Passed]:
    """Return the highest folders without images, as a group; none if there is none."""
    held = root.paths()
    bare = sorted(f for f in found.folders if f not in held and get_folder(f) in held)
    return {NO_IMAGES: Passed(bare[0], len(bare))} if bare else {}


def _agreed(branches: Mapping[str, Branch], where: str) -> list[str]:
    """Return the classes of all splits: those of the split to train on, which others may lack.

    Raises:
        DataError: a split has another class; or without a split to train on, they differ.
    """
    classes = {
        split: sorted(set(branch.classes.values()), key=os.fsencode)
        for split, branch in branches.items()
        if any(branch.classes.values())
    }
    if not classes:
        return []
    training = [split for split in classes if is_training(split)]
    first = max(training or classes, key=lambda split: len(classes[split]))
    for split, mine in classes.items():
        means = matched(mine, classes[first])
        odd = [name for name in mine if name not in means]
        lacking = [name for name in classes[first] if name not in means.values()]
        if odd or (lacking and (split in training or not training)):
            raise DataError(
                f"The splits of {where} ({', '.join(classes)}) differ in their classes "
                f"({few(odd or lacking)}): add what is missing, or pack each by itself."
            )
    return classes[first]
