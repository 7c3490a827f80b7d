"""What the layout of folders says: which split and which class an image belongs to.

Everything is read from the folders that hold images, never from one image at a time: there are few
folders. Where two readings are plausible, none is taken: both are named, and the option that
chooses.
"""

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import numpy as np
import numpy.typing as npt

from fastmoco.errors import DataError
from fastmoco.pack.inputs import Inputs, Picked
from fastmoco.pack.kinds import ARCHIVES
from fastmoco.pack.sources.agree import few, matched
from fastmoco.pack.sources.base import Names, Passed, Reject, Source, by_name, numbered
from fastmoco.pack.sources.found import Found, folder_of
from fastmoco.pack.sources.masks import few_valued, masked_folders, stems_of
from fastmoco.pack.sources.tree import (
    Node,
    agree_on_splits,
    is_plain,
    is_split,
    is_training,
    one_split_word,
    says_split,
    tree_of,
)

T = TypeVar("T")

CLASSES_AT = ("1", "2", "leaf", "path")
_LEVELS = {
    "1": "folders",
    "2": "folders of the second level",
    "leaf": "the innermost folders",
    "path": "folders with those above them",
}
NO_IMAGES = "folders without images"
BESIDE_CLASSES = "lies beside the class folders"
BESIDE_SPLITS = "lies beside the splits"
# A folder that holds nothing at all may be a class that got lost, but not one of these names.
_NO_CLASSES = frozenset(
    {
        *("annotation", "annotations", "doc", "docs", "label", "labels", "log", "logs", "output"),
        *("outputs", "result", "results", "script", "scripts", "src", "temp", "tmp"),
    }
)


@dataclass(frozen=True)
class How:
    """How folders are to be read.

    Attributes:
        unlabelled: their names are no classes.
        classes_at: one of `CLASSES_AT`; None: recognised.
        known: the classes of the set to be like, of which images may be missing here.
        wrapped: one folder around all images is none of a class, as archives have it.
    """

    unlabelled: bool = False
    classes_at: str | None = None
    known: Sequence[str] = ()
    wrapped: bool = False


@dataclass
class Branch:
    """One split of a layout.

    Attributes:
        base: the folder that holds it.
        classes: the class of each folder of it, by the folder's number; "" without classes.
        strays: why the images of a folder are left out, by its number.
        labels_from: see `Source`.
        notes: see `Source`.
    """

    base: Node
    classes: dict[int, str]
    strays: dict[int, str] = field(default_factory=dict)
    labels_from: str = ""
    notes: list[str] = field(default_factory=list)


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
    codes, folders = numbered(map(folder_of, paths))
    root = tree_of(folders, np.bincount(codes, minlength=len(folders)))

    def rows_of(node: Node) -> npt.NDArray[np.int64]:
        numbers = [one.number for one in node.folders()]
        return np.flatnonzero(np.isin(codes, numbers))

    def rejects(reasons: Mapping[int, str]) -> list[Reject]:
        return [
            Reject(names[row], reason)
            for number, reason in reasons.items()
            for row in np.flatnonzero(codes == number).tolist()
        ]

    looks = _Looks(
        stems=_remembered(lambda node: stems_of(names, rows_of(node))),
        few=_remembered(lambda node: few_valued(inputs, rows_of(node).tolist())),
    )
    branches, beside = _Reader(found, where, how, looks).branches(root)
    agreed = _agreed(branches, where)
    sources: dict[str, Source] = {}
    untold = list(found.left_out)
    for split, branch in branches.items():
        left_out = [r for r in untold if _is_below(r.name, branch.base)]
        untold = [r for r in untold if not _is_below(r.name, branch.base)]
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


def _remembered(look: Callable[[Node], T]) -> Callable[[Node], T]:
    known: dict[str, T] = {}

    def remembered(node: Node) -> T:
        if node.path not in known:
            known[node.path] = look(node)
        return known[node.path]

    return remembered


def _instead(found: Found) -> str:
    """Return what a source holds in place of images."""
    for reject in found.left_out:
        return f" ({reject.name} {reject.reason})"
    held = ", ".join(f"{one.count} {kind} ({one.first})" for kind, one in found.passed.items())
    several = ", pack each by itself or unpack it" if ARCHIVES in found.passed else ""
    return held and f"; it holds {held}{several}"


def _is_below(name: str, base: Node) -> bool:
    return not base.path or name.startswith(f"{base.path}/")


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
        names, inputs = names.pick(rows), Picked(inputs, rows)
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
    bare = sorted(f for f in found.folders if f not in held and folder_of(f) in held)
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


@dataclass(frozen=True)
class _Looks:
    """Looks at images, for which few folders give a reason; see `masks`."""

    stems: Callable[[Node], set[str]]
    few: Callable[[Node], bool]


class _Reader:
    """Reads a tree of folders; see `sources_by_layout`."""

    def __init__(self, found: Found, where: str, how: How, looks: _Looks) -> None:
        self.found, self.where, self.how, self.looks = found, where, how, looks

    def branches(self, root: Node) -> tuple[dict[str, Branch], dict[int, str]]:
        """Return the splits, and why the images beside them are left out, by folder."""
        node = root
        while (child := node.only_child) is not None and not is_split(child.name):
            node = child
        self._refuse_masks(node)
        splits = self._splits(node)
        if not splits:
            return {"": self._branch(root, "", ())}, {}
        beside = {node.number: BESIDE_SPLITS} if node.direct else {}
        for child in node.children.values():
            if child not in splits:
                beside |= {folder.number: BESIDE_SPLITS for folder in child.folders()}
        # Those to train on come first: their classes are what a single folder elsewhere may be.
        ordered = sorted(splits, key=lambda child: not is_training(child.name))
        branches: dict[str, Branch] = {}
        for child in ordered:
            known = [name for branch in branches.values() for name in branch.classes.values()]
            branches[child.name] = self._branch(child, child.name, known)
        return {child.name: branches[child.name] for child in splits}, beside

    def _splits(self, node: Node) -> list[Node]:
        """Return the children that are splits; see the rule in the README."""
        children = list(node.children.values())
        said = [child for child in children if says_split(child.name)]
        names = [child.name for child in said]
        if not said:
            return []
        others = [child for child in children if child not in said]
        if len(said) == 1:
            alone = not others and not node.direct
            return said if (alone or _have_folders(said, others)) and is_split(names[0]) else []
        if others or node.direct:
            return said if _have_folders(said, others) and agree_on_splits(names) else []
        if agree_on_splits(names):
            return said
        if one_split_word(names) or self.how.classes_at:
            return []
        raise DataError(
            f"The folders of {self._in(node)} ({few(names)}) may be splits or classes: "
            "--classes-at 1 takes them as classes; pack splits one by one, each folder by itself."
        )

    def _branch(self, base: Node, split: str, known: Sequence[str]) -> Branch:
        """Return what the folders below `base` say.

        Args:
            base: folder of a split, or the root.
            split: its name.
            known: the classes of the split to train on.
        """
        inner, single = base, ""
        while (child := inner.only_child) is not None:
            single = single or ("" if is_plain(child.name) else child.name)
            inner = child
        every = {folder.number: "" for folder in base.folders()}
        if self.how.unlabelled:
            return Branch(base, every)
        if not inner.children:
            if single in matched([single], [*known, *self.how.known]):
                return self._labelled(base, {number: single for number in every}, {}, 1)
            if single and not (self.how.wrapped and not split) and not known:
                raise _single_class(self._in(base), single)
            return Branch(base, every)
        self._refuse_masks(inner)
        if self.how.classes_at is None and self._is_img2dataset(inner):
            note = "the numbered folders are those of img2dataset, and no classes"
            return Branch(base, every, notes=[note])
        if self.how.classes_at is None:
            self._refuse_splits_below(inner)
            self._refuse_two_readings(inner)
        return self._by_depth(base, inner, self.how.classes_at or "1", known)

    def _by_depth(self, base: Node, inner: Node, at: str, known: Sequence[str]) -> Branch:
        classes: dict[int, str] = {}
        strays: dict[int, str] = {}
        shared = _shared_end([inner.below(one.path) for one in inner.folders() if one is not inner])
        for folder in inner.folders():
            parts = inner.below(folder.path) if folder is not inner else []
            name = _class_at(parts, at, shared)
            if name is None:
                strays[folder.number] = BESIDE_CLASSES
            else:
                classes[folder.number] = name
        counts = {folder.number: folder.direct for folder in inner.folders()}
        stray = sum(counts[number] for number in strays)
        if 2 * stray >= base.total or not classes:
            raise DataError(
                f"{self._in(inner)} holds images beside class folders: move them into a class, or "
                "pass --unlabelled."
            )
        found = set(classes.values())
        if len(found) == 1 and not strays:
            raise _single_class(self._in(inner), found.pop())
        if len(found) == 1:
            raise DataError(
                f"{self._in(inner)} holds images beside class folders, of which there is one: "
                "move them into a class, or pass --unlabelled."
            )
        self._refuse_lost_classes(inner, at, shared, sorted(found.union(known, self.how.known)))
        branch = self._labelled(base, classes, strays, at)
        deeper = sum(f.direct for f in inner.folders() if len(inner.below(f.path)) > 1 + shared)
        if at == "1" and deeper:
            branch.notes.append(f"{deeper} images lie in folders below that of their class")
        return branch

    def _labelled(
        self, base: Node, classes: dict[int, str], strays: dict[int, str], at: int | str
    ) -> Branch:
        return Branch(base, classes, strays, f"the names of {_LEVELS[str(at)]}")

    def _refuse_masks(self, node: Node) -> None:
        """Refuse images beside their masks, unless folders are asked for as classes."""
        if self.how.classes_at:
            return
        found = masked_folders(node, self.looks.stems, self.looks.few)
        if found:
            mask, image = found
            alone = (
                f"unpack the archive and pack {image.path} alone"
                if self.how.wrapped
                else f"pack the images alone, fastmoco shard {self._in(image)} OUT"
            )
            raise DataError(
                f"{self._in(mask)} holds masks of the images in {image.name}, not images of a "
                f"class: {alone}; or take both folders as classes by --classes-at 1."
            )

    def _refuse_splits_below(self, inner: Node) -> None:
        below = [list(child.children) for child in inner.children.values() if child.children]
        names = sorted({name for names in below for name in names})
        if len(names) < 2 or not all(map(says_split, names)) or one_split_word(names):
            return
        raise DataError(
            f"{self._in(inner)} has splits ({few(names)}) below its folders "
            f"({few(list(inner.children))}): pack each of these by itself, or mix the splits and "
            "take the folders as classes by --classes-at 1."
        )

    def _refuse_two_readings(self, inner: Node) -> None:
        """Refuse folders of folders, whose classes may be the outer or the inner ones."""
        deep = [c for c in inner.children.values() if 2 * c.direct < c.total]
        ends = {tuple(c.below(folder.path)) for c in deep for folder in c.folders()}
        if len(ends) <= 1:
            return
        readings = []
        for at in CLASSES_AT:
            names = sorted(self._names_at(inner, at), key=os.fsencode)
            readings.append(f"\n  --classes-at {at:<4} gives {len(names)} classes: {few(names)}")
        raise DataError(
            f"The folders of {self._in(inner)} can be read in more than one way; choose:"
            f"{''.join(readings)}"
        )

    def _names_at(self, inner: Node, at: str) -> set[str]:
        paths = [inner.below(one.path) for one in inner.folders() if one is not inner]
        shared = _shared_end(paths)
        return {name for parts in paths if (name := _class_at(parts, at, shared)) is not None}

    def _is_img2dataset(self, inner: Node) -> bool:
        """Whether folders are numbered as img2dataset does: `00012/000120034.jpg`."""
        names = list(inner.children)
        if inner.direct or not all(n.isdigit() and len(n) == len(names[0]) > 2 for n in names):
            return False
        return all(
            all(stem.isdigit() and stem.startswith(child.name) for stem in self.looks.stems(child))
            and not child.children
            for child in inner.children.values()
        ) and self._has_side_files(inner)

    def _has_side_files(self, inner: Node) -> bool:
        return bool(self.found.filled & {inner.path, *(c.path for c in inner.children.values())})

    def _refuse_lost_classes(self, inner: Node, at: str, shared: int, known: Sequence[str]) -> None:
        """Refuse a class of which no image is left: numbers of the classes behind it would shift.

        Raises:
            DataError: naming the class.
        """
        for reject in self.found.left_out:
            parts = inner.below(reject.name)
            if not _is_below(reject.name, inner) or ".." in parts or "" in parts:
                continue
            is_link = reject.reason.startswith("is a link")  # to a folder, perhaps
            name = _class_at(parts if is_link else parts[:-1], at, shared)
            if name is not None and name not in matched([name], known):
                raise DataError(
                    f"All of the class {name} is left out ({reject.name} {reject.reason}): mend "
                    "that, or take it out of the source."
                )
        held = inner.paths()
        for folder in sorted(self.found.folders - held, key=os.fsencode):
            if not _is_below(folder, inner) or not self._is_empty(folder):
                continue
            parts = inner.below(folder)
            name = _class_at(parts, at, 0) if len(parts) <= (2 if at == "2" else 1) else None
            if name is None or name.lower() in _NO_CLASSES:
                continue
            if name not in matched([name], known):
                raise DataError(
                    f"{self._in(inner)}/{name} holds no images: fill the class or remove the "
                    "folder; for a test set, --like TRAIN takes the classes of the training set."
                )

    def _is_empty(self, folder: str) -> bool:
        filled = any(f"{other}/".startswith(f"{folder}/") for other in self.found.filled)
        return not filled

    def _in(self, node: Node) -> str:
        return f"{self.where}/{node.path}" if node.path else self.where


def _have_folders(said: Sequence[Node], others: Sequence[Node]) -> bool:
    """Whether the folders that say split hold folders, and the others do not."""
    deep = all(child.children and not child.direct for child in said)
    return deep and not any(child.children for child in others)


def _shared_end(paths: Sequence[Sequence[str]]) -> int:
    """Return how many folders all paths end in alike, as in `CLASS/images`; one is left at least.

    Args:
        paths: the parts of each.
    """
    if len(paths) < 2:
        return 0
    shared = 0
    shortest = min(map(len, paths))
    while shared + 1 < shortest and len({path[-1 - shared] for path in paths}) == 1:
        shared += 1
    return shared


def _class_at(parts: Sequence[str], at: str, shared: int) -> str | None:
    """Return the class that a folder belongs to, None if it lies above the classes."""
    parts = parts[: len(parts) - shared] if shared else parts
    if at == "path":
        return "/".join(parts) or None
    place = {"1": 0, "2": 1, "leaf": len(parts) - 1}[at]
    return parts[place] if 0 <= place < len(parts) else None


def _single_class(where: str, name: str) -> DataError:
    return DataError(
        f"{where} has a single class folder ({name}), and everything in one class gives "
        "100 % accuracy: pass --unlabelled to pack without labels."
    )
