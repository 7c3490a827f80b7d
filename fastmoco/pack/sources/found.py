"""What is found below a folder or in an archive: images, what is left out, what is passed over."""

import os
from collections.abc import Callable
from dataclasses import dataclass, field

from fastmoco.pack.kinds import IMAGE, RAW, RAW_BESIDE, Fate, hidden_folder, judge
from fastmoco.pack.sources.base import Names, Passed, Reject


@dataclass
class Found:
    """What a source holds.

    Attributes:
        names: of the images.
        left_out: what looks like an image and is not packed, with the reason.
        passed: what is not meant as an image, by its group.
        folders: all that were seen, hidden ones aside; with or without images in them.
        filled: those that hold anything but images and folders.
        notes: what else is worth saying.
    """

    names: Names = field(default_factory=Names)
    left_out: list[Reject] = field(default_factory=list)
    passed: dict[str, Passed] = field(default_factory=dict)
    folders: set[str] = field(default_factory=set)
    filled: set[str] = field(default_factory=set)
    notes: list[str] = field(default_factory=list)

    def judge(self, name: str, start: Callable[[], bytes]) -> bool:
        """Return whether a file is meant as an image; note what becomes of it if it is not.

        Args:
            name: its path, with slashes.
            start: gives its first bytes; see `kinds.judge`.
        """
        verdict = judge(name, start)
        if verdict is IMAGE:
            return True
        if verdict.fate is Fate.PASSED:
            self.pass_over(name, verdict.about)
        else:
            self.leave_out(name, verdict.about)
        return False

    def leave_out(self, name: str, reason: str) -> None:
        """Note what looks like an image, or may hold some, and will not be packed."""
        self.filled.add(get_folder(name))
        self.left_out.append(Reject(name, reason))

    def pass_over(self, name: str, group: str) -> None:
        """Count what is not meant as an image."""
        self.filled.add(get_folder(name))
        self.passed.setdefault(group, Passed(name)).count += 1

    def settle(self) -> None:
        """Pass over the raw camera files that lie beside an image of the same stem."""
        raw = [reject for reject in self.left_out if reject.reason == RAW]
        if not raw:
            return
        wanted = {_stem(reject.name) for reject in raw}
        beside = {stem for name in self.names if (stem := _stem(name)) in wanted}
        kept = []
        for reject in self.left_out:
            if reject.reason == RAW and _stem(reject.name) in beside:
                self.pass_over(reject.name, RAW_BESIDE)
            else:
                kept.append(reject)
        self.left_out = kept


def get_folder(name: str) -> str:
    """Return the folder of a path with slashes, "" for none."""
    return name.rpartition("/")[0]


def hidden_part(name: str) -> str | None:
    """Return the first folder of a path that does not count, with all before it; None for none."""
    parts = name.split("/")[:-1]
    for place, part in enumerate(parts, 1):
        if hidden_folder(part):
            return "/".join(parts[:place])
    return None


def _stem(name: str) -> str:
    return os.path.splitext(name)[0].lower()
