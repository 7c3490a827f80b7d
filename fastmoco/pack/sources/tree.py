"""The folders that hold images, as a tree; and what their names say."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

_TOKEN = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+|\d+|[^\W\d_]+")
_SPLITS = frozenset(
    {
        *(
            "train",
            "training",
            "trainval",
            "trainset",
            "val",
            "valid",
            "validation",
            "dev",
            "holdout",
        ),
        *("test", "testing", "testset", "eval", "evaluation", "unlabeled", "unlabelled", "extra"),
    }
)
_TRAINING = frozenset(["train", "training", "trainval", "trainset"])
_WORDS_OF_FOLDERS = frozenset(
    {
        *("set", "sets", "split", "data", "dataset", "images", "image", "imgs", "img", "pictures"),
        *("photos", "samples", "full", "all", "raw", "folder", "tar", "shard", "shards"),
    }
)
_PLAIN = frozenset(
    {
        *("images", "image", "imgs", "img", "jpegimages", "pictures", "pics", "photos", "frames"),
        *("data", "jpg", "jpeg", "png", "jpgs", "jpegs", "pngs", "all", "files", "raw"),
    }
)


@dataclass(eq=False)
class Node:
    """A folder that holds images, or folders that do.

    Attributes:
        path: from the root, with slashes; "" for the root.
        number: among the folders that hold images themselves, -1 if it does not.
        direct: images in the folder itself.
        total: images in it and below.
        children: by name.
    """

    path: str
    number: int = -1
    direct: int = 0
    total: int = 0
    children: dict[str, "Node"] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """The folder's own name."""
        return self.path.rpartition("/")[2]

    @property
    def only_child(self) -> "Node | None":
        """The one folder that holds all images, None if there is no such one."""
        alone = not self.direct and len(self.children) == 1
        return next(iter(self.children.values())) if alone else None

    def folders(self) -> Iterator["Node"]:
        """Yield those that hold images themselves, this one included."""
        if self.direct:
            yield self
        for child in self.children.values():
            yield from child.folders()

    def holds(self, path: str) -> bool:
        """Return whether a path lies below this folder."""
        return not self.path or path.startswith(f"{self.path}/")

    def paths(self) -> set[str]:
        """Return the paths of this folder and of those below that hold images, or folders do."""
        return {self.path}.union(*(child.paths() for child in self.children.values()))

    def below(self, path: str) -> list[str]:
        """Return the parts of the path of a folder below this one."""
        return path[len(self.path) + bool(self.path) :].split("/")


def make_tree(folders: Sequence[str], counts: npt.NDArray[np.int64]) -> Node:
    """Return the root of a tree.

    Args:
        folders: those that hold images themselves, with slashes.
        counts: of the images in each.
    """
    root = Node("")
    for number, (folder, count) in enumerate(zip(folders, counts.tolist(), strict=True)):
        node = root
        node.total += count
        for part in folder.split("/") if folder else ():
            path = f"{node.path}/{part}" if node is not root else part
            node = node.children.setdefault(part, Node(path))
            node.total += count
        node.number, node.direct = number, count
    return root


def tokens(name: str) -> list[str]:
    """Return the words and numbers of a name, in small letters: `trainImages_2017` has three."""
    return [token.lower() for token in _TOKEN.findall(name)]


def is_plain(name: str) -> bool:
    """Return whether a folder's name says that images are in it, and nothing else of them."""
    return name.lower() in _PLAIN


def is_training(name: str) -> bool:
    """Return whether a split is the one to train on."""
    return not _TRAINING.isdisjoint(tokens(name))


def says_split(name: str) -> bool:
    """Return whether one of the words of a name is that of a split."""
    return not _SPLITS.isdisjoint(tokens(name))


def split_word(name: str) -> str:
    """Return the first word of a name that says split, in small letters; "" if none does."""
    return next((token for token in tokens(name) if token in _SPLITS), "")


def is_split(name: str) -> bool:
    """Return whether a name says split and nothing of what is in it."""
    return says_split(name) and not _rest(name)


def agree_on_splits(names: Sequence[str]) -> bool:
    """Return whether names that all say split mean it: they are alike but for the split's word.

    `train_station` and `test_tube` say it too, and so do `positive_test` and `negative_test`.
    """
    rests = [_rest(name) for name in names]
    common = set.intersection(*rests)
    if all(not (rest - common) for rest in rests):
        return True
    # trainA, trainB, testA, testB: each rest comes with more than one split.
    words: dict[frozenset[str], set[str]] = {}
    for name, rest in zip(names, rests, strict=True):
        words.setdefault(frozenset(rest), set()).add(split_word(name))
    return all(len(found) > 1 for found in words.values())


def one_split_word(names: Sequence[str]) -> bool:
    """Return whether names say the same split, so that it does not tell them apart."""
    return len({frozenset(_SPLITS.intersection(tokens(name))) for name in names}) == 1


def _rest(name: str) -> set[str]:
    """Return the words of a name that say more than which split of which images it is."""
    found = tokens(name)
    return {t for t in found if not (t in _SPLITS or t in _WORDS_OF_FOLDERS or t.isdigit())}
