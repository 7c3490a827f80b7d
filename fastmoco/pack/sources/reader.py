"""Reading a tree of folders: which are splits, which are classes, and what stops.

Where two readings are plausible, none is taken: both are named, and the option that chooses.
"""

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from fastmoco.dataset.classes import Known, few
from fastmoco.errors import DataError
from fastmoco.pack.sources.agree import matched
from fastmoco.pack.sources.found import Found
from fastmoco.pack.sources.masks import masked_folders
from fastmoco.pack.sources.tree import (
    Node,
    agree_on_splits,
    is_plain,
    is_split,
    is_training,
    one_split_word,
    says_split,
)

CLASSES_AT = ("1", "2", "leaf", "path")
_LEVELS = {
    "1": "folders",
    "2": "folders of the second level",
    "leaf": "the innermost folders",
    "path": "folders with those above them",
}
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
        classes_at: one of `CLASSES_AT`; None: recognized.
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


@dataclass(frozen=True)
class Looks:
    """Looks at images, for which few folders give a reason; see `masks`."""

    stems: Callable[[Node], set[str]]
    few: Callable[[Node], bool]


class Reader:
    """Reads a tree of folders; see `sources_by_layout`."""

    def __init__(self, found: Found, where: str, how: How, looks: Looks) -> None:
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
            known = {name for branch in branches.values() for name in branch.classes.values()}
            branches[child.name] = self._branch(child, child.name, sorted(known - {""}))
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
        if agree_on_splits(names) and (not others or _have_folders(said, others)):
            return said if 2 * node.direct < node.total else []
        if one_split_word(names) or self.how.classes_at:
            return []
        raise DataError(
            f"Some folders of {self._in(node)} ({few(names)}) may be splits or classes: pack "
            f"splits one by one, as in fastmoco shard {self._in(said[0])} OUT; --classes-at 1 "
            "takes them for classes or, with --unlabelled, as one set."
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
            if single in matched([single], sorted({*known, *self.how.known})):
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
            if len(names) < 2:  # nothing to tell apart
                continue
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
        classes = Known(known)
        for reject in self.found.left_out:
            parts = inner.below(reject.name)
            if not inner.holds(reject.name) or ".." in parts or "" in parts:
                continue
            is_link = reject.reason.startswith("is a link")  # to a folder, perhaps
            name = _class_at(parts if is_link else parts[:-1], at, shared)
            if name is not None and classes.code(name) is None:
                raise DataError(
                    f"All of the class {name} is left out ({reject.name} {reject.reason}): mend "
                    "that, or take it out of the source."
                )
        held = inner.paths()
        for folder in sorted(self.found.folders - held, key=os.fsencode):
            if not inner.holds(folder) or not self._is_empty(folder):
                continue
            parts = inner.below(folder)
            name = _class_at(parts, at, 0) if len(parts) <= (2 if at == "2" else 1) else None
            if name is None or name.lower() in _NO_CLASSES:
                continue
            if classes.code(name) is None:
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
