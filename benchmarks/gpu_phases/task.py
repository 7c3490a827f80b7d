"""What a phase is told, and what it hands back."""

import json
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

Figures = dict[str, Any]


class Unavailable(Exception):
    """What an item works on was not given: it is not measured, which is no failure."""


@dataclass(frozen=True)
class Task:
    """What a phase works on.

    Attributes:
        work: a folder for what it writes.
        out: the results folder; rows go through the parent, other files are the phase's own.
        dry: toy sizes on a CPU.
        until: `time.time()` at which it should be done.
        photos: a folder or .zip of images; None: cut from what packages carry.
        cifar: CIFAR-10 as a packed set with `train` and `test`, or what packs into one.
    """

    work: Path
    out: Path
    dry: bool
    until: float
    photos: Path | None = None
    cifar: Path | None = None

    @property
    def device(self) -> str:
        """The recipe's word for the device."""
        return "cpu" if self.dry else "cuda"

    @property
    def images(self) -> Path:
        """The class folders of photographs, once set up."""
        return self.work / "images"

    @property
    def set(self) -> Path:
        """The packed photographs, once set up."""
        return self.work / "set"

    def to_json(self) -> str:
        """Return it as text for a command line."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> "Task":
        """Return what `to_json` wrote down."""
        values = json.loads(text)
        paths = {
            key: Path(values[key]) if values[key] else None
            for key in ("work", "out", "photos", "cifar")
        }
        return cls(**{**values, **paths})


@dataclass(frozen=True)
class Item:
    """One thing to measure.

    Attributes:
        work: measures it, returns figures, or yields them row by row; a row with an "item" of its
            own goes by that name.
        least: seconds without which it is not worth a start.
    """

    work: Callable[[], Figures | Iterator[Figures]]
    least: float = 0.0


Items = dict[str, Item]
