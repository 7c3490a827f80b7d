"""Finding the classes of one source among those of another."""

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from fastmoco.dataset.classes import Known, few
from fastmoco.errors import DataError
from fastmoco.pack.sources.base import Source
from fastmoco.pack.sources.tree import is_training


def matched(names: Sequence[str], expected: Sequence[str]) -> dict[str, str]:
    """Return which of the expected classes each name means; see `Known`. Some may mean none."""
    known = Known(expected)
    codes = {name: known.code(name) for name in names}
    return {name: expected[code] for name, code in codes.items() if code is not None}


def agreed(source: Source, expected: list[str]) -> Source:
    """Return the source with the class numbers of another set, which may have further classes.

    Raises:
        DataError: it has no labels, or a class that the other has not.
    """
    if not source.classes:
        raise DataError("The source has no labels, which --like needs: pack it without --like.")
    codes = Known(expected).codes(source.classes)
    used = np.unique(source.labels[source.labels >= 0])
    unknown = [source.classes[label] for label in used if codes[label] < 0]
    if unknown:
        raise DataError(
            f"The classes differ from those of the set to be like: unknown there {few(unknown)}."
        )
    labels = np.append(codes, np.int32(-1))[source.labels]  # -1, the last one, stays -1
    return replace(source, labels=labels, classes=list(expected))


def in_one_numbering(sources: Mapping[str, Source], where: str) -> dict[str, Source]:
    """Return splits with the class numbers of the one to train on, or else of the largest.

    Raises:
        DataError: another has a class that this one has not.
    """
    labelled = [split for split, source in sources.items() if source.classes]
    if not labelled:
        return dict(sources)
    training = [split for split in labelled if is_training(split)]
    first = max(training or labelled, key=lambda split: len(sources[split].classes))
    classes = sources[first].classes
    try:
        return {s: agreed(one, classes) if s in labelled else one for s, one in sources.items()}
    except DataError as error:
        raise DataError(f"{where}, split {first}, lacks classes of another: {error}") from error
