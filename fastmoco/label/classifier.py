"""A fitted classifier on file: many questions about pools cost one fit."""

import io
from dataclasses import dataclass, replace
from pathlib import Path
from textwrap import shorten
from typing import Any

import numpy as np
import torch

from fastmoco.core.files import hash_bytes, make_parent, write_bytes
from fastmoco.dataset.labels import Labelled
from fastmoco.errors import DataError
from fastmoco.label.head import Head, OutOfFold


@dataclass(frozen=True)
class Classifier:
    """A head, and what it was fitted on.

    Attributes:
        head: it.
        held: what heads said of samples that they were not fitted on; None: they were too few.
        center: (d,) fp64 of the features, see `standardize`.
        feature: which features: of the backbone or of the head.
        encoder: hash of the weights that made them, see `hash_weights`.
        classes: that it tells apart.
        labels: hash of the labels, see `hash_labels`.
    """

    head: Head
    held: OutOfFold | None
    center: torch.Tensor
    feature: str
    encoder: str
    classes: list[str]
    labels: str

    def check(self, **wanted: object) -> None:
        """Refuse it where one of its attributes is not the one that is wanted.

        Raises:
            DataError: naming it.
        """
        for name, value in wanted.items():
            if (own := getattr(self, name)) != value:
                found, asked = (shorten(str(one), 60, placeholder=" ...") for one in (own, value))
                raise DataError(
                    f"The classifier's {name} {'are' if name == 'classes' else 'is'} {found}, not "
                    f"{asked}. Name a new file by --classifier, and one is fitted."
                )

    def warn_of_labels(self, train: Labelled | None) -> list[str]:
        """Return a sentence if it was fitted on other labels."""
        if train and self.labels == hash_labels(train):
            return []
        here = len(train.ids) if train else 0
        return [
            f"the classifier was fitted on other labels ({self.head.samples}, here are {here}): "
            "name a new file by --classifier, and one is fitted"
        ]


def hash_labels(train: Labelled) -> str:
    """Return a hash of which images have which labels, and of their weights."""
    columns = (train.data.rows(train.ids)["hash"], train.labels, train.weights)
    return f"{hash_bytes(b''.join(np.ascontiguousarray(of).tobytes() for of in columns)):016x}"


def write_classifier(path: Path, found: Classifier) -> None:
    """Write a classifier, whole or not at all."""
    head = {k: v.cpu() if isinstance(v, torch.Tensor) else v for k, v in vars(found.head).items()}
    columns = vars(found.held).items() if found.held else ()
    held = {name: torch.from_numpy(of) for name, of in columns}
    content = io.BytesIO()
    torch.save(vars(found) | {"head": head, "held": held, "center": found.center.cpu()}, content)
    make_parent(path)
    write_bytes(path, content.getvalue())


def read_classifier(path: Path, device: torch.device) -> Classifier | None:
    """Return a classifier on file; None: there is none yet.

    Raises:
        DataError: it cannot be read.
    """
    if not path.exists():
        return None
    try:
        stored: dict[str, Any] = torch.load(path, map_location=device, weights_only=True)
        held = {name: of.cpu().numpy() for name, of in stored["held"].items()}
        head = Head(**stored["head"])
        return replace(Classifier(**stored), head=head, held=OutOfFold(**held) if held else None)
    except Exception as error:  # damaged archives raise anything, and quote themselves
        raise DataError(f"{path} cannot be read as a classifier: name another file.") from error
